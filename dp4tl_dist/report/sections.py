"""What the page's sections say and show: sentences, cards and figures, in the order of the page."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dp4tl_dist.report import charts, tables
from dp4tl_dist.report.collect import Arm, Metrics, Run, mean_std
from dp4tl_dist.report.selection import Selection
from dp4tl_dist.report.tables import Table

CURVES = (
    ("loss", "training loss", 1.0),
    ("val_top1", "validation accuracy, %", 100.0),
    ("val_robust_top1", "validation accuracy under attack, %", 100.0),
    ("lr", "learning rate", 1.0),
    ("resolution", "resolution, px", 1.0),
    ("images_per_s", "images/s", 1.0),
    ("data_wait", "waiting for data, %", 100.0),
)

NBSP = "\N{NO-BREAK SPACE}"
CAPTIONS = {
    "time": "Test accuracy against the time to the pretrained model, the selection's cost included: better is further "
    "up and further left. Bars: one standard deviation over the seeds. Dashed: dense.",
    "ratio": "Mean over the seeds, with a band of one standard deviation and a dot for each seed. Dashed: dense. "
    "Dotted: from dense to the first ratio that was run.",
    "parts": "Wall time of each arm's stages, start-up included; voting includes pruning. Mean over the seeds.",
    "votes": "Source classes by votes, most first. Coloured: kept, the darker the more arms keep it. Grey: pruned. "
    "Dashed: the arms' cuts.",
    "coverage": "Share of the target's votes that the first k classes hold. Dots: the arms' cuts. Dotted: what classes "
    "chosen at random hold on average. The numbers stand with the votes per class.",
    "train": "Validation is on the source, each arm on its own classes: the arms cannot be compared by it.",
    "transfer": "Validation is on the part of the target's training set that was held out.",
}


@dataclass(frozen=True)
class Figure:
    """A chart with its caption, and the table behind it (None where several charts share one)."""

    svg: Markup | None
    """None while there is nothing to draw."""
    title: str
    text: str
    table: Table | None = None
    wide: bool = False
    """As wide as the page, with its table beside it."""


@dataclass(frozen=True)
class Curves:
    """The charts of several trainings, their legend as (name, colour, dash) and the one table behind them."""

    title: str
    legend: list[tuple[str, str, int]]
    figures: list[Figure]
    table: Table


def duration(seconds: float | None) -> str:
    """A span as people read it."""
    if seconds is None:
        return "pending"
    if seconds < 180:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def accuracy(values: list[float]) -> str:
    mean, std = mean_std(values)
    return "pending" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "") + f"{NBSP}%"


def sentences(run: Run) -> Iterator[str]:
    """What the run found, in words: one sentence for each arm that a surrogate chose."""
    missing = []
    for arm in run.arms:
        if arm.method not in ("lm", "fm", "lm-joint", "fm-joint"):
            continue
        for mode, values in arm.accuracy.items():
            if not values:
                missing.append(f"{arm.name} on {arm.target} ({mode})")
                continue
            groups = "clusters" if arm.method.startswith("fm") and run.config.clusters.count else "classes"
            text = f"{arm.name} keeps {100 * arm.keep:g}{NBSP}% of the source {groups} and reaches {accuracy(values)}"
            text += f" on {arm.target}" + (f" ({mode})" if len(arm.accuracy) > 1 else "")
            gaps = []
            for method, what in (("dense", "pretraining on all classes"), ("random", "a random choice of that size")):
                peer = tables.peer(run, arm, method)
                if peer and peer.accuracy[mode]:
                    gap = statistics.fmean(values) - statistics.fmean(peer.accuracy[mode])
                    gaps.append(f"{abs(gap):.2f} points {'above' if gap >= 0 else 'below'} {what}")
            text += ", " + " and ".join(gaps) if gaps else ""
            speed = tables.speed_up(tables.peer(run, arm, "dense"), arm)
            if speed:
                text += (
                    f"; it takes {100 / speed:.0f}{NBSP}% of dense's time ({speed:.2f}×), the selection's cost included"
                )
            yield text + "."
    if missing:
        yield f"Not measured yet: {', '.join(missing)}."


def cards(run: Run, found: list[Selection]) -> list[dict[str, Any]]:
    """What each arm's card says and links to."""
    chosen = {(item.target, item.method) for item in found}
    return [
        {
            "arm": arm,
            "accuracies": {mode: accuracy(values) for mode, values in arm.accuracy.items()},
            "total": duration(arm.total),
            "speed_up": tables.speed_up(tables.peer(run, arm, "dense"), arm),
            "state": state_of(run, arm),
            "selection": (arm.target, method) in chosen and f"kept-{method}-{arm.target}",
            "peers": [peer.name for what in ("dense", "random") if (peer := tables.peer(run, arm, what))],
            "stages": list(dict.fromkeys(name for trial in arm.trials for name in
                                         (*trial.selection, trial.pretrain, *trial.transfers.values()))),
        }
        for arm in run.arms
        for method in [arm.voter]
    ]  # fmt: skip


def state_of(run: Run, arm: Arm) -> str:
    """done, started or pending, over all the arm's stages."""
    names = [name for trial in arm.trials for name in (trial.pretrain, *trial.transfers.values())]
    states = {run.status(name) for name in names}
    return "done" if states == {"done"} else "pending" if states == {"pending"} else "started"


def headline(run: Run) -> Iterator[Figure]:
    """The charts at the top: for each target accuracy against time and ratio, and where the time went."""
    for target in run.config.targets:
        arms = [arm for arm in run.arms if arm.target == target]
        for mode in run.config.transfer.modes:
            title, text = f"{target} ({mode}): accuracy against time", CAPTIONS["time"]
            numbers = tables.points(arms, mode, name=f"time-{target}-{mode}")
            yield Figure(charts.accuracy_against_time(arms, mode, title, text), title, text, numbers)
            title, text = f"{target} ({mode}): accuracy against pruning ratio", CAPTIONS["ratio"]
            numbers = tables.points(arms, mode, name=f"ratio-{target}-{mode}")
            yield Figure(charts.accuracy_against_ratio(arms, mode, title, text), title, text, numbers)
        title, text = f"{target}: where the time went", CAPTIONS["parts"]
        yield Figure(charts.time_bars(arms, title, text), title, text, tables.times(arms), wide=True)


def chosen(found: Selection) -> list[Figure]:
    """Votes and coverage; they share a table."""
    title, text = f"{found.target}: votes per class ({found.method})", CAPTIONS["votes"]
    votes = Figure(charts.votes_per_class(found, title, text), title, text, tables.votes(found))
    title, text = f"{found.target}: votes covered ({found.method})", CAPTIONS["coverage"]
    return [votes, Figure(charts.coverage(found, title, text), title, text)]


def all_curves(run: Run) -> Iterator[Curves]:
    """Pretraining (with the surrogate) and transfer, each with a legend of its own."""
    keeps = sorted({arm.keep for arm in run.arms if arm.method != "dense"}, reverse=True)
    surrogates = [name for name in run.graph.stages if name.startswith("surrogate")]
    styles = {name: ("surrogate", place) for place, name in enumerate(surrogates)}
    for arm in run.arms:
        style = (arm.method if arm.method != "dense" else "ink", keeps.index(arm.keep) if arm.keep in keeps else 0)
        for trial in arm.trials:
            styles |= dict.fromkeys((trial.pretrain, *trial.transfers.values()), style)
    for title, verb in (("Surrogate and pretraining", "train"), ("Transfer", "transfer")):
        mine = {name: rows for name, rows in run.trainings.items() if run.graph.stages[name].argv[0] == verb}
        if not mine:
            continue
        table = tables.curves(f"curves-{verb}", mine)
        lines: list[tuple[str, str, int, Metrics]] = [(name, *styles[name], rows) for name, rows in mine.items()]
        figures = []
        for key, ylabel, scale in CURVES:
            svg = charts.curve(lines, key, ylabel, title=f"{title}: {ylabel}", text=f"{ylabel} by step.", scale=scale)
            figures.append(Figure(svg, ylabel, CAPTIONS[verb] if key == "val_top1" else ""))
        yield Curves(title, [line[:3] for line in lines], [item for item in figures if item.svg], table)
