"""What mutated files have shown to be wrong, one by one."""

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dp4tl_dist.config import TrainConfig, load_config
from dp4tl_dist.data.beton import BetonWriter, open_beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, make_meta, save_npz
from dp4tl_dist.info import describe, render
from dp4tl_dist.log import read_jsonl, truncate_jsonl, warn
from dp4tl_dist.prune.select import read_list
from dp4tl_dist.prune.votes_file import load_votes
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.train import checkpoint

DIGITS = "9" * 5000


def test_errors_are_one_line_whatever_they_quote(capsys: pytest.CaptureFixture[str]) -> None:
    text = str(UserError("a\nb\x1b[31m\u2028\ud800 é 日本 " + "x" * 5000 + " end"))
    assert text.startswith(r"a\nb\x1b[31m\u2028\ud800 é 日本 xxx") and text.endswith("xxx end") and len(text) < 2000
    assert str(UserError("plain  text")) == "plain  text"
    warn("no\nsecond line")
    assert capsys.readouterr().err == "warning: no\\nsecond line\n"


def test_a_small_payload_cannot_ask_for_gigabytes(tmp_path: Path) -> None:
    for height, reads in ((2000, True), (65_535, False)):
        with BetonWriter(tmp_path / "x.beton", capacity=1) as writer:
            writer.add(b"\xff\xd8" * 9, height=height, width=65_535, label=0, identifier=0)
            writer.finish(["a"], {})
        if reads:
            assert open_beton(tmp_path / "x.beton").heights[0] == height
        else:
            with pytest.raises(UserError, match="4294836225 pixels"):
                open_beton(tmp_path / "x.beton")


@pytest.mark.parametrize("shape", ["(33554432,)", "(0, 4611686018427387904)", "(4294967296, 4294967296)", "(-1,)"])
def test_an_array_is_not_allocated_before_its_size_is_checked(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("votes.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    tracemalloc.start()
    with pytest.raises(UserError, match="not a readable"):
        load_npz(tmp_path / "x.npz", "votes")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    save_npz(tmp_path / "x.npz", {"groups": np.arange(2)}, make_meta("subset"))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("indices", b"text")
    with pytest.raises(UserError, match="not a readable subset"):
        load_subset(tmp_path / "x.npz", beton=None)


@pytest.mark.parametrize(
    ("votes", "predictions", "sizes"),
    [
        ([1, 1], [0, 2], [2]),
        ([1, 1], [0, -1], [2]),
        ([2, 0], [0, 1], [2]),
        ([2**63 - 1, 3], [0, 1], [2]),
        ([[1, 0], [1, 0]], [0, 0], [2**62, 2 - 2**62]),
        (np.zeros((0, 2)), [], []),
    ],
)
def test_votes_count_what_the_images_voted_for(
    tmp_path: Path, votes: object, predictions: list[int], sizes: list[int]
) -> None:
    array = np.array(votes, np.int64)
    meta = make_meta("votes") | {"classes": ["a", "b"], "method": "lm"}
    arrays = {"votes": array, "affinity": array.astype(float), "predictions": np.array(predictions, np.int64)}
    save_npz(tmp_path / "x.npz", {**arrays, "target_sizes": np.array(sizes, np.int64)}, meta)
    with pytest.raises(UserError, match="do not add up"):
        load_votes(tmp_path / "x.npz")


def test_groups_are_not_negative(tmp_path: Path) -> None:
    meta = make_meta("subset") | {"ratio": 0.5, "method": "random"}
    save_npz(tmp_path / "x.npz", {"indices": np.arange(3), "groups": np.array([-1, 2])}, meta)
    with pytest.raises(UserError, match="unsorted"):
        load_subset(tmp_path / "x.npz", beton=None)


@pytest.mark.parametrize("content", [f"seed = {DIGITS}", "seed = 0x" + "f" * 5000, "[train]\nepochs = 0x" + "f" * 5000])
def test_numbers_of_thousands_of_digits(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(UserError, match=r"x\.toml"):
        load_config(TrainConfig, str(tmp_path / "x.toml"))
    (tmp_path / "x.json").write_text(f'{{"seed": {DIGITS}}}')
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(TrainConfig, str(tmp_path / "x.json"))
    (tmp_path / "empty.toml").write_text("")
    for text in (DIGITS, "[" * 100_000):
        with pytest.raises(UserError, match="seed"):
            load_config(TrainConfig, str(tmp_path / "empty.toml"), [f"seed={text}"])


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), None, [1], {"a": {}}])
def test_settings_of_a_transfer_are_plain_values(tmp_path: Path, value: object) -> None:
    """Anything else would be written down as something else, or not at all."""
    data = {"train": "a", "test": "b"}
    content = {"source": {"train": "s"}, "targets": {"t": data}, "transfer": {"lp": {"epochs": 2, "lr": value}}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"transfer\.lp\.lr"):
        load_config(RunConfig, str(tmp_path / "x.json"))


def test_endless_words_in_a_list_of_classes(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(40))
    for line, words in ((DIGITS, "past the last one"), ("b" * 2_000_000, "no class is called")):
        (tmp_path / "x.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match=words) as caught:
            read_list(tmp_path / "x.txt", classes)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"[" * 200_000])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n" + b'{"step": 2')
    for read in (read_jsonl, lambda path: truncate_jsonl(path, 1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 "):
            read(path)
    path.write_bytes(b'{"step": 1}\n' + line)  # cut off by a crash
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("val", [3, [], {"loss": 1}, {"top1": None}, {"top1": "best"}])
def test_a_checkpoint_without_an_accuracy_is_not_the_best(tmp_path: Path, val: object) -> None:
    folder = checkpoint.checkpoint_path(tmp_path, 1)
    checkpoint.save(folder, weights={}, state={}, meta=make_meta("checkpoint") | {"val": val})
    with pytest.raises(UserError, match="no checkpoint with a validation accuracy"):
        checkpoint.best(tmp_path)


@pytest.mark.parametrize("meta", [{"classes": "abc"}, {"classes": [1]}, {"classes": []}, {"arch": 5}, {"arch": {}}])
def test_a_checkpoint_of_no_network(tmp_path: Path, meta: dict[str, object]) -> None:
    whole = {"classes": ["a"], "arch": "resnet_tiny", **meta}
    content = make_meta("checkpoint", config={"model": {"arch": whole["arch"]}}) | {
        "classes": whole["classes"],
        "complete": True,
    }
    checkpoint.save(tmp_path / "c", weights={}, state={}, meta=content)
    with pytest.raises(UserError, match="no network or no classes"):
        checkpoint.load_model(tmp_path / "c")


def test_a_state_that_torch_cannot_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, weights={}, state={"ranks": []}, meta=make_meta("checkpoint"))
    whole = (tmp_path / "state.pt").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("state/data.pkl", b"\x80\x02K\x01.")
        archive.writestr("state/version", b"3\n")
        archive.writestr("state/byteorder", b"little")
    for content in (b"", whole[:-40], whole.replace(b"ranks", b"\xff\xff\xff\xff\xff"), other.getvalue()):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt .*: use another checkpoint"):
            checkpoint.load_state(tmp_path)


def test_what_info_shows_of_a_strangers_file(tmp_path: Path) -> None:
    deep = json.loads('{"a":' * 200 + "1" + "}" * 200)
    content = {"classes": ["a\nb", "\x1b[31m"], "\x1b": {"deep": deep}, "text": "two\nlines"}
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = render(describe(tmp_path / "x.json"))
    assert text.replace("\n", "").isprintable() and len(text.splitlines()) < 40
    for name, words in (("meta.json", "not a table"), ("stages/x.json", "not a table")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[1]")
        with pytest.raises(UserError, match=words):
            describe(tmp_path)
        (tmp_path / name).unlink()
