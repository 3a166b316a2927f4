"""What the page's sections say and show: sentences, cards and figures, in the order of the page."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dp4tl_dist.arm_name import INFLUENCE
from dp4tl_dist.report import chart_votes, charts, tables
from dp4tl_dist.report.brute_force import Force
from dp4tl_dist.report.collect import ROBUST, Arm, Metrics, Run, mean_std, spoken
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

TOLD = ("lm", "fm", "lm-joint", "fm-joint")
"""The methods that get a sentence each."""
MANY_SENTENCES, MANY_LINES = 4, 100
NBSP = "\N{NO-BREAK SPACE}"
CAPTIONS = {
    "time": "Test accuracy against the time to the pretrained model, the selection's cost included: better is further "
    "up and further left. Bars: one standard deviation over the seeds. Dashed: dense.",
    "ratio": "Mean over the seeds, with a band of one standard deviation and a dot for each seed. Dashed: dense. "
    "Dotted: from dense to the first ratio that was run.",
    "parts": "Wall time of each arm's stages, start-up included; voting includes pruning. Mean over the seeds.",
    "votes": "Source classes by votes, most first. Coloured: kept, the darker the more arms keep it. Grey: pruned. "
    "Dashed: the arms' cuts.",
    "coverage": "Share of the target's votes that the first k classes hold. Dots: the arms' cuts. Ring: the size that "
    "votes suggest. Dotted: what classes chosen at random hold on average. The numbers stand with the votes per class.",
    "influence": "Accuracy of small models trained with a class, less that of those trained without it, with the "
    "standard error as a band. Coloured: kept, the darker the more arms keep it. Grey: pruned.",
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
    """The charts of several trainings and the one table behind them."""

    title: str
    legend: dict[str, tuple[str, int, list[str]]]
    """Of each arm or surrogate: colour, dash, and the stages that are drawn so."""
    figures: list[Figure]
    table: Table


def duration(seconds: float) -> str:
    """A span as people read it."""
    if seconds < 180:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def accuracy(values: list[float]) -> str:
    """Mean and spread as people read them."""
    mean, std = mean_std(values)
    return "pending" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "") + f"{NBSP}%"


def in_words(run: Run) -> tuple[list[str], list[str]]:
    """What the run found, as sentences: those that lead, and where there are many the others apart.

    Leading is each target's first arm in the config's order, whatever it reached: the best would be the luckiest.
    """
    each = {target: list(sentences(run, target)) for target in run.config.targets}
    if sum(map(len, each.values())) <= MANY_SENTENCES:
        lead, more = [text for found in each.values() for text in found], []
    else:
        lead = [text for found in each.values() for text in found[:1]]
        more = [text for found in each.values() for text in found[1:]]
    missing = [f"{arm.name} on {arm.target} ({mode})" for arm in run.arms if arm.method in TOLD
               for mode in run.config.transfer.modes if not arm.accuracy[mode]]  # fmt: skip
    return [*lead, *([f"Not measured yet: {', '.join(missing)}."] if missing else [])], more


def sentences(run: Run, target: str) -> Iterator[str]:
    """One for each arm on a target that a surrogate chose, and that is measured."""
    for arm in (arm for arm in run.arms if arm.target == target):
        if arm.method not in TOLD:
            continue
        for mode in run.config.transfer.modes:
            values = arm.accuracy[mode]
            if not values:
                continue
            groups = "clusters" if arm.method.startswith("fm") and run.config.clusters.count else "classes"
            text = f"{arm.shown} keeps {100 * arm.keep:g}{NBSP}% of the source {groups} and reaches {accuracy(values)}"
            text += f" on {arm.target}" + (f" ({mode})" if len(run.config.transfer.modes) > 1 else "")
            under = arm.accuracy.get(mode + ROBUST)
            text += f" ({accuracy(under)} under attack)" if under else ""
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


def cards(run: Run, found: list[Selection], forced: list[Force]) -> dict[str, list[dict[str, Any]]]:
    """What each arm's card says and links to, by target."""
    chosen = {(item.target, item.method) for item in found} | {(item.target, INFLUENCE) for item in forced}
    made: dict[str, list[dict[str, Any]]] = {target: [] for target in run.config.targets}
    for arm in run.arms:
        made[arm.target].append({
            "arm": arm,
            "accuracies": [(spoken(measure), *mean_std(values)) for measure, values in arm.accuracy.items()],
            "total": duration(arm.total) if arm.total is not None else "",
            "speed_up": tables.speed_up(tables.peer(run, arm, "dense"), arm),
            "state": state_of(run, arm),
            "selection": (arm.target, arm.voter) in chosen and f"kept-{arm.voter}-{arm.target}",
            "peers": [peer.name for what in ("dense", "random") if (peer := tables.peer(run, arm, what))],
            "stages": list(dict.fromkeys(name for trial in arm.trials for name in
                                         (*trial.selection, trial.pretrain, *trial.transfers.values()))),
        })  # fmt: skip
    return made


def state_of(run: Run, arm: Arm) -> str:
    """One of STATES, over all the arm's stages; a selection that is not done counts where it cannot be."""
    names = [name for trial in arm.trials for name in (trial.pretrain, *trial.transfers.values())]
    states = {run.status(name) for name in names}
    chosen = {run.status(name) for trial in arm.trials for name in trial.selection}
    for state in ("failed", "stopped"):
        if state in states | chosen:
            return state
    return "done" if states == {"done"} else "pending" if states == {"pending"} else "started"


def headline(run: Run) -> Iterator[Figure]:
    """The charts at the top: for each target accuracy against time and ratio, and where the time went."""
    for target in run.config.targets:
        arms = [arm for arm in run.arms if arm.target == target]
        for mode in run.measures:
            title, text = f"{target} ({spoken(mode)}): accuracy against time", CAPTIONS["time"]
            numbers = tables.points(arms, mode, name=f"time-{target}-{mode}")
            yield Figure(charts.accuracy_against_time(arms, mode, title, text), title, text, numbers)
            title, text = f"{target} ({spoken(mode)}): accuracy against pruning ratio", CAPTIONS["ratio"]
            numbers = tables.points(arms, mode, name=f"ratio-{target}-{mode}")
            yield Figure(charts.accuracy_against_ratio(arms, mode, title, text), title, text, numbers)
        title, text = f"{target}: where the time went", CAPTIONS["parts"]
        yield Figure(charts.time_bars(arms, title, text), title, text, tables.times(arms), wide=True)


def chosen(found: Selection, limit: int) -> list[Figure]:
    """Votes and coverage; they share a table, of at most `limit` rows."""
    title, text = f"{found.target}: votes per class ({found.method})", CAPTIONS["votes"]
    votes = Figure(chart_votes.votes_per_class(found, title, text), title, text, tables.votes(found, limit))
    title, text = f"{found.target}: votes covered ({found.method})", CAPTIONS["coverage"]
    return [votes, Figure(chart_votes.coverage(found, title, text), title, text)]


def forced(found: Force, limit: int) -> Figure:
    """What brute force says of each class."""
    title, text = f"{found.target}: influence of each class", CAPTIONS["influence"]
    svg = chart_votes.influence_per_class(found, title, text)
    return Figure(svg, title, text, tables.influence(found, limit), wide=True)


def all_curves(run: Run) -> Iterator[Curves]:
    """Pretraining (with the surrogate) and transfer, each with a legend of its own."""
    keeps = sorted({arm.keep for arm in run.arms if arm.method != "dense"}, reverse=True)
    surrogates = [name for name in run.graph.stages if name.startswith("surrogate")]
    styles = {name: (name, "surrogate", place) for place, name in enumerate(surrogates)}
    for arm in run.arms:
        style = (
            arm.name,
            arm.method if arm.method != "dense" else "ink",
            keeps.index(arm.keep) if arm.keep in keeps else 0,
        )
        for trial in arm.trials:
            styles |= dict.fromkeys((trial.pretrain, *trial.transfers.values()), style)
    for title, verb in (("Surrogate and pretraining", "train"), ("Transfer", "transfer")):
        mine = {name: rows for name, rows in run.trainings.items() if run.graph.stages[name].argv[0] == verb}
        if not mine:
            continue
        if len(mine) > MANY_LINES:
            others = {name for trial in run.graph.trials if trial.seed != run.config.seeds[0]
                      for name in (trial.pretrain, *trial.transfers.values())}  # fmt: skip
            mine = {name: rows for name, rows in mine.items() if name not in others}
            title += f", seed {run.config.seeds[0]}"
        table = tables.curves(f"curves-{verb}", mine)
        lines: list[tuple[str, str, int, Metrics]] = [(name, *styles[name][1:], rows) for name, rows in mine.items()]
        legend: dict[str, tuple[str, int, list[str]]] = {}
        for stage in mine:
            name, colour, dash = styles[stage]
            legend.setdefault(name, (colour, dash, []))[2].append(stage)
        figures = []
        for key, ylabel, scale in CURVES:
            svg = charts.curve(lines, key, ylabel, title=f"{title}: {ylabel}", text=f"{ylabel} by step.", scale=scale)
            figures.append(Figure(svg, ylabel, CAPTIONS[verb] if key == "val_top1" else ""))
        yield Curves(title, legend, [item for item in figures if item.svg], table)
