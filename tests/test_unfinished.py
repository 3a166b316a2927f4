"""Who consumes a checkpoint refuses a damaged one and an unfinished one, and what is made from the latter says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_factory import make_beton

from dp4tl_dist.cli import main
from dp4tl_dist.config import validate
from dp4tl_dist.data.beton import open_beton, sidecar
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, make_meta, read_json
from dp4tl_dist.models import build_model
from dp4tl_dist.plan import check_plan
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph
from dp4tl_dist.train import checkpoint

SIDES = {"resolution": 32, "val_resolution": 32, "val_ratio": 0.875}
TRAIN = ("train.epochs=2", "train.batch_size=8", "train.resolution=32", "train.val_resolution=32")
SETS = [part for key in TRAIN for part in ("--set", key)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a target, and the run of a surrogate: the checkpoints of steps 5 and 10, the last one."""
    place = tmp_path_factory.mktemp("unfinished")
    source = open_beton(make_beton(place / "source.beton"))
    for split in ("train", "test"):
        make_beton(place / f"{split}.beton", kind="target", split=split)
    for step in (5, 10):
        torch.manual_seed(step)
        model = build_model("resnet_tiny", source.num_classes)
        config = {"model": {"arch": "resnet_tiny"}, "train": SIDES}
        meta = make_meta("checkpoint", config=config, inputs={"train": source.fingerprint})
        meta |= {"classes": list(source.classes), "step": step, "complete": step == 10, "seconds": 9.0}
        meta |= {"samples_seen": 400, "epoch": step, "val": {"top1": 0.5, "loss": 1.0}}
        folder = checkpoint.checkpoint_path(place / "run", step)
        checkpoint.save(folder, weights=model.state_dict(), state={"optimizer": {}, "ranks": []}, meta=meta)
    write_config(place)
    return place


def write_config(place: Path) -> None:
    text = f"[data]\ntrain = '{place / 'source.beton'}'\n[model]\narch = 'resnet_tiny'\ninit = '{place / 'run'}'\n"
    (place / "train.toml").write_text(text + "[engine]\ndevice = 'cpu'\n[train]\npeak_epoch = 1\n")


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place, tmp_path / "place")
    write_config(tmp_path / "place")
    return tmp_path / "place"


def command(place: Path, verb: str) -> list[str]:
    """A command line that reads the run, without --out."""
    source, train, test, run = place / "source.beton", place / "train.beton", place / "test.beton", place / "run"
    select = ["--surrogate", run, "--device", "cpu", "--batch-size", "8"]
    return [str(part) for part in {
        "lm": ["vote", "--method", "lm", *select, "--target", train],
        "fm": ["vote", "--method", "fm", *select, "--target", train, "--source", source],
        "cluster": ["cluster", *select, "--source", source, "--clusters", "3"],
        "score": ["score", "--method", "el2n", *select, "--source", source],
        "grand": ["score", "--method", "grand", "--full-gradient", *select, "--source", source],
        "transfer": ["transfer", "--checkpoint", run, "--train", train, "--test", test, "--mode", "lp", "--cached",
                     "--set", "engine.device='cpu'", *SETS],
        "init": ["train", "--config", place / "train.toml", *SETS],
    }[verb]]  # fmt: skip


VERBS = {"lm": "o.npz", "fm": "o.npz", "cluster": "o.npz", "score": "o.npz", "grand": "o.npz", "transfer": "o.json",
         "init": "o"}  # fmt: skip


def made(place: Path, verb: str) -> dict[str, Any]:
    """The meta of what the command makes."""
    out = place / VERBS[verb]
    if out.suffix == ".npz":
        kind = {"lm": "votes", "fm": "votes", "cluster": "clusters"}.get(verb, "scores")
        return load_npz(out, kind)[1]
    return dict(read_json(out if verb == "transfer" else checkpoint.checkpoints(out)[-1] / "meta.json"))


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    place = content.find(b"0.875") + 2 if b"0.875" in content else len(content) // 2
    changed[place] ^= 1
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "flipped": flipped,
    "gone": lambda content: None,
}


def refused(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    capsys.readouterr()
    assert main([*argv, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not out.exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*checkpoint.FILES, "meta.json"])
def test_a_damaged_checkpoint_is_refused_before_a_network_is_built(
    copied: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.checkpoint_path(copied / "run", 10) / name
    content = DAMAGES[damage](path.read_bytes())
    path.write_bytes(content) if content is not None else path.unlink()
    for module in ("transfer", "train.checkpoint", "train.supervised"):
        monkeypatch.setattr(f"dp4tl_dist.{module}.build_model", None)
    for verb, out in VERBS.items():
        refused(command(copied, verb), copied / out, capsys, "step_000000010 is damaged")
        refused([*command(copied, verb), "--allow-incomplete"], copied / out, capsys, "step_000000010 is damaged")
    assert main(["info", str(copied / "run"), "--verify"]) == 2
    assert "step_000000010" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_an_unfinished_training_is_refused_or_recorded(
    copied: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(checkpoint.checkpoint_path(copied / "run", 10))
    refused(
        command(copied, verb), copied / VERBS[verb], capsys, "not trained to its end (step 5)", "--allow-incomplete"
    )
    assert main([*command(copied, verb), "--allow-incomplete", "--out", str(copied / VERBS[verb])]) == 0
    assert made(copied, verb)["unfinished"] == [f"{checkpoint.checkpoint_path(copied / 'run', 5)} (step 5)"]


@pytest.mark.parametrize("table", ["pretrain", "surrogate", "influence"])
def test_the_plan_of_a_run_takes_what_its_stages_take(copied: Path, table: str) -> None:
    """Told to, a run starts from an unfinished training; else it is told by which key of its own config it may."""
    shutil.rmtree(checkpoint.checkpoint_path(copied / "run", 10))
    stage = {"model": {"arch": "resnet_tiny"},
             "train": {"batch_size": 8, "resolution": 32, "val_resolution": 32}}  # fmt: skip
    first = {**stage, "model": {"arch": "resnet_tiny", "init": str(copied / "run")}}
    content = {
        "source": {"train": str(copied / "source.beton")}, "engine": {"device": "cpu"}, "arms": ["lm@0.5"],
        "targets": {"t": {"train": str(copied / "train.beton"), "test": str(copied / "test.beton")}},
        "surrogate": stage, "pretrain": stage, "influence": {"masks": 32}, "transfer": {"lp": SIDES},
    }  # fmt: skip
    if table == "influence":
        content["arms"], first = ["influence@0.5"], {**first, "masks": 32}
    content[table] = first

    def plan() -> None:
        check_plan(Graph(validate(RunConfig, content, source="test"), copied / "out"), ranks=lambda stage: 1)

    with pytest.raises(UserError, match=f"step 5.*{table}.model.allow_incomplete = true"):
        plan()
    first["model"]["allow_incomplete"] = True  # type: ignore[index]
    plan()


@pytest.mark.parametrize("verb", ["lm", "transfer"])
def test_what_is_made_from_a_finished_training_says_nothing(copied: Path, verb: str) -> None:
    assert main([*command(copied, verb), "--out", str(copied / VERBS[verb])]) == 0
    assert "unfinished" not in made(copied, verb)


def test_it_is_carried_on_to_the_last_number(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """votes -> subset -> compacted beton -> checkpoint -> result, none of which needs the flag again."""
    shutil.rmtree(checkpoint.checkpoint_path(copied / "run", 10))
    note = [f"{checkpoint.checkpoint_path(copied / 'run', 5)} (step 5)"]
    votes, subset, small = copied / "v.npz", copied / "x.npz", copied / "small.beton"
    source, model = str(copied / "source.beton"), copied / "model"
    lines = [
        [*command(copied, "lm"), "--allow-incomplete", "--out", str(votes)],
        ["prune", "--source", source, "--votes", str(votes), "--keep", "0.5", "--out", str(subset)],
        ["compact", "--source", source, "--subset", str(subset), "--out", str(small)],
        ["train", "--config", str(copied / "train.toml"), "--out", str(model), *SETS, "--set", "model.init=''",
         "--set", f"data.train='{small}'"],
    ]  # fmt: skip
    for line in lines:
        assert main(line) == 0, capsys.readouterr().err
    assert load_npz(subset, "subset")[1]["unfinished"] == note
    assert read_json(sidecar(small))["meta"]["unfinished"] == note
    shutil.rmtree(copied / "run")
    model.rename(copied / "run")
    assert main([*command(copied, "transfer"), "--out", str(copied / "o.json")]) == 0
    assert made(copied, "transfer")["unfinished"] == note
    assert "unfinished" in json.dumps(read_json(copied / "o.json"))


def test_advise_counts_no_unfinished_training(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(copied, "lm"), "--out", str(copied / "v.npz")]) == 0
    shutil.rmtree(checkpoint.checkpoint_path(copied / "run", 10))
    line = ["advise", "--votes", str(copied / "v.npz"), "--source", str(copied / "source.beton"), "--throughput", "99",
            "--config", str(copied / "train.toml"), *SETS]  # fmt: skip
    capsys.readouterr()
    assert main(line) == 2
    assert "not trained to its end" in capsys.readouterr().err
    assert main([*line, "--allow-incomplete"]) == 0
