"""The page as a file: its numbers, what it says of unfinished and damaged runs, and that it needs nothing else."""

import base64
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_run import HOSTILE, make_run
from PIL import Image

from dp4tl_dist import table
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.machine import instructions, processor
from dp4tl_dist.prune.votes_file import Members, load_votes, save_votes
from dp4tl_dist.report import provenance, selection, tables
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.charts import time_unit
from dp4tl_dist.report.collect import read_run, thin
from dp4tl_dist.report.html import render, write_report
from dp4tl_dist.report.sections import sentences
from dp4tl_dist.report.selection import selections
from dp4tl_dist.report.thumbs import THUMB_SIDE, data_uri


def test_one_file_that_needs_nothing(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert len(page) < 5 << 20
    assert not re.findall(r"<(?:link|iframe|object|embed|base|form)\b|@import|url\((?!#)", page)
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "default-src 'none'" in page


def test_the_numbers_are_those_of_the_results(whole: Path) -> None:
    """table.collect, which makes results.json, is written apart from the report."""
    run = read_run(whole)
    expected = {row["arm"]: row for row in table.collect(run.graph)}
    rows = {row[1].text: row for row in tables.results(run).rows if isinstance(row[1], tables.Link)}
    assert rows.keys() == expected.keys()
    heads = [head for head, _ in tables.results(run).columns]
    for arm, row in rows.items():
        shown = dict(zip(heads, row, strict=True))
        for head, key in (("pretraining, s", "pretrain_s"), ("total, s", "total_s"), ("speed-up", "speed_up")):
            assert shown[head] == pytest.approx(expected[arm][key]), (arm, head)
        assert shown["lp top-1, %"] == pytest.approx(expected[arm]["accuracy"]["lp"]["mean"])
        assert shown["std"] == pytest.approx(expected[arm]["accuracy"]["lp"]["std"])
        assert shown["source samples"] == pytest.approx(sum(expected[arm]["samples"]) / 2)


def test_the_sentence(whole: Path) -> None:
    first = next(iter(sentences(read_run(whole), "pets"))).replace("\N{NO-BREAK SPACE}", " ")
    assert first.startswith(
        "lm@0.5 keeps 50 % of the source classes and reaches 79.50 ± 0.71 % on pets, 1.00 points below pretraining on "
        "all classes and 19.00 points above a random choice of that size; it takes "
    )


def test_every_stage_tells_what_it_was_made_on(whole: Path) -> None:
    shown = {row[0].text: row[5] for row in provenance.stages(read_run(whole)).rows if isinstance(row[0], tables.Link)}
    parts = [processor(), instructions(), f"{os.cpu_count()} cores"]
    assert set(shown.values()) == {", ".join(part for part in parts if part)}
    several = {"processor": "P", "cores": 8, "gpus": ["A", "B", "A"]}
    assert provenance.hardware(several) == "2 x A, 1 x B, P, 8 cores"
    assert provenance.hardware(None) is None


def test_hostile_names_are_text(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "<script>document" not in page
    assert "<img src=x" not in page
    assert "<b>bad</b>" not in page
    assert "<b>bold" not in page
    assert "&lt;script&gt;document.title" in page
    assert "{{ 7 * 7 }}" in page


def test_selection(whole: Path) -> None:
    (found,) = selections(read_run(whole))
    votes = found.votes[found.ranking].tolist()
    assert votes == sorted(votes, reverse=True)
    assert [(cut.arm, cut.count, cut.reverse) for cut in found.cuts] == [
        ("lm@0.5", 4, False), ("lm@0.25", 2, False), ("lm-reverse@0.25", 2, True)
    ]  # fmt: skip
    assert [item.name for item in found.top_kept] == [found.classes[i] for i in found.ranking[:2]]
    assert [item.name for item in found.top_pruned] == [found.classes[i] for i in found.ranking[2:]]
    first = found.affinities[0]
    assert first.name == HOSTILE[0]
    assert {name: count for name, count, _ in first.voted} == {HOSTILE[0]: 3, HOSTILE[1]: 3}
    assert len(first.pairs) == 2


@pytest.mark.parametrize("stop_at", ["surrogate", "vote-lm-pets", "transfer-lp-lm@0.5-pets-s0"])
def test_while_a_run_is_going_on(tmp_path: Path, stop_at: str) -> None:
    make_run(tmp_path, stop_at=stop_at)
    run = read_run(tmp_path)
    page = render(run)
    assert run.problems == []
    assert run.status(stop_at) == "started"
    assert ", 1 started, " in page
    assert "ending" in page
    if stop_at == "transfer-lp-lm@0.5-pets-s0":
        assert "80.00" in page
        assert "Not measured yet: lm@0.5 on pets (lp)" in page


def test_before_the_first_stage(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    total = len(read_run(whole).graph.stages)
    assert f"0 of {total} stages done, {total} pending" in page.replace("\n", " ")


def test_damaged_files_are_named_and_left_out(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damaged = ["votes/vote-lm-pets.npz", "subsets/lm@0.5-pets.npz", "data/pets-test.beton", "surrogate/metrics.jsonl",
               "stages/pretrain-dense-s0.json", "transfer/lp-dense-pets-s1.json"]  # fmt: skip
    for name in damaged:
        path = tmp_path / name
        path.write_bytes(b"\xff{" + path.read_bytes()[2 : path.stat().st_size // 2] + b"\n")
    path = write_report(tmp_path)
    for name in damaged:
        assert name.rpartition("/")[2] in path.read_text(), name


def test_caveats(whole: Path) -> None:
    said = list(caveats(read_run(whole)))
    assert ("source", "unreadable images left out: 1") in said
    assert ("source", "<b>bad</b>.jpg: not an image") in said
    assert ("surrogate", "was cut off and continued 1 time") in said
    assert ("surrogate", "warning: of surrogate") not in said
    assert ("surrogate", "of surrogate") in said
    assert any(where == "surrogate" and "waited for data 50 %" in what for where, what in said)


def test_two_modes_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path, modes=("lp", "ff"))
    page = render(read_run(tmp_path))
    assert "pets (ff): accuracy against time" in page
    assert "on pets (lp)" in page


@pytest.mark.parametrize("path", [".", "nowhere"])
def test_what_is_no_run(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_clusters_show_the_samples_nearest_to_their_centres(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make_run(out)
    path, source = out / "votes" / "vote-lm-pets.npz", open_beton(out / "data" / "source-train.beton")
    cast = load_votes(path)
    nearest = np.full((len(cast.classes), 6), -1)
    nearest[:, :2] = np.arange(2 * len(cast.classes)).reshape(-1, 2)[::-1]
    assignment = (np.arange(source.num_samples) % len(cast.classes)).astype(np.int32)
    save_votes(path, replace(cast, members=Members(assignment, nearest)))
    (found,) = selections(read_run(out))
    assert found.what == "clusters"
    for item in found.top_kept:
        expected = [data_uri(source, int(index)) for index in nearest[found.classes.index(item.name)][:2]]
        assert [thumb.uri for thumb in item.thumbs] == expected
    assert "Kept: the clusters with the most votes" in render(read_run(out))


def test_thumbnails(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beton = open_beton(whole / "data" / "source-train.beton")
    for index in range(3):
        kept = base64.b64decode(data_uri(beton, index).partition(",")[2])
        image = Image.open(io.BytesIO(kept))
        assert image.format == "JPEG"
        assert max(image.size) <= THUMB_SIDE
        assert (kept == beton.payload(index)) == (index == 0)
    monkeypatch.setattr(selection, "ALL_THUMBS_BYTES", 20000)
    (found,) = selections(read_run(whole))
    count = sum(len(item.thumbs) for item in (*found.top_kept, *found.top_pruned))
    assert 0 < count < 18


def test_small_helpers() -> None:
    assert thin(list(range(1000)), 3) == [0, 500, 999]
    assert thin([1, 2], 3) == [1, 2]
    assert [time_unit(seconds)[1] for seconds in (10, 1000, 10000)] == ["seconds", "minutes", "hours"]
