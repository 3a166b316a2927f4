"""Numbers from unfinished trainings, and results that were changed, are marked wherever a table shows them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_run import make_run

from dp4tl_dist import table
from dp4tl_dist.files import read_json, write_json
from dp4tl_dist.marks import MARK
from dp4tl_dist.records import output_digest
from dp4tl_dist.report import tables
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.collect import read_run
from dp4tl_dist.report.html import render
from dp4tl_dist.stages import Graph
from dp4tl_dist.sweep_files import as_text
from dp4tl_dist.sweep_table import summarise, tidy

FULL = {"top5": 0.9, "loss": 1.0, "val_top1": 0.5, "epoch": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three arms, whose results have all that a sweep's tables show."""
    out = tmp_path_factory.mktemp("marks") / "run"
    make_run(out, classes=("ant", "bee", "cat", "dog"), arms=("dense", "lm@0.5", "random@0.5"), results=FULL)
    return out


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "run"))


def result_of(out: Path) -> Path:
    return next(path for path in sorted((out / "transfer").glob("*.json")) if "lm@0.5" in path.name)


def edit_result(out: Path) -> None:
    write_json(result_of(out), {**read_json(result_of(out)), "top1": 0.99})


def edit_votes(out: Path) -> None:
    (path,) = (out / "votes").glob("*lm*.npz")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def edit_weights(out: Path) -> None:
    folder = next(path for path in (out / "pretrain").iterdir() if path.name.startswith("lm@0.5"))
    (path,) = folder.glob("checkpoints/*/meta.json")
    write_json(path, {**read_json(path), "digests": {"weights.safetensors": "00"}})


def leave_unfinished(out: Path) -> None:
    """As a transfer with --allow-incomplete writes it, with the record that fits."""
    content = {**read_json(result_of(out)), "unfinished": ["half (step 5)"]}
    write_json(result_of(out), content)
    graph = read_run(out).graph
    stage = next(item for item in graph.stages.values() if item.output == result_of(out))
    record = out / "stages" / f"{stage.name}.json"
    write_json(record, {**read_json(record), "output": output_digest(stage)})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "result": (edit_result, "was changed after it was made"),
    "votes": (edit_votes, "was changed after it was made"),
    "weights": (edit_weights, "was changed after it was made"),
    "unfinished": (leave_unfinished, "made from half (step 5), before its training's end"),
}


def shown_arms(graph: Graph, out: Path, capsys: pytest.CaptureFixture[str], *, page: bool = True) -> dict[str, str]:
    """The text of every table that numbers of this run stand in, and the page, which takes seconds to draw."""
    table.write_table(table.collect(graph), out)
    run = read_run(out)
    rows = tidy(graph)
    capsys.readouterr()
    cells = [cell for row in tables.results(run).rows for cell in row if isinstance(cell, tables.Link)]
    return {
        "results.txt": (out / "results.txt").read_text(),
        "sweep.txt": as_text(summarise(rows), []),
        "results": "\n".join(cell.text for cell in cells),
        "points": "\n".join(str(row[0]) for row in tables.points(run.arms, "lp", name="x").rows),
        "times": "\n".join(str(row[0]) for row in tables.times(run.arms).rows),
        **({"page": render(run)} if page else {}),
    }


@pytest.mark.parametrize("change", CHANGES)
def test_every_table_marks_the_arm(copied: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = CHANGES[change]
    graph = read_run(copied).graph
    before = shown_arms(graph, copied, capsys, page=change == "votes")
    assert not any(MARK in text for text in before.values())
    damage(copied)
    for name, text in shown_arms(graph, copied, capsys).items():
        assert f"lm@0.5 {MARK}" in text, name
        assert f"dense {MARK}" not in text and f"random@0.5 {MARK}" not in text, name
    assert any(words in text for about, text in caveats(read_run(copied)) if "lm@0.5" in about)
    assert words.split("(")[0] in " ".join((copied / "results.txt").read_text().split())
    row = next(row for row in read_json(copied / "results.json") if row["arm"] == "lm@0.5")
    assert any(words in line for line in row["marks"])
    assert any(words in line["marks"] for line in tidy(graph) if line["arm"] == "lm@0.5")


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b'{"status": "done", "seconds": "x"}'], ids=repr)
def test_a_damaged_record_is_told_and_not_fatal(copied: Path, content: bytes) -> None:
    path = next(path for path in sorted((copied / "stages").glob("transfer-*lm@0.5*")))
    path.write_bytes(content)
    run = read_run(copied)
    assert "<html" in render(run)
    try:
        json.loads(content)
    except ValueError:
        assert any(path.name in text for text in run.problems)
        assert run.status(path.stem) == "pending"
    graph = run.graph
    assert len(tidy(graph)) == 5, "the sweep's tables leave that one out"
