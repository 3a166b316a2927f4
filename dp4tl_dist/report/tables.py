"""The tables of the report, as plain values; the page shows, sorts and exports them all alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dp4tl_dist.arm_name import RANDOM
from dp4tl_dist.report.brute_force import Force
from dp4tl_dist.report.collect import PARTS, ROBUST, Arm, Metrics, Run, mean_std, number, spoken, thin
from dp4tl_dist.report.selection import Selection

MAX_ROWS = 400
LIMIT = 2000
"""Rows of a table that has one for each class, where the page holds few such tables."""
CURVE_KEYS = ("loss", "val_top1", "val_robust_top1", "val_loss", "lr", "resolution", "images_per_s", "data_wait")


class Link(NamedTuple):
    """A cell that leads to another place of the page."""

    text: str
    href: str


Cell = str | float | int | Link | None


@dataclass(frozen=True)
class Table:
    """Column heads with the format of their numbers ("" for text), and rows of cells."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[Cell, ...]]
    left_out: int = 0
    """Rows that are not on the page, which would grow too large."""

    @property
    def total(self) -> int:
        return len(self.rows) + self.left_out

    def shown(self, cell: Cell, column: int) -> str:
        """What a reader sees of a cell."""
        if cell is None:
            return "–"
        if isinstance(cell, Link):
            return cell.text
        return format(cell, self.columns[column][1]) if isinstance(cell, int | float) else cell

    def value(self, cell: Cell) -> str:
        """What sorting and CSV go by: the number itself, in full."""
        return "" if cell is None else cell.text if isinstance(cell, Link) else str(cell)


def results(run: Run) -> Table:
    """The headline's numbers: one row for each arm and target."""
    rows: list[tuple[Cell, ...]] = []
    for arm in run.arms:
        dense, random = peer(run, arm, "dense"), peer(run, arm, "random")
        cells: list[Cell] = [arm.target, Link(arm.shown, f"#arm-{arm.target}-{arm.name}"), arm.samples,
                             arm.seconds["pretraining"], arm.total, speed_up(dense, arm), 1 / arm.keep]  # fmt: skip
        for measure, values in arm.accuracy.items():
            mean, std = mean_std(values)
            beside = [mean_std(other.accuracy[measure])[0] if other else None for other in (dense, random)]
            cells += [] if measure.endswith(ROBUST) else [f"{len(values)} of {len(arm.trials)}"]
            cells += [mean, std]
            cells += [None if mean is None or other is None else mean - other for other in beside]
        rows.append(tuple(cells))
    columns = [("target", ""), ("arm", ""), ("source samples", ".0f"), ("pretraining, s", ".1f"), ("total, s", ".1f"),
               ("speed-up", ".2f"), ("limit", ".2f")]  # fmt: skip
    for measure in run.measures:
        columns += [] if measure.endswith(ROBUST) else [(f"{measure} seeds", "")]
        columns += [(f"{spoken(measure)} top-1, %", ".2f"), ("std", ".2f"), ("to dense", "+.2f"), ("to random", "+.2f")]
    return Table("results", tuple(columns), rows)


def peer(run: Run, arm: Arm, method: str) -> Arm | None:
    """The dense arm, or the random arm of the same size, on the same target; never the arm itself."""
    methods = tuple(RANDOM) if method == "random" else (method,)
    found = [other for other in run.arms if other.target == arm.target and other.method in methods]
    steps = arm.name.endswith("+steps")
    same = [other for other in found if method == "dense" or other.keep == arm.keep]
    same.sort(key=lambda other: method != "dense" and other.name.endswith("+steps") != steps)
    return next((other for other in same if other is not arm), None)


def speed_up(dense: Arm | None, arm: Arm) -> float | None:
    """How many times faster than dense, the selection's cost included."""
    if arm.method == "dense":
        return 1.0 if arm.total else None
    return dense.total / arm.total if dense and dense.total and arm.total else None


def points(arms: Sequence[Arm], mode: str, *, name: str) -> Table:
    """What the charts of accuracy draw: one row for each arm, and what each seed measured."""
    seeds = sorted({trial.seed for arm in arms for trial in arm.trials})
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        each = "; ".join(f"{value:.2f}" for value in arm.accuracy[mode])
        rows.append((arm.shown, arm.ratio, arm.total, *mean_std(arm.accuracy[mode]), each))
    heads = (("arm", ""), ("pruned, %", ".0f"), ("total, s", ".1f"), ("mean, %", ".2f"), ("std", ".2f"))
    return Table(name, (*heads, (f"each of {len(seeds)} seeds", "")), rows)


def times(arms: Sequence[Arm]) -> Table:
    rows: list[tuple[Cell, ...]] = [(arm.shown, *(arm.seconds[part] for part in PARTS), arm.total) for arm in arms]
    heads = [("arm", ""), *((f"{part}, s", ".1f") for part in PARTS), ("total, s", ".1f")]
    return Table(f"times-{arms[0].target}", tuple(heads), rows)


def cut_off(rows: list[tuple[Cell, ...]], limit: int) -> tuple[list[tuple[Cell, ...]], int]:
    """The first `limit` rows, and how many more there are."""
    return rows[:limit], max(0, len(rows) - limit)


def votes(found: Selection, limit: int = LIMIT) -> Table:
    """Every class by rank, with its votes, what it and those before it come to, and which arms keep it."""
    reached, samples, rows = 0, 0, []
    for rank, i in enumerate(found.ranking.tolist()):
        reached += int(found.votes[i])
        samples += 0 if found.sizes is None else int(found.sizes[i])
        by = ["kept" if row[i] else "pruned" for row in found.kept]
        rows.append((rank + 1, found.classes[i], int(found.votes[i]), 100 * reached / max(1, found.votes.sum()),
                     None if found.sizes is None else samples, *by))  # fmt: skip
    heads = (("rank", "d"), ("source class", ""), ("votes", "d"), ("covered, %", ".1f"), ("samples up to it", "d"))
    return Table(
        f"votes-{found.method}-{found.target}", (*heads, *((cut.arm, "") for cut in found.cuts)), *cut_off(rows, limit)
    )


def influence(found: Force, limit: int = LIMIT) -> Table:
    """Every class by what it does for the target, and which arms keep it."""
    rows: list[tuple[Cell, ...]] = [
        (rank + 1, found.classes[i], 100 * float(found.influence[i]), 100 * float(found.stderr[i]),
         *("kept" if row[i] else "pruned" for row in found.kept))
        for rank, i in enumerate(found.ranking.tolist())
    ]  # fmt: skip
    heads = (("rank", "d"), ("source class", ""), ("influence, points", "+.2f"), ("std. error", ".2f"))
    return Table(f"influence-{found.target}", (*heads, *((arm.name, "") for arm in found.arms)), *cut_off(rows, limit))


def agreed(found: Force) -> Table:
    """How far each ranking by votes is brute force's: over all classes, and among the first ones."""
    tops = [item["k"] for item in found.agreement[0][1]["top"]] if found.agreement else []
    rows: list[tuple[Cell, ...]] = [
        (
            Link(method, f"#kept-{method}-{found.target}"),
            item["spearman"],
            *(100 * float(top["overlap"]) for top in item["top"]),
        )
        for method, item in found.agreement
    ]
    chance = [100 * k / len(found.classes) for k in tops]
    heads = (("votes by", ""), ("Spearman", "+.2f"), *((f"of the first {k}, %", ".0f") for k in tops))
    return Table(f"agreement-{found.target}", heads, [*rows, ("chance", 0.0, *chance)] if rows else [])


def affinities(found: Selection, limit: int = LIMIT) -> Table:
    """One row for each target class and source class that its images voted for."""
    rows: list[tuple[Cell, ...]] = [
        (item.name, item.images, name, count, 100 * count / max(1, item.images), "kept" if kept else "pruned")
        for item in found.affinities
        for name, count, kept in item.voted
    ]
    heads = (("target class", ""), ("images", "d"), ("voted for", ""), ("votes", "d"), ("share, %", ".1f"))
    return Table(f"voted-{found.method}-{found.target}", (*heads, ("smallest arm", "")), *cut_off(rows, limit))


def curves(name: str, trainings: dict[str, Metrics]) -> Table:
    """The epochs of all trainings, thinned; where no epoch has ended yet, the steps."""
    keys = CURVE_KEYS
    rows: list[tuple[Cell, ...]] = []
    share = max(2, MAX_ROWS // max(1, len(trainings)))
    for stage, lines in trainings.items():
        latest: dict[str, object] = {}
        ended: list[tuple[Cell, ...]] = []
        for line in lines:
            latest = {**latest, **line}
            if line.get("kind") == "epoch" or not any(item.get("kind") == "epoch" for item in lines):
                values = [number(latest.get(key)) for key in keys]
                step = line.get("step")
                ended.append((stage, step if isinstance(step, int) else None, *values))
                latest = {key: value for key, value in latest.items() if not key.startswith("val_")}
        rows += thin(ended, share)
    forms = (".4f", ".4f", ".4f", ".4f", ".5f", "d", ".0f", ".3f")
    return Table(name, (("stage", ""), ("step", "d"), *zip(keys, forms, strict=True)), rows)
