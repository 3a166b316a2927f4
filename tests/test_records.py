"""What a run does again, and what it leaves: keys, records and outputs, with stages that only pretend."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton
from PIL import Image
from test_stages import Content, config_of

from dp4tl_dist import pipeline, records, revisions
from dp4tl_dist.contents import content_digest
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, save_npz, write_json
from dp4tl_dist.jobs import needs
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph


class Made:
    """Takes the place of `StageProcess`: writes what the stage would, at once, and notes its name."""

    names: list[str]
    fail_after: str = ""

    def __init__(self, argv: tuple[str, ...], *, nproc: int, log: Path, label: str) -> None:
        self.argv, self.name = argv, label.split()[-1]

    def run(self) -> None:
        out = Path(self.argv[self.argv.index("--out") + 1])
        assert not out.is_file(), f"{self.name}: {out} exists"
        Made.names.append(self.name)
        text = " ".join(Path(part).name for part in self.argv)
        if self.argv[0] == "train":
            config = (Path(self.argv[self.argv.index("--config") + 1])).read_text()
            folder = out / "checkpoints" / "step_000000001"
            folder.mkdir(parents=True, exist_ok=True)
            weights = folder / "weights.safetensors"
            weights.write_text(f"{config.count('0.25')} {config.count('0.125')}")
            digests = {weights.name: digest_file(weights)}
            write_json(folder / "meta.json",
                       {"digests": digests, "seconds": 1.0, "num_samples": 24, "complete": True})  # fmt: skip
        elif self.argv[0] == "transfer":
            write_json(out, {"top1": 0.5})
        elif self.argv[0] == "compact":
            make_beton(out)
        else:
            save_npz(out, {"indices": np.arange(5)}, {"kind": "subset", "text": text})
            if "--apply-to" in self.argv:
                save_npz(out.with_suffix(".val.npz"), {"indices": np.arange(2)}, {"kind": "subset"})
        if self.name == Made.fail_after:
            raise RuntimeError("cut off")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Betons, the current folder, and stages that only pretend."""
    for name in ("source", "val", "train", "test"):
        make_beton(tmp_path / f"{name}.beton", kind="target" if name == "test" else "source",
                   split="test" if name == "test" else "train", per_class=2)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "StageProcess", Made)
    monkeypatch.setattr(pipeline, "conclude", lambda graph: None)  # drawing takes longer than all the rest
    monkeypatch.setattr(Made, "names", [], raising=False)
    return tmp_path


def small(**content: Any) -> RunConfig:
    """A run whose plan holds on the betons of `place`: half of the source is four samples."""
    for table, given in (("surrogate", {}), ("pretrain", {"model": {"arch": "resnet50"}, "train": {"lr": 0.25}})):
        given = content.get(table, given)
        content[table] = {**given, "train": {"batch_size": 2, **given.get("train", {})}}
    return config_of(**{
        "source": {"train": "source.beton", "val": "val.beton"},
        "targets": {"t": {"train": "train.beton", "test": "test.beton"}},
        "arms": ["dense", "lm@0.5", "random@0.5"], "seeds": [0], "transfer": {"cached": True}, "compact": True,
        **content,
    })  # fmt: skip


def made(out: str = "out", **content: Any) -> list[str]:
    """The stages that a run carries out; what a dry run had announced is checked against it."""
    Made.names = []
    planned = [stage.name for stage, why in records.plan(Graph(small(**content), Path(out))) if why != "skip"]
    pipeline.run(small(**content), out=Path(out))
    assert set(Made.names) <= set(planned)
    return Made.names


def test_a_second_run_has_nothing_to_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made() == list(Graph(small(), Path("out")).stages)
    assert made() == []
    pipeline.run(small(), out=Path("out"), dry_run=True)
    assert all(line.split()[0] == "skip" for line in capsys.readouterr().out.splitlines()[-12:])


@pytest.mark.parametrize("out", ["out", "deep/runs/out", "a", "e"])
def test_a_run_folder_may_move(place: Path, out: str) -> None:
    made(out)
    Path(out).rename(place / "moved elsewhere")
    assert made("moved elsewhere") == []
    assert made(str(place / "moved elsewhere")) == []


def test_inputs_may_move(place: Path) -> None:
    made()
    for name in ("train.beton", "train.beton.json"):
        (place / name).rename(place / f"other-{name}")
    assert made(targets={"t": {"train": "other-train.beton", "test": "test.beton"}}) == []


@pytest.mark.parametrize(
    "content",
    [{"log": {"every": 3}}, {"checkpoint": {"every_minutes": 1}}, {"nproc": 2}],
    ids=str,
)
def test_what_changes_nothing(place: Path, content: Content) -> None:
    made()
    assert made(**content) == []


@pytest.mark.parametrize("content", [b"", b"\0" * 8, None], ids=["cut", "zeroed", "gone"])
def test_a_training_with_damaged_weights_is_not_done(place: Path, content: bytes | None) -> None:
    """It is made again; what follows was made from the same weights and stays."""
    made()
    (weights,) = Path("out/surrogate/checkpoints").glob("*/weights.safetensors")
    weights.write_bytes(content) if content is not None else weights.unlink()
    planned = {stage.name: why for stage, why in records.plan(Graph(small(), Path("out")))}
    assert planned["surrogate"] == "replace"
    assert made() == ["surrogate"] and made() == []


CHANGES: list[tuple[Content, set[str]]] = [
    ({"transfer": {"cached": True, "lp": {"epochs": 9}}}, {"transfer"}),
    ({"pretrain": {"train": {"lr": 0.125}}}, {"pretrain", "transfer"}),
    ({"surrogate": {"train": {"lr": 0.125}}}, {"surrogate", "vote"}),
]


@pytest.mark.parametrize(("content", "kinds"), CHANGES, ids=lambda given: " ".join(sorted(given)))
def test_what_a_changed_config_redoes(place: Path, content: Content, kinds: set[str]) -> None:
    made()
    assert {name.split("-")[0] for name in made(**content)} == kinds


@pytest.mark.parametrize("out", [".", "24", "deep/write"])
def test_keys_do_not_depend_on_the_place(place: Path, out: str) -> None:
    for name in ("checkpoints", "c"):  # a class that is called like a part of a training's folder
        (place / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (24, 24), (i, 9, 9)).save(place / "images" / name / f"{i}.png")

    def keys(out: str | Path, **write: Any) -> dict[str, str]:
        graph = Graph(small(source={"train": "images"}, write={"max_side": 24, **write}), Path(out))
        return {name: records.stage_key(graph, stage) for name, stage in graph.stages.items()}

    before = keys(out)
    assert before == keys(place / "elsewhere" / "run")
    for changed in ({"max_side": 14}, {"quality": 24}, {"seed": 24}):
        assert keys(out, **changed)["write-source-train"] != before["write-source-train"]
    (place / "images" / "checkpoints" / "3.png").unlink()
    assert keys(out)["write-source-train"] != before["write-source-train"]


@pytest.mark.parametrize("table", ["surrogate", "pretrain", "influence"])
def test_the_checkpoint_that_a_training_begins_with_is_an_input(place: Path, table: str) -> None:
    run, folder = place / "before", place / "before" / "checkpoints" / "step_000000001"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_text("weights")

    def digests(text: str) -> None:
        write_json(folder / "meta.json", {"digests": {"weights.safetensors": text}, "complete": True})

    stage = {"surrogate": "surrogate", "pretrain": "pretrain-dense-s0", "influence": "influence-t"}[table]
    for init in (run, folder):
        digests("one")
        graph = Graph(
            small(arms=["dense", "influence@0.5", "lm@0.5"], **{table: {"model": {"init": str(init)}}}), Path("out")
        )
        before = records.stage_key(graph, graph.stages[stage])
        digests("two")
        assert records.stage_key(graph, graph.stages[stage]) != before
    config = small(pretrain={"model": {"init": "out/surrogate"}})
    graph = Graph(config, Path("out"))
    assert "surrogate" in needs(graph.stages["pretrain-dense-s0"], list(graph.stages.values()))


@pytest.mark.parametrize("name", records.OWN)
def test_files_that_no_run_made_are_not_replaced(place: Path, name: str) -> None:
    (place / "mine").mkdir()
    (place / "mine" / name).write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(UserError, match=f"{name} was not made by a run"):
            pipeline.run(small(), out=Path("mine"), dry_run=dry_run)
    assert [path.name for path in (place / "mine").iterdir()] == [name]
    assert (place / "mine" / name).read_text() == "mine"
    made()
    (place / "out" / name).write_text("the run's own")
    assert made() == []


def test_a_changed_input_is_noticed(place: Path) -> None:
    made()
    make_beton(place / "test.beton", kind="target", split="test", per_class=3)
    assert {name.split("-")[0] for name in made()} == {"transfer"}
    make_beton(place / "train.beton", per_class=3)
    assert {name.split("-")[0] for name in made()} == {"vote", "transfer"}
    make_beton(place / "source.beton", per_class=3)
    assert {"surrogate", "prune", "compact", "pretrain"} <= {name.split("-")[0] for name in made()}


def test_a_changed_image_folder_is_noticed(place: Path) -> None:
    images = place / "images" / "a"
    images.mkdir(parents=True)
    (images / "1.png").write_bytes(b"1")
    stage = Graph(small(source={"train": "images/"}), Path("out")).stages["write-source-train"]
    digests = [content_digest(place / "images")]
    (images / "1.png").write_bytes(b"12")
    digests.append(content_digest(place / "images"))
    (images / "2.png").touch()
    digests.append(content_digest(place / "images"))
    assert len(set(digests)) == 3 and stage.inputs == (Path("images"),)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_dry_run_refuses_what_write_will(place: Path, skip_bad: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken link is one line, or passed over; a whole folder that is one is never passed over."""
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        path = place / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    config = small(source={"train": "images"}, write={"skip_bad": skip_bad})
    pipeline.run(config, out=Path("out"), dry_run=True)
    (place / "images" / "a" / "gone.png").symlink_to("nowhere")
    before = content_digest(place / "images")
    outcome = nullcontext() if skip_bad else pytest.raises(UserError, match=r"gone.png \(a broken link\)")
    with outcome:
        pipeline.run(config, out=Path("out"), dry_run=True)
    Image.new("RGB", (8, 8)).save(place / "images" / "a" / "nowhere", "PNG")
    assert content_digest(place / "images") != before
    pipeline.run(config, out=Path("out"), dry_run=True)
    (place / "images" / "c").symlink_to("nowhere")
    with pytest.raises(UserError, match="c is a broken link"):
        pipeline.run(config, out=Path("out"), dry_run=True)


@pytest.mark.parametrize("name", ["subsets/lm@0.5-t.npz", "subsets/lm@0.5-t.val.npz", "data/lm@0.5-t.beton.json"])
def test_an_output_that_is_gone_is_made_again(place: Path, name: str) -> None:
    made()
    (place / "out" / name).unlink()
    (again,) = made()
    assert again.endswith("lm@0.5-t")


@pytest.mark.parametrize(
    "name",
    ["surrogate", "vote-lm-t", "prune-lm@0.5-t", "compact-lm@0.5-t", "pretrain-dense-s0", "transfer-lp-dense-t-s0"],
)
def test_cut_off_between_an_output_and_its_record(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "fail_after", name)
    with pytest.raises(RuntimeError, match="cut off"):
        made()
    reasons = {stage.name: why for stage, why in records.plan(Graph(small(), Path("out")))}
    assert reasons[name] == "resume"
    monkeypatch.setattr(Made, "fail_after", "")
    assert made()[0] == name
    assert made() == []


def test_records_tell_what_was_done(place: Path) -> None:
    made()
    record = json.loads((place / "out" / "stages" / "prune-lm@0.5-t.json").read_text())
    assert record["status"] == "done" and record["argv"][0] == "prune" and record["seconds"] >= 0
    assert json.loads((place / "out" / "config.json").read_text()) == small().model_dump(mode="json")


@pytest.mark.parametrize("verb", ["train", "vote", "prune", "compact", "transfer"])
def test_a_raised_number_redoes_a_verbs_stages_and_a_release_none(
    place: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    monkeypatch.setattr("dp4tl_dist.__version__", "9.9.9")
    assert made() == []
    mine = [name for name, stage in Graph(small(), Path("out")).stages.items() if stage.argv[0] == verb]
    for table, key in ((revisions.RESULTS, verb), (revisions.FORMATS, revisions.MAKES[verb])):
        monkeypatch.setitem(table, key, table[key] + 1)
        again = made()
        assert set(mine) <= set(again) and (table is revisions.FORMATS or again == mine)
        assert made() == []
