"""The charts of what was kept: votes by rank, the share that they cover, and what brute force says of each class."""

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dp4tl_dist.report.brute_force import Force
from dp4tl_dist.report.canvas import C, canvas
from dp4tl_dist.report.charts import label
from dp4tl_dist.report.selection import Selection

MANY_CLASSES = 80


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
                # One step for each run of classes that are alike: a page has many such charts.
                ends = np.append(np.flatnonzero(np.diff(votes) | np.diff(shades)), len(votes) - 1)
                own = np.flatnonzero(shades[ends] == shade)
                part = ends[own[0] : own[-1] + 1]
                edges = np.append([ends[own[0] - 1] if own[0] else -1], part) + 1.5
                heights = np.where(shades[part] == shade, votes[part], 0)
                axes.stairs(heights, edges, fill=True, color=fill, alpha=alpha, linewidth=0)
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
        axes.annotate(text, (place, height), (4, 0), textcoords="offset points", va="top", fontsize=8.5)


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
        size = found.suggestion.count
        ring: Any = {"marker": "o", "markersize": 11, "mfc": "none", "mec": C["muted"], "mew": 1.4, "linestyle": ""}
        (dot,) = axes.plot([size], [reached[size]], **ring)
        drawn.tip(dot, f"suggested: {size} {found.what} hold {reached[size]:.1f} % of the votes")
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
                fontsize=8.5,
            )
    return drawn.svg


def influence_per_class(found: Force, title: str, text: str) -> Markup:
    """Influence by rank with its standard error; kept classes in colour: the darker, the more arms keep them."""
    value, error = 100 * found.influence[found.ranking], 100 * found.stderr[found.ranking]
    shades = found.kept[:, found.ranking].sum(axis=0)
    with canvas(title, text) as drawn:
        axes, ranks = drawn.axes, 1 + np.arange(len(value))
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="source classes, most helpful first", ylabel="influence, points")
        axes.fill_between(ranks, value - error, value + error, color=C["muted"], alpha=0.2, linewidth=0)
        axes.axhline(0, color=C["muted"], linewidth=1)
        for shade in np.unique(shades):
            mine = shades == shade
            alpha = 1.0 if not shade else 0.35 + 0.65 * shade / len(found.arms)
            size = 5 if len(value) <= MANY_CLASSES else 2.5
            (dots,) = axes.plot(
                ranks[mine], value[mine], "H", color=C["influence" if shade else "pruned"], alpha=alpha, markersize=size
            )
            drawn.tip(dots, f"kept by {shade} of {len(found.arms)} arms" if shade else "pruned")
        axes.set_xlim(0.1, len(value) + 0.9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn.svg
