"""The tables of the report, as plain values; the page shows, sorts and exports them all alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dp4tl_dist.arm_name import RANDOM
from dp4tl_dist.report.collect import PARTS, Arm, Metrics, Run, mean_std, thin
from dp4tl_dist.report.selection import Selection

MAX_ROWS = 400
CURVE_KEYS = ("loss", "val_top1", "val_loss", "lr", "resolution", "images_per_s", "data_wait")


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


def anchor(stage: str) -> str:
    """The id of a stage's row on the page."""
    return f"stage-{stage}"


def short(run: Run, path: Path) -> str:
    """A path as seen from the run folder, where it lies inside."""
    return str(path.relative_to(run.out) if path.is_relative_to(run.out) else path)


def results(run: Run) -> Table:
    """The headline's numbers: one row for each arm and target."""
    modes = run.config.transfer.modes
    rows: list[tuple[Cell, ...]] = []
    for arm in run.arms:
        dense, random = peer(run, arm, "dense"), peer(run, arm, "random")
        cells: list[Cell] = [arm.target, Link(arm.name, f"#arm-{arm.target}-{arm.name}"), arm.samples,
                             arm.seconds["pretraining"], arm.total, speed_up(dense, arm), 1 / arm.keep]  # fmt: skip
        for mode in modes:
            mean, std = mean_std(arm.accuracy[mode])
            beside = [mean_std(other.accuracy[mode])[0] if other else None for other in (dense, random)]
            cells += [f"{len(arm.accuracy[mode])} of {len(arm.trials)}", mean, std]
            cells += [None if mean is None or other is None else mean - other for other in beside]
        rows.append(tuple(cells))
    columns = [("target", ""), ("arm", ""), ("source samples", ".0f"), ("pretraining, s", ".1f"), ("total, s", ".1f"),
               ("speed-up", ".2f"), ("limit", ".2f")]  # fmt: skip
    for mode in modes:
        columns += [(f"{mode} seeds", ""), (f"{mode} top-1, %", ".2f"), ("std", ".2f"), ("to dense", "+.2f"),
                    ("to random", "+.2f")]  # fmt: skip
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
        rows.append((arm.name, arm.ratio, arm.total, *mean_std(arm.accuracy[mode]), each))
    heads = (("arm", ""), ("pruned, %", ".0f"), ("total, s", ".1f"), ("mean, %", ".2f"), ("std", ".2f"))
    return Table(name, (*heads, (f"each of {len(seeds)} seeds", "")), rows)


def times(arms: Sequence[Arm]) -> Table:
    rows: list[tuple[Cell, ...]] = [(arm.name, *(arm.seconds[part] for part in PARTS), arm.total) for arm in arms]
    heads = [("arm", ""), *((f"{part}, s", ".1f") for part in PARTS), ("total, s", ".1f")]
    return Table(f"times-{arms[0].target}", tuple(heads), rows)


def votes(found: Selection) -> Table:
    """Every class by rank, with its votes, and which arms keep it."""
    reached, rows = 0, []
    for rank, i in enumerate(found.ranking.tolist()):
        reached += int(found.votes[i])
        by = ["kept" if row[i] else "pruned" for row in found.kept]
        rows.append((rank + 1, found.classes[i], int(found.votes[i]), 100 * reached / max(1, found.votes.sum()), *by))
    heads = (("rank", "d"), ("source class", ""), ("votes", "d"), ("covered, %", ".1f"))
    return Table(f"votes-{found.method}-{found.target}", (*heads, *((cut.arm, "") for cut in found.cuts)), rows)


def affinities(found: Selection) -> Table:
    """One row for each target class and source class that its images voted for."""
    rows: list[tuple[Cell, ...]] = [
        (item.name, item.images, name, count, 100 * count / max(1, item.images), "kept" if kept else "pruned")
        for item in found.affinities
        for name, count, kept in item.voted
    ]
    heads = (("target class", ""), ("images", "d"), ("voted for", ""), ("votes", "d"), ("share, %", ".1f"))
    return Table(f"voted-{found.method}-{found.target}", (*heads, ("smallest arm", "")), rows)


def curves(name: str, trainings: dict[str, Metrics]) -> Table:
    """The epochs of all trainings, thinned; where no epoch has ended yet, the steps."""
    keys = CURVE_KEYS
    rows: list[tuple[Cell, ...]] = []
    share = max(4, MAX_ROWS // max(1, len(trainings)))
    for stage, lines in trainings.items():
        latest: dict[str, object] = {}
        ended: list[tuple[Cell, ...]] = []
        for line in lines:
            latest = {**latest, **line}
            if line.get("kind") == "epoch" or not any(item.get("kind") == "epoch" for item in lines):
                values = [value if isinstance(value := latest.get(key), int | float) else None for key in keys]
                step = line.get("step")
                ended.append((stage, step if isinstance(step, int) else None, *values))
                latest = {key: value for key, value in latest.items() if not key.startswith("val_")}
        rows += thin(ended, share)
    forms = (".4f", ".4f", ".4f", ".5f", "d", ".0f", ".3f")
    return Table(name, (("stage", ""), ("step", "d"), *zip(keys, forms, strict=True)), rows)


def stages(run: Run) -> Table:
    """Every stage with its state, in the order of the run."""
    rows: list[tuple[Cell, ...]] = []
    for name, stage in run.graph.stages.items():
        ranks = run.records[name].get("nproc")
        restarts = run.metas[name].get("restarts")
        rows.append((Link(name, f"#{anchor(name)}"), run.status(name), run.seconds(name),
                     ranks if isinstance(ranks, int) else None,
                     restarts if isinstance(restarts, int) else None,
                     hardware(run.metas[name].get("hardware")), short(run, stage.output)))  # fmt: skip
    heads = (("stage", ""), ("state", ""), ("seconds", ".1f"), ("ranks", "d"), ("restarts", "d"), ("made on", ""))
    return Table("stages", (*heads, ("output", "")), rows)


def hardware(found: object) -> str | None:
    """A meta's hardware as people say it; None where it tells none."""
    if not isinstance(found, dict):
        return None
    listed = found.get("gpus")
    gpus = [str(name) for name in listed] if isinstance(listed, list) else []
    counts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join([*counts, str(found.get("processor")), f"{found.get('cores')} cores"])


def datasets(run: Run) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            beton.num_samples,
            beton.num_classes,
            int(beton.sizes.sum()) / 2**20,
            beton.fingerprint,
            short(run, beton.path),
        )
        for name, beton in run.betons.items()
    ]
    heads = (("dataset", ""), ("samples", "d"), ("classes", "d"), ("images, MiB", ".1f"), ("fingerprint", ""))
    return Table("datasets", (*heads, ("file", "")), rows)


def fingerprints(run: Run) -> Table:
    """What each model, votes file, subset and result was made from, by the digests that they carry."""
    rows: list[tuple[Cell, ...]] = []
    for name, stage in run.graph.stages.items():
        record, meta = run.records[name], run.metas[name]
        inputs = meta.get("inputs")
        made = str(record.get("output", ""))
        if made:
            given = ", ".join(f"{what} {digest}" for what, digest in inputs.items()) if isinstance(inputs, dict) else ""
            rows.append(
                (Link(name, f"#{anchor(name)}"), str(meta.get("version") or ""), made, given, stage.output.name)
            )
    heads = (("stage", ""), ("version", ""), ("output's digest", ""), ("inputs", ""), ("output", ""))
    return Table("fingerprints", heads, rows)
