"""Checkpoints are whole or skipped, load only where they fit, and the ones worth keeping stay."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.models import build_model
from dp4tl_dist.train import checkpoint

ARCH, CLASSES = "resnet_tiny", ("a", "b", "c")


def saved(run: Path, step: int, *, top1: float | None = None, num_classes: int = 3) -> Path:
    """A checkpoint of that step of a tiny network."""
    folder = checkpoint.checkpoint_path(run, step)
    torch.manual_seed(step)
    meta = make_meta("checkpoint", config={"model": {"arch": ARCH}})
    meta |= {
        "complete": True,
        "classes": [str(i) for i in range(num_classes)],
        "val": None if top1 is None else {"top1": top1},
    }
    model = build_model(ARCH, num_classes)
    checkpoint.save(
        folder, weights=model.state_dict(), state={"optimizer": {}, "ranks": []}, meta={**meta, "step": step}
    )
    return folder


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in checkpoint.checkpoints(run)]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


TEARS: dict[str, Any] = {
    "weights cut": lambda folder: (folder / "weights.safetensors").write_bytes(b"x"),
    "weights flipped": lambda folder: flip(folder / "weights.safetensors"),
    "state missing": lambda folder: (folder / "state.pt").unlink(),
    "state flipped": lambda folder: flip(folder / "state.pt"),
    "meta changed": lambda folder: change(folder / "meta.json", '"complete": true', '"complete": false'),
    "meta missing": lambda folder: (folder / "meta.json").unlink(),
    "meta cut": lambda folder: (folder / "meta.json").write_text('{"kind": "check'),
    "meta of another kind": lambda folder: (folder / "meta.json").write_text('{"kind": "votes"}'),
    "empty": lambda folder: [item.unlink() for item in folder.iterdir()],
}


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path, 12, top1=0.5)
    assert folder.name == "step_000000012"
    assert sorted(item.name for item in folder.iterdir()) == ["meta.json", "state.pt", "weights.safetensors"]
    weights = checkpoint.load_weights(folder)
    assert weights.keys() == build_model(ARCH, 3).state_dict().keys()
    assert not any(name.startswith("module.") for name in weights)
    model, meta = checkpoint.load_model(tmp_path)
    assert meta["step"] == 12 and meta["digests"].keys() == {"weights.safetensors", "state.pt"}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    model = build_model(ARCH, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint.save(tmp_path / "c", weights=model.state_dict(), state={}, meta={"kind": "checkpoint"})
    other = build_model(ARCH, 3)
    checkpoint.load_into(other, tmp_path / "c")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("tear", sorted(TEARS))
def test_a_torn_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, tear: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, torn = saved(tmp_path, 5), saved(tmp_path, 9)
    TEARS[tear](torn)
    assert checkpoint.newest(tmp_path) == whole
    assert f"warning: {torn} is torn or damaged: skipped" in capsys.readouterr().err
    for named in (torn, tmp_path):  # for anyone but the run itself the one before is another network
        with pytest.raises(UserError) as caught:
            checkpoint.resolve(named, allow_incomplete=True)
        assert str(torn) in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.resolve(whole) == whole
    TEARS[tear](whole)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("tear", sorted(TEARS))
def test_a_torn_checkpoint_does_not_stand_in_the_way_of_saving(tmp_path: Path, tear: str) -> None:
    for step in (2, 3, 5, 9):
        saved(tmp_path, step, top1=step / 10)
    TEARS[tear](checkpoint.checkpoint_path(tmp_path, 9))
    (checkpoint.checkpoint_path(tmp_path, 2) / "meta.json").unlink()
    saved(tmp_path, 7, top1=0.2)  # the run went on from 5
    checkpoint.prune_old(tmp_path, keep=2, step=7)
    assert steps(tmp_path) == [5, 7]
    assert checkpoint.best(tmp_path).name == "step_000000005"


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ({1: None, 2: None, 3: None}, 2, [2, 3]),
        ({1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, 2, [1, 3, 4]),
        ({1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, 1, [1, 4]),
        ({1: 0.1, 2: 0.9, 3: None, 4: 0.9}, 1, [2, 4]),
        ({1: 0.1, 2: 0.2}, 5, [1, 2]),
        ({1: 0.0, 2: 0.0, 3: None, 4: None}, 2, [1, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, scores: dict[int, float | None], keep: int, kept: list[int]
) -> None:
    for step, top1 in scores.items():
        saved(tmp_path, step, top1=top1)
    (tmp_path / "checkpoints" / ".step_000000002.77.abcd.tmp").mkdir()
    checkpoint.prune_old(tmp_path, keep=keep, step=max(scores))
    assert steps(tmp_path) == kept
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_best_is_the_first_of_equals(tmp_path: Path) -> None:
    # A later one of equals is saved in some runs and not in others (a stop saves); the first always is.
    for step, top1 in {1: 0.1, 2: 0.5, 3: 0.5, 4: None}.items():
        saved(tmp_path, step, top1=top1)
    assert checkpoint.best(tmp_path).name == "step_000000002"


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    vals = [{"top1": 0.5, "loss": 1.0}, {"top1": 0.5, "loss": 0.9}, {"top1": 0.4, "loss": 0.1}, {"top1": 0.5}, None]
    ranked = sorted(vals, key=checkpoint.goodness, reverse=True)
    assert ranked == [vals[1], vals[0], vals[3], vals[2], vals[4]]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "none", tmp_path / "file", tmp_path / "empty", tmp_path / "run"):
        with pytest.raises(UserError) as caught:
            checkpoint.load_model(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_another_architecture_or_number_of_classes(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(build_model("resnet18", 3), folder)
    assert "architecture" in str(caught.value) and str(folder) in str(caught.value)
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(build_model(ARCH, 4), folder)
    assert "fc.weight has shape [3, 128], and [4, 128] is needed" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [{"classes": None}, {"config": None}, {"config": {"model": {"arch": "resnet19"}}}])
def test_a_meta_that_does_not_describe_a_model(tmp_path: Path, spoil: dict[str, Any]) -> None:
    folder = saved(tmp_path, 1)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **spoil, "digest": checkpoint.digest_meta(meta | spoil)}))
    with pytest.raises(UserError):
        checkpoint.load_model(folder)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "c"
    checkpoint.save(
        folder, weights=nn.Linear(1, 1).state_dict(), state={"optimizer": Trap()}, meta={"kind": "checkpoint"}
    )
    with pytest.raises(UserError, match=r"state\.pt is not readable"):
        checkpoint.load_state(folder)
    assert not (tmp_path / "sprung").exists()


def test_saving_again_replaces(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, top1=0.1)
    saved(tmp_path, 1, top1=0.2)
    assert checkpoint.is_whole(folder) and checkpoint.read_meta(folder)["val"] == {"top1": 0.2}
    shutil.rmtree(folder)
    assert checkpoint.newest(tmp_path) is None
