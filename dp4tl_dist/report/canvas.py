"""One chart as inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages.

Drawn by matplotlib: every training machine can install it as a wheel, its axes and ticks are trusted, and its SVG is
text that the page can restyle; altair's renderer would bring a JavaScript engine along for the same few charts.
"""

import io
import itertools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp4tl_dist.arm_name import base_of

# Each colour is drawn as the value here and then replaced by the CSS variable of its name (see page.css). The methods'
# are those of Okabe and Ito, which colour-blind readers tell apart; markers and dashes say the same a second time.
COLOURS = {
    "ink": "#1b1f24", "muted": "#5f6873", "grid": "#dfe3e8", "paper": "#fdfefe",
    "lm": "#0072b2", "fm": "#009e73", "random": "#d55e00", "random-samples": "#e69f00",
    "random-balanced": "#a85c2c", "el2n": "#8c564b", "grand": "#b3324f", "moderate": "#6b7d00", "herding": "#17858f",
    "k-centre": "#3f8f3a", "retrieval": "#c2449b", "forgetting": "#8a6fd1", "cld": "#4e6a8c", "influence": "#7a5195",
    "lm-reverse": "#56b4e9", "fm-reverse": "#cc79a7", "pruned": "#b9c0c8",
    "surrogate": "#7d5fb2", "voting": "#e3c23b", "pretraining": "#3d4f66", "transfer": "#a9b6c4",
}  # fmt: skip


class ByMethod(dict[str, str]):
    """What methods look like; a variant (lm-joint, lm+moderate) looks like its method."""

    def __missing__(self, kind: str) -> str:
        if base_of(kind) == kind:
            raise KeyError(kind)
        return self[base_of(kind)]


C = ByMethod({**COLOURS, "dense": COLOURS["ink"]})
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 9.5,
    "text.color": C["ink"], "axes.labelcolor": C["muted"], "axes.edgecolor": C["muted"], "axes.linewidth": 0.7,
    "xtick.color": C["muted"], "ytick.color": C["muted"], "axes.grid": True, "grid.color": C["grid"],
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.8, "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.unicode_minus": True,
}  # fmt: skip
WIDE, SMALL = (4.4, 2.85), (3.5, 2.2)
_number = itertools.count()


class Canvas:
    """One figure with one pair of axes; `tip` gives a drawn thing a text that shows under the pointer."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.figure = Figure(figsize=size, layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.tips: dict[str, str] = {}
        self.svg = Markup()

    def tip(self, artist: Any, text: str) -> None:
        artist.set_gid(f"tip{len(self.tips)}")
        self.tips[artist.get_gid()] = text


@contextmanager
def canvas(title: str, text: str, size: tuple[float, float] = WIDE) -> Iterator[Canvas]:
    """Draw in the block; afterwards `svg` is the chart with its title and description."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the fonts, this process need not
        drawn = Canvas(size)
        yield drawn
        file = io.StringIO()
        drawn.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn.svg = _inline(file.getvalue(), drawn.tips, title, text)


def _inline(svg: str, tips: dict[str, str], title: str, text: str) -> Markup:
    name = f"c{next(_number)}"

    def tidy(tag: re.Match[str]) -> str:
        text = tag[0].replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-')
        text = text.replace("url(#", f"url(#{name}-")
        for colour, value in COLOURS.items():
            text = text.replace(value, f"var(--{colour})")
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
        text = re.sub(r"font: (\w+) ([\d.]+px) [^;\"]*", r"font-size: \2; font-weight: \1", text)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        return re.sub(r"(\d+\.\d{2})\d+", r"\1", text)

    svg = re.sub(r"<[a-z][^>]*>", tidy, svg[svg.index("<svg") :])  # tags alone: what they hold is the reader's
    for gid, tip in tips.items():  # last, so that names are not taken for markup
        svg = svg.replace(f'<g id="{name}-{gid}">', f'<g id="{name}-{gid}"><title>{escape(tip)}</title>', 1)
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
    label = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(text)}</desc>'
    start = svg.index(">") + 1
    opening = re.sub(r' (width|height|version)="[^"]*"', "", svg[:start])
    return Markup(head + opening.removeprefix("<svg ") + label + svg[start:])
