"""A run destroys nothing: what was finished stays until its replacement is complete, wherever the run is cut off, and
what the run did not make is not touched. With stages that only pretend; tests/test_run.py has real ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_records import Made, made, place, small
from test_revisions import unpacked

from dp4tl_dist import pipeline, records
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.prune.votes_file import load_votes
from dp4tl_dist.stages import Graph
from dp4tl_dist.train.checkpoint import load_model

__all__ = ["place"]  # the fixture

OTHER: dict[str, Any] = {"surrogate": {"train": {"lr": 0.125}}, "pretrain": {"train": {"lr": 0.125}}}
STAGES = ["surrogate", "pretrain-dense-s0", "prune-lm@0.5-t", "compact-lm@0.5-t", "transfer-lp-dense-t-s0"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock, its config and what a stage was told."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("config.json", ".lock") and "configs" not in path.parts
    }


def planned(**content: Any) -> dict[str, str]:
    return {stage.name: why for stage, why in records.plan(Graph(small(**content), Path("out")))}


def refused(**content: Any) -> str:
    with pytest.raises(UserError) as caught:
        pipeline.run(small(**content), out=Path("out"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hidden() -> list[str]:
    return [path.name for path in Path("out").rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("name", ["surrogate", "votes/vote-lm-t.npz", "subsets/lm@0.5-t.val.npz", "link", "dangling"])
def test_what_the_run_did_not_make_is_refused_by_name(place: Path, name: str) -> None:
    path = Path("out") / ("surrogate" if name in ("link", "dangling") else name)
    path.parent.mkdir(parents=True)
    if name in ("link", "dangling"):
        Path("elsewhere").mkdir() if name == "link" else None
        path.symlink_to(Path("elsewhere").absolute())
    elif path.suffix:
        path.write_bytes(b"mine")
    else:
        (path / "checkpoints").mkdir(parents=True)
    before = snapshot(Path("out"))
    assert f"{path} was not made by this run" in refused()
    with pytest.raises(UserError, match="was not made by this run"):
        planned()
    assert snapshot(Path("out")) == before and Made.names == []


def test_a_link_in_the_place_of_an_output_is_refused_once_it_would_be_replaced(place: Path) -> None:
    made()
    Path("out/surrogate").rename("moved")
    Path("out/surrogate").symlink_to(Path("moved").absolute())
    assert made() == []
    assert "out/surrogate is a symbolic link" in refused(**OTHER)
    assert Path("moved/checkpoints").is_dir()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_fails_leaves_what_was_finished(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    before = snapshot(Path("out"))
    stage = Graph(small(), Path("out")).stages[name]
    monkeypatch.setitem(records.FORMATS, "dataset", 1)
    monkeypatch.setattr("dp4tl_dist.revisions.RESULTS", {**records_of_all(), stage.argv[0]: 99})
    monkeypatch.setattr(Made, "fail_after", name)
    assert planned()[name] == "replace"
    with pytest.raises(RuntimeError, match="cut off"):
        pipeline.run(small(), out=Path("out"))
    monkeypatch.setattr(Made, "fail_after", "")
    for path in stage.outputs:  # the finished one is there, whole
        files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
        assert files and all(item.read_bytes() == before[str(item.relative_to("out"))] for item in files)
    assert planned()[name] == "resume"
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "StageProcess", Made)
    monkeypatch.setattr(pipeline, "conclude", lambda graph: None)
    monkeypatch.chdir(place)
    # Asked as before, there is nothing to do, and the record says so.
    assert name not in made()
    assert json.loads(Path(f"out/stages/{name}.json").read_text())["status"] == "done"


def records_of_all() -> dict[str, int]:
    from dp4tl_dist.revisions import RESULTS

    return dict(RESULTS)


class Cut(BaseException):
    """The process ends here."""


def cut_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """End at the number-th change of the file system by the runner. Returns whether it came to that."""
    count = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Cut
            return real(*args, **more)

        return call

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"), (Path, "unlink"),
                        (shutil, "rmtree")):  # fmt: skip
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    return lambda: count >= number


@pytest.mark.parametrize("name", ["surrogate", "prune-lm@0.5-t"])
def test_cut_off_anywhere_while_an_output_is_replaced(place: Path, name: str) -> None:
    made()
    old = Graph(small(), Path("out")).stages[name]
    wanted = small(**OTHER, compact=False) if name == "surrogate" else small(seeds=[0])
    for number in range(1, 100):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree("out", "copy")
        graph = Graph(wanted, Path("copy"))
        stage = graph.stages[name]
        with pytest.MonkeyPatch.context() as patch:
            if name != "surrogate":
                patch.setattr("dp4tl_dist.revisions.RESULTS", {**records_of_all(), "prune": 9})
            reached = cut_at(number, patch)
            try:
                record = records.settle(graph, stage)
                pipeline.carry_out(graph, stage, record, records.stage_key(graph, stage), name)
            except Cut:
                pass
        whole = [path for path in Path("copy").rglob(stage.output.name) if complete(path)]
        assert whole, f"cut off at change {number}: neither the old output nor the new one is there"
        with pytest.MonkeyPatch.context() as patch:
            if name != "surrogate":
                patch.setattr("dp4tl_dist.revisions.RESULTS", {**records_of_all(), "prune": 9})
            record, key = records.settle(graph, stage), records.stage_key(graph, stage)
            if not records.is_done(stage, records.finished(record), key):
                pipeline.carry_out(graph, stage, record, key, name)
            record = records.settle(graph, stage)
            assert records.is_done(stage, record, key)
        # A record's temporary goes with the next record, unless its writer lives, as it does here.
        left = [path.name for path in Path("copy").rglob(".*") if path.name != ".lock" and path.suffix != ".tmp"]
        assert not left, f"cut off at change {number}"
        if not reached():
            assert number > 8, "there was something to cut"
            return
    raise AssertionError(f"{old.name} never came to its end")


def complete(path: Path) -> bool:
    return any(path.rglob("meta.json")) if path.is_dir() else path.stat().st_size > 0


def test_an_unfinished_try_waits_while_another_config_is_tried(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "fail_after", "surrogate")
    for content in ({}, OTHER):
        with pytest.raises(RuntimeError, match="cut off"):
            made(**content)
    marker = Path("out/.surrogate.new/surrogate/mine")
    marker.write_text("other")
    assert planned()["surrogate"] == planned(**OTHER)["surrogate"] == "resume"
    with pytest.raises(RuntimeError, match="cut off"):
        made()
    assert not marker.exists()
    with pytest.raises(RuntimeError, match="cut off"):
        made(**OTHER)
    assert marker.read_text() == "other"
    monkeypatch.setattr(Made, "fail_after", "")
    made()
    assert hidden() == []


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_damaged_record_counts_as_not_done(place: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    path = Path("out/stages/prune-lm@0.5-t.json")
    path.write_text(content)
    assert planned()["prune-lm@0.5-t"] == "replace"
    assert made() == ["prune-lm@0.5-t"]
    assert f"{path} is damaged: prune-lm@0.5-t counts as not done" in capsys.readouterr().err
    assert made() == [] and hidden() == []


def test_a_record_that_cannot_be_written_loses_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    before = snapshot(Path("out"))
    real = records.write_json

    def full(path: Path, content: Any) -> None:
        if path.parent.name == "stages":
            raise UserError(f"cannot write {path} (No space left on device): free some space")
        real(path, content)

    monkeypatch.setattr(records, "write_json", full)
    assert "No space left" in refused(**OTHER)
    monkeypatch.setattr(records, "write_json", real)
    after = snapshot(Path("out"))
    assert {name: after[name] for name in before} == before
    assert made() == []


def test_a_run_of_0_1_is_read_and_reported_and_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unpacked(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run"]) == 0 and (run / "report.html").stat().st_size > 100_000
    for name in ("data/source-train.beton", "votes/vote-lm-small.npz", "surrogate", "subsets/lm@0.5-small.npz"):
        assert main(["info", f"run/{name}"]) == 0
    source = open_beton(run / "data/source-train.beton")
    assert source.num_samples == 24 and load_votes(run / "votes/vote-lm-small.npz").votes.sum() == 12
    assert len(load_subset(run / "subsets/lm@0.5-small.npz", beton=source).indices) == 12
    assert load_model(run / "surrogate")[1]["complete"]
    (run / "report.html").unlink()
    before = snapshot(run) | {"config.json": (run / "config.json").read_bytes()}
    capsys.readouterr()
    for more in (["--set", "seeds=[7]"], ["--dry-run"]):
        assert main(["run", "--config", "run/config.json", "--out", "run", *more]) == 2
        told = capsys.readouterr().err
        assert "is a run of dp4tl 0.1" in told and len(told.splitlines()) == 1
    assert snapshot(run) | {"config.json": (run / "config.json").read_bytes()} == before
