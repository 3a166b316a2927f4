"""A run with everything: several targets and seeds, attacks, brute force, a sweep's tables, and faults."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_run import HOSTILE
from matplotlib.axes import Axes

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.files import read_json, write_json
from dp4tl_dist.prune.votes_file import load_votes, save_votes
from dp4tl_dist.report import chart_votes, collect, html, sections, tables
from dp4tl_dist.report.brute_force import forces
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.collect import STATES, read_run
from dp4tl_dist.report.html import render
from dp4tl_dist.report.placing import Box, place
from dp4tl_dist.report.sections import in_words
from dp4tl_dist.report.selection import selections
from dp4tl_dist.report.thumbs import data_uri


def columns(table: tables.Table) -> list[str]:
    return [head for head, _ in table.columns]


def page_of(run: Path) -> str:
    """The report that was written when the run was made."""
    return (run / "report.html").read_text()


def test_accuracy_under_attack(rich: Path) -> None:
    run = read_run(rich)
    table = tables.results(run)
    assert columns(table).count("std") == 2 and columns(table).count("lp seeds") == 1
    place_of = columns(table).index("lp under attack top-1, %")
    dense = next(row for row in table.rows if row[0] == "birds" and row[1] == ("dense", "#arm-birds-dense"))
    assert dense[place_of] == pytest.approx(40.25)
    page = page_of(rich)
    assert "birds (lp under attack): accuracy against pruning ratio" in page
    assert re.search(r"40\.25.%\s*<small>± 0\.35 lp under attack", page)


def test_targets_apart(rich: Path) -> None:
    run = read_run(rich)
    page = page_of(rich)
    assert page.count("<h3>On pets</h3>") == page.count("<h3>On birds</h3>") == 1
    assert page.index('id="arm-birds-random@0.5"') < page.index("<h3>On pets</h3>") < page.index('id="arm-pets-dense"')
    lead, more = in_words(run)
    assert [text.startswith("lm@0.5 keeps") for text in lead] == [True, True]
    assert "on birds (" in lead[0] and "on pets (" in lead[1] and len(more) == 6


def test_size_that_the_votes_suggest(rich: Path) -> None:
    run = read_run(rich)
    found = next(selections(run))
    assert 0 < found.suggestion.count <= len(found.classes)
    assert f"The votes suggest to keep {found.suggestion.count}: " in page_of(rich)
    table = tables.votes(found)
    assert [row[4] for row in table.rows] == [6 * (i + 1) for i in range(len(HOSTILE))]
    assert table.total == len(HOSTILE)
    assert tables.votes(found, 3).total == len(HOSTILE) and len(tables.votes(found, 3).rows) == 3


def test_brute_force(rich: Path) -> None:
    run = read_run(rich)
    found = list(forces(run, list(selections(run))))
    assert [item.target for item in found] == ["birds", "pets"]
    assert found[0].helpful[0].name == HOSTILE[-1] and found[0].harmful[0].name == HOSTILE[0]
    assert found[0].helpful[0].note == "+5.00 ± 1.00 points" and len(found[0].helpful[0].thumbs) == 3
    table = tables.influence(found[0])
    assert columns(table)[-1] == "influence@0.5"
    assert [row[-1] for row in table.rows] == ["kept"] * 4 + ["pruned"] * 4
    agreed = tables.agreed(found[0])
    assert [row[0] for row in agreed.rows] == [("lm", "#kept-lm-birds"), ("fm", "#kept-fm-birds"), "chance"]
    assert agreed.rows[0][1] == found[0].agreement[0][1]["spearman"]
    page = page_of(rich)
    assert 'id="kept-influence-birds"' in page and "6 small models" in page


def test_fm_shows_the_images_nearest_to_the_means(copy_of_rich: Path) -> None:
    path, source = copy_of_rich / "votes" / "vote-fm-pets.npz", open_beton(copy_of_rich / "data/source-train.beton")
    last = np.stack([np.flatnonzero(source.labels == label)[::-1] for label in range(source.num_classes)])
    save_votes(path, replace(load_votes(path), closest=last))
    found = {(item.method, item.target): item for item in selections(read_run(copy_of_rich))}
    near, plain = found["fm", "pets"], found["lm", "pets"]
    assert "nearest to the mean" in near.shown and "begins with" in plain.shown
    for item in near.top_kept:
        expected = [data_uri(source, int(i)) for i in last[near.classes.index(item.name)][:3]]
        assert [thumb.uri for thumb in item.thumbs] == expected
    left, right = near.affinities[0].pairs[0]
    assert right.uri == data_uri(source, int(last[near.classes.index(near.affinities[0].voted[0][0])][0]))
    assert left.caption == near.affinities[0].name


def test_a_damaged_influence_file_is_named(copy_of_rich: Path) -> None:
    path = copy_of_rich / "influence" / "influence-pets.npz"
    path.write_bytes(path.read_bytes()[:100])
    run = read_run(copy_of_rich)
    assert [item.target for item in forces(run, [])] == ["birds"]
    assert any("influence-pets.npz" in text for text in run.problems)


def test_the_tables_of_a_sweep(copy_of_rich: Path) -> None:
    row = {"target": "<b>t</b>", "arm": "lm@0.5", "mode": "lp", "n": 2, "mean": 49.625, "to_random": 8.4, "pairs": 2}
    odd = {"target": 3, "arm": ["x"], "mean": "high", "n": 1.5, "pairs": True, "std": None}
    write_json(copy_of_rich / "sweep.json", {"summary": [row, odd, "no row"], "surrogates": "none"})
    page = render(read_run(copy_of_rich))
    table = re.search(r'<table data-name="sweep">.*?</table>', page, flags=re.DOTALL)
    assert table and "49.62" in table[0] and "+8.40" in table[0] and "<b>" not in table[0] and "high" not in table[0]
    assert "sweep-surrogates" not in page
    (copy_of_rich / "sweep.json").write_text("{")
    run = read_run(copy_of_rich)
    assert 'data-name="sweep"' not in render(run) and any("sweep.json" in text for text in run.problems)


@pytest.mark.parametrize(
    ("status", "state"), [({"status": "failed"}, "failed"), ({"status": "running"}, "stopped"), ({}, "pending")]
)
def test_faults(copy_of_rich: Path, status: dict[str, str], state: str) -> None:
    name = "pretrain-lm@0.5-pets-s1"
    write_json(copy_of_rich / "stages" / f"{name}.json", {**status, "error": "rank 1: <i>out of memory</i>"})
    run = read_run(copy_of_rich)
    assert run.status(name) == state and state in STATES
    told = (name, f"{state}: rank 1: <i>out of memory</i>") in list(caveats(run))
    assert told == (state != "pending")
    page = render(run)
    assert f", 1 {state}" in page and "<i>out" not in page
    card = page[page.index('id="arm-pets-lm@0.5"') :]
    assert f'<span class="state {state if told else "started"}">' in card[: card.index("</article>")]


def test_images_left_out_of_training_are_told(copy_of_rich: Path) -> None:
    with open(copy_of_rich / "surrogate" / "metrics.jsonl", "a") as lines:
        lines.write(
            '{"kind": "epoch", "step": 40, "bad_samples": 3}\n{"kind": "epoch", "step": 50, "bad_samples": 4}\n'
        )
    what = [text for where, text in caveats(read_run(copy_of_rich)) if where == "surrogate"]
    assert "images that could not be decoded, seen and left out of the loss: 7" in what


def test_the_code_of_each_stage_is_told(copy_of_rich: Path) -> None:
    path = copy_of_rich / "transfer" / "lp-dense-pets-s0.json"
    write_json(path, {**read_json(path), "version": "1.2", "commit": "0123456789abcdef+changes"})
    assert "1.2 0123456789 + changes" in render(read_run(copy_of_rich))


def test_a_run_of_many_stages_stays_small(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page_of(rich)
    monkeypatch.setattr(html, "ALL_ROWS", 24)
    monkeypatch.setattr(tables, "LIMIT", 24)
    monkeypatch.setattr(html, "ALL_CONFIG_BYTES", 3000)
    monkeypatch.setattr(collect, "MANY_STAGES", 42)
    monkeypatch.setattr(sections, "MANY_LINES", 12)
    run = read_run(rich)
    assert run.detail == 0.5
    cut = render(run)
    assert len(cut) < len(whole)
    assert "<h3>Surrogate and pretraining, seed 0</h3>" in cut and "<h3>Transfer, seed 0</h3>" in cut
    assert not re.search(r'data-v="transfer-lp-dense-pets-s1">transfer', cut)
    assert "the first 1 of 8 rows" in cut and "; the others are in the run folder" in cut


def test_one_line_in_the_legend_for_all_seeds(rich: Path) -> None:
    page = page_of(rich)
    legend = page[page.index('<ul class="legend">') :]
    legend = legend[: legend.index("</ul>")]
    assert legend.count("<li>") == 1 + 8  # the surrogate and the arms
    assert re.search(r'#stage-pretrain-lm@0\.5-birds-s0">lm@0\.5</a> <small>4 lines', legend)


def test_names_find_room() -> None:
    crowd = [(0.5 + 0.02 * i, 0.5 + 0.015 * i) for i in range(6)]
    boxes = place([*crowd, (0.99, 0.99)], [(0.2, 0.06)] * 7, 0.03)
    for i, box in enumerate(boxes):
        assert box.outside == pytest.approx(0)
        assert all(box.overlap(other) == 0 for other in boxes[i + 1 :])
    assert boxes[-1].right < 0.99
    assert Box(0, 0, 1, 1).overlap(Box(0.5, 0.5, 2, 2)) == 0.25


def test_thumbnails_are_shared_fairly(rich: Path) -> None:
    """Each target's votes have their part of the page's images: none is left without."""
    found = list(selections(read_run(rich)))
    assert len(found) == 4 and all(item.thumbs for each in found for item in each.top_kept)


def test_votes_for_many_classes_are_drawn_in_steps(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One polygon for each shade, with a corner where votes change: heights are those of the bars."""
    monkeypatch.setattr(chart_votes, "MANY_CLASSES", 3)
    found = next(selections(read_run(rich)))
    drawn: list[tuple[list[int], list[float]]] = []
    monkeypatch.setattr(
        Axes, "stairs", lambda axes, values, edges, **_: drawn.append((values.tolist(), edges.tolist()))
    )
    chart_votes.votes_per_class(found, "title", "text")
    heights = np.zeros(len(found.classes))
    for values, edges in drawn:
        for value, left, right in zip(values, edges[:-1], edges[1:], strict=True):
            heights[round(left - 0.5) : round(right - 0.5)] += value
    assert heights.tolist() == found.votes[found.ranking].tolist()
    assert len(drawn) == 3  # kept by two arms, by one, and by none


@pytest.mark.parametrize("value", [1e308, 10**400, float("nan"), float("inf"), -1, True, "0.5", None, "all"])
def test_numbers_that_cannot_be_are_left_out(copy_of_rich: Path, value: object) -> None:
    wrong = [1e308, 10**400, float("nan"), float("inf"), -1, True, "0.5", None] if value == "all" else [value]
    arms = [arm for arm in read_run(copy_of_rich).arms if arm.target == "pets"]
    for arm, given in zip(arms, wrong, strict=False):  # "all": another one in each of the eight arms
        for seed in (0, 1):
            path = copy_of_rich / "transfer" / f"lp-{arm.name}-pets-s{seed}.json"
            path.write_text(json.dumps({**read_json(path), "top1": given}))
        with open(copy_of_rich / "surrogate" / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps({"kind": "epoch", "step": 40, "loss": given}) + "\n")
    path = copy_of_rich / "stages" / "surrogate.json"
    path.write_text(json.dumps({**read_json(path), "seconds": wrong[-1]}))
    run = read_run(copy_of_rich)
    found = {arm.name: arm for arm in run.arms if arm.target == "pets"}
    assert all(found[arm.name].accuracy["lp"] == [] for arm, _ in zip(arms, wrong, strict=False))
    assert found["lm@0.5"].total is None
    if value == "all":  # drawing takes seconds
        assert "</html>" in render(run)
