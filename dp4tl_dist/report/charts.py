"""The charts: what each one shows and how. `canvas` makes SVG of them."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dp4tl_dist.report.canvas import SMALL, ByMethod, C, canvas
from dp4tl_dist.report.collect import PARTS, Arm, Metrics, mean_std, thin
from dp4tl_dist.report.selection import Selection

MARKERS = ByMethod({
    "dense": "D", "lm": "o", "fm": "s", "random": "X", "random-samples": "P", "lm-reverse": "v", "fm-reverse": "^",
    "random-balanced": "h", "el2n": "<", "grand": ">", "moderate": "p", "herding": "H", "k-centre": "*",
    "retrieval": "d", "forgetting": "8", "cld": "1", "influence": "H",
})  # fmt: skip
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MANY_CLASSES = 80
POINTS = 240


def label(text: str, width: int = 26) -> str:
    """A class name as a chart can show it: one line, cut where it is long."""
    return textwrap.shorten(text, width, placeholder="…") or text[: width - 1] + "…"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit to show up to `seconds` in, as (its seconds, its name)."""
    return (3600.0, "hours") if seconds >= 2 * 3600 else (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")


def accuracy_against_time(arms: Sequence[Arm], mode: str, title: str, text: str) -> Markup | None:
    """A point for each arm at (time to the model, mean accuracy), with its spread; None while none is known."""
    points = [(arm, arm.total, *mean_std(arm.accuracy[mode])) for arm in arms]
    known = [(arm, total, mean, std) for arm, total, mean, std in points if total is not None and mean is not None]
    if not known:
        return None
    unit, name = time_unit(max(total for _, total, _, _ in known))
    with canvas(title, text) as drawn:
        axes = drawn.axes
        axes.set(xlabel=f"{name} to the pretrained model, selection included", ylabel="target accuracy, %")
        for arm, total, mean, std in known:
            colour, x = C[arm.method], total / unit
            if arm.method == "dense":
                axes.axhline(mean, color=colour, linestyle=(0, (4, 3)), linewidth=1.1)
            axes.errorbar([x], [mean], yerr=std, color=colour, capsize=3, linewidth=1.2)
            (dot,) = axes.plot([x], [mean], MARKERS[arm.method], color=colour, markersize=9, mec=C["paper"], mew=1)
            drawn.tip(dot, f"{arm.name}: {mean:.2f} % after {x:.1f} {name}")
        axes.set_xlim(0, 1.12 * max(total for _, total, _, _ in known) / unit)
        axes.margins(y=0.2)
        _name_points(axes, [(arm.name, C[arm.method], total / unit, mean) for arm, total, mean, _ in known])
    return drawn.svg


def _name_points(axes: Axes, points: list[tuple[str, str, float, float]]) -> None:
    """Names beside points, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    step = (high - low) / 13
    taken: list[tuple[bool, float]] = []
    for text, colour, x, y in sorted(points, key=lambda point: -point[3]):
        on_left = x > left + 0.62 * (right - left)
        place = y + 0.55 * step
        while any(side == on_left and abs(place - other) < step for side, other in taken):
            place -= 0.25 * step
        taken.append((on_left, place))
        shift = 0.022 * (right - left) * (-1 if on_left else 1)
        axes.text(x + shift, place, text, color=colour, ha="right" if on_left else "left", va="center", weight="bold")


def accuracy_against_ratio(arms: Sequence[Arm], mode: str, title: str, text: str) -> Markup | None:
    """The trajectory of each method over the pruning ratio, from dense on; None while no pruned arm is measured."""
    measured = [arm for arm in arms if arm.accuracy[mode]]
    dense = next((mean_std(arm.accuracy[mode]) for arm in measured if arm.method == "dense"), None)
    variants = dict.fromkeys((arm.method, arm.options) for arm in measured if arm.method != "dense")
    if not variants:
        return None
    with canvas(title, text) as drawn:
        axes = drawn.axes
        axes.set(xlabel="pruning ratio: source classes dropped, %", ylabel="target accuracy, %")
        if dense and dense[0] is not None:
            axes.axhline(dense[0], color=C["dense"], linestyle=(0, (4, 3)), linewidth=1.1, label="dense")
        for method, options in variants:
            own = sorted((arm for arm in measured if (arm.method, arm.options) == (method, options)),
                         key=lambda arm: arm.ratio)  # fmt: skip
            x = np.array([arm.ratio for arm in own])
            y, spread = (
                np.array([v or 0.0 for v in part])
                for part in zip(*(mean_std(a.accuracy[mode]) for a in own), strict=True)
            )
            colour = C[method]
            if dense and dense[0] is not None:
                axes.plot([0, x[0]], [dense[0], y[0]], color=colour, linewidth=1, linestyle=":")
            axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, y, color=colour, marker=MARKERS[method], markersize=8, mec=C["paper"], label=method + options)
            for arm in own:
                values = arm.accuracy[mode]
                (dots,) = axes.plot([arm.ratio] * len(values), values, ".", color=colour, markersize=4)
                drawn.tip(dots, f"{arm.name}: {', '.join(f'{value:.2f}' for value in values)} %")
        axes.set_xlim(-3, 100)
        axes.margins(y=0.15)
        axes.legend(loc="best")
    return drawn.svg


def time_bars(arms: Sequence[Arm], title: str, text: str) -> Markup | None:
    """Where each arm's time went: one stacked bar an arm; None while no stage is done."""
    most = max((sum(arm.seconds[part] or 0 for part in PARTS) for arm in arms), default=0)
    if most <= 0:
        return None
    unit, name = time_unit(most)
    with canvas(title, text, (4.7, 0.95 + 0.33 * len(arms))) as drawn:
        axes = drawn.axes
        axes.grid(axis="y", visible=False)
        left = np.zeros(len(arms))
        for part in PARTS:
            values = np.array([(arm.seconds[part] or 0) / unit for arm in arms])
            bars = axes.barh(range(len(arms)), values, 0.62, left=left, color=C[part], edgecolor=C["paper"], label=part)
            for arm, bar, value in zip(arms, bars, values, strict=True):
                drawn.tip(bar, f"{arm.name}, {part}: {value:.1f} {name}")
            left += values
        names = [arm.name + (" (pending)" if arm.total is None else "") for arm in arms]
        axes.set(yticks=range(len(arms)), yticklabels=names, xlabel=name)
        axes.tick_params(axis="y", length=0, labelcolor=C["ink"])
        axes.invert_yaxis()
        drawn.figure.legend(loc="outside upper center", ncols=4, handlelength=1, columnspacing=1.2)
    return drawn.svg


def votes_per_class(found: Selection, title: str, text: str) -> Markup:
    """Votes by rank, kept classes in the method's colour: the darker, the more arms keep them."""
    votes, colour = found.votes[found.ranking], C.get(found.method.partition("+")[0], C["lm"])
    forward = [row[found.ranking] for row, cut in zip(found.kept, found.cuts, strict=True) if not cut.reverse]
    shades = np.sum(forward, axis=0) if forward else np.zeros(len(votes), int)
    with canvas(title, text) as drawn:
        axes = drawn.axes
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=f"source {found.what}, most votes first", ylabel="votes")
        for shade in np.unique(shades):
            fill = colour if shade else C["pruned"]
            alpha = 1.0 if not shade else 0.35 + 0.65 * shade / max(1, len(forward))
            mine = np.flatnonzero(shades == shade)
            if len(votes) <= MANY_CLASSES:
                for rank, bar in zip(mine, axes.bar(mine + 1, votes[mine], 0.8, color=fill, alpha=alpha), strict=True):
                    state = "kept" if shade else "pruned"
                    drawn.tip(bar, f"{label(found.classes[found.ranking[rank]], 60)}: {votes[rank]} votes, {state}")
            else:
                axes.fill_between(
                    1 + np.arange(len(votes)),
                    np.where(shades == shade, votes, 0),
                    step="mid",
                    color=fill,
                    alpha=alpha,
                    linewidth=0,
                )
        _mark_cuts(axes, found)
        axes.set_xlim(0.1, len(votes) + 0.9)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn.svg


def _mark_cuts(axes: Axes, found: Selection) -> None:
    top = axes.get_ylim()[1]
    for i, cut in enumerate(found.cuts):
        place = len(found.classes) - cut.count + 0.5 if cut.reverse else cut.count + 0.5
        axes.axvline(place, color=C["muted"], linestyle=(0, (3, 2)), linewidth=1)
        text, height = f"{cut.arm}{' →' if cut.reverse else ''}", top * (0.97 - 0.09 * (i % 6))
        axes.annotate(text, (place, height), (4, 0), textcoords="offset points", va="top", fontsize=8)


def coverage(found: Selection, title: str, text: str) -> Markup:
    """Share of the votes that the first k classes of the ranking hold, and where the arms cut."""
    reached = 100 * np.concatenate([[0], np.cumsum(found.votes[found.ranking])]) / max(1, found.votes.sum())
    colour, total = C.get(found.method.partition("+")[0], C["lm"]), len(found.classes)
    with canvas(title, text) as drawn:
        axes = drawn.axes
        axes.set(xlabel=f"source {found.what} kept", ylabel="votes covered, %", ylim=(0, 106), xlim=(0, total))
        axes.plot([0, total], [0, 100], color=C["muted"], linestyle=":", linewidth=1.2)
        axes.text(0.72 * total, 65, "chance", color=C["muted"], ha="left", va="top")
        axes.plot(np.arange(total + 1), reached, color=colour)
        for cut in (cut for cut in found.cuts if not cut.reverse):
            axes.plot([cut.count] * 2, [0, 100 * cut.share], color=C["ink"], linestyle=(0, (3, 2)), linewidth=1)
            (dot,) = axes.plot([cut.count], [100 * cut.share], "o", color=C["ink"], markersize=7, mec=C["paper"])
            drawn.tip(dot, f"{cut.arm}: {cut.count} {found.what} hold {100 * cut.share:.1f} % of the votes")
            ha = "right" if cut.count > 0.6 * total else "left"
            axes.annotate(
                f"{cut.arm}: {cut.count}, {100 * cut.share:.1f} %",
                (cut.count, 100 * cut.share),
                (6 if ha == "left" else -6, -13),
                textcoords="offset points",
                ha=ha,
                fontsize=8,
            )
    return drawn.svg


def curve(
    lines: Sequence[tuple[str, str, int, Metrics]], key: str, ylabel: str, *, title: str, text: str, scale: float = 1.0
) -> Markup | None:
    """`key` of the metrics against the step, for each (name, colour, dash, metrics); None where nobody has it."""
    known = [
        (name, colour, dash, [line for line in rows if _finite(line.get(key))]) for name, colour, dash, rows in lines
    ]
    known = [item for item in known if item[3]]
    if not known:
        return None
    with canvas(title, text, SMALL) as drawn:
        axes = drawn.axes
        axes.set(xlabel="step", ylabel=ylabel)
        for name, colour, dash, rows in known:
            rows = thin(rows, POINTS)
            x, y = [row["step"] for row in rows], [scale * row[key] for row in rows]
            (line,) = axes.plot(
                x,
                y,
                color=C[colour],
                linestyle=DASHES[dash % len(DASHES)],
                linewidth=1.5,
                drawstyle="steps-post" if key == "resolution" else "default",
                marker="o" if key == "val_top1" and len(x) < 25 else "",
                markersize=3.2,
            )
            drawn.tip(line, name)
        if key in ("images_per_s", "data_wait", "resolution", "lr"):
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return drawn.svg


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
