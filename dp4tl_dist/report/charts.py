"""The charts: what each one shows and how. `canvas` makes SVG of them."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dp4tl_dist.report.canvas import SMALL, ByMethod, C, canvas
from dp4tl_dist.report.collect import PARTS, Arm, Metrics, mean_std, number, thin
from dp4tl_dist.report.placing import place

MARKERS = ByMethod({
    "dense": "D", "lm": "o", "fm": "s", "random": "X", "random-samples": "P", "lm-reverse": "v", "fm-reverse": "^",
    "random-balanced": "h", "el2n": "<", "grand": ">", "moderate": "p", "herding": "H", "k-centre": "*",
    "retrieval": "d", "forgetting": "8", "cld": "1", "influence": "H",
})  # fmt: skip
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
POINTS, ALL_POINTS = 240, 3000
"""Of a line, and of all lines of a chart."""
LETTER = (0.021, 0.062)
"""What a letter of a name takes of a wide chart's axes, across and up."""


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
    """Names beside points, where there is room."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    shares = [((x - left) / (right - left), (y - low) / (high - low)) for _, _, x, y in points]
    boxes = place(shares, [(LETTER[0] * len(name), LETTER[1]) for name, *_ in points], LETTER[1] / 2)
    for (name, colour, _, _), (x, _), box in zip(points, shares, boxes, strict=True):
        ha = "left" if box.left > x else "right" if box.right < x else "center"
        at = {"left": box.left, "right": box.right, "center": x}[ha]
        middle = (box.bottom + box.top) / 2
        axes.text(at, middle, name, color=colour, ha=ha, va="center", weight="bold", transform=axes.transAxes)


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
    with canvas(title, text, (4.4, 0.95 + 0.33 * len(arms))) as drawn:
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
            rows = thin(rows, min(POINTS, max(12, ALL_POINTS // len(known))))
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
    return number(value) is not None
