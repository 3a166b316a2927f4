"""How the embedded dataset's images are drawn: silhouettes, textures and palettes as arithmetic on a pixel grid.

Every random number is a uniform made from `numpy.random.Philox.random_raw`, whose stream is fixed for good (the streams
of numpy's `Generator` methods may change between releases). Equal draws are equal arrays on one numpy build; another
build's sine may move a value by one grey level.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 40

Floats = NDArray[np.floating[Any]]

_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_TAU = 2 * math.pi


class Recipe(NamedTuple):
    """What a class looks like: keys of SHAPES, TEXTURES and PALETTES."""

    shape: str
    texture: str
    palette: str


class Draws:
    """A stream of uniform draws, a function of its 128-bit key alone."""

    def __init__(self, key: tuple[int, int]) -> None:
        self._philox = np.random.Philox(key=np.array(key, dtype=np.uint64))
        self._uniforms = iter(self._block(64))

    def _block(self, count: int) -> list[float]:
        return ((self._philox.random_raw(count) >> np.uint64(40)) * 2.0**-24).tolist()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One draw from [low, high)."""
        value = next(self._uniforms, None)
        if value is None:
            self._uniforms = iter(self._block(64))
            value = next(self._uniforms)
        return low + (high - low) * value

    def bytes(self, *shape: int) -> Floats:
        """Draws from {0, ..., 255} / 255, as float32 of that shape."""
        count = int(np.prod(shape))
        raw = self._philox.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
        return raw.reshape(shape).astype(np.float32) / 255


# ---------------------------------------------------------------- silhouettes: distance to the edge, positive inside


def _polygon(x: Floats, y: Floats, corners: int) -> Floats:
    angle = np.mod(np.arctan2(y, x), _TAU / corners) - math.pi / corners
    return math.cos(math.pi / corners) - np.hypot(x, y) * np.cos(angle)


def _star(x: Floats, y: Floats, points: int) -> Floats:
    tooth = np.abs(np.mod(np.arctan2(y, x) * (points / _TAU), 1) * 2 - 1)
    return (0.38 + 0.62 * tooth - np.hypot(x, y)) * 0.7


def _ring(x: Floats, y: Floats) -> Floats:
    return 0.27 - np.abs(np.hypot(x, y) - 0.7)


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(0.33 - np.minimum(x, y), 1 - np.maximum(x, y))


def _bands(x: Floats, y: Floats) -> Floats:
    return np.sin(x * 4.5) * 0.25


def _rays(x: Floats, y: Floats) -> Floats:
    return np.sin(np.arctan2(y, x) * 5) * np.hypot(x, y) * 0.2


def _waves(x: Floats, y: Floats) -> Floats:
    return np.sin(y * 5 + np.sin(x * 4) * 1.5) * 0.2


def _patches(x: Floats, y: Floats) -> Floats:
    return (np.sin(x * 3 + np.sin(y * 4)) + np.sin(y * 3 + 2 * np.sin(x * 2))) * 0.2


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "ring": _ring,
    "triangle": lambda x, y: _polygon(x, y, 3),
    "star": lambda x, y: _star(x, y, 5),
    "cross": _cross,
    "bands": _bands,
    "rays": _rays,
    "waves": _waves,
    "patches": _patches,
}
SCENES = frozenset({"bands", "rays", "waves", "patches"})
"""Shapes that fill the frame; the others are the silhouettes of objects."""

# ---------------------------------------------------------------- textures: the share of the second colour, 0 to 1


def _sharp(values: Floats, gain: float) -> Floats:
    return np.clip(values * gain + 0.5, 0, 1)


TEXTURES: dict[str, Callable[[Floats, Floats, Draws], Floats]] = {
    "striped": lambda x, y, draws: _sharp(np.sin(x), 2),
    "dotted": lambda x, y, draws: _sharp(np.cos(x) + np.cos(y) - 0.9, 2),
    "checked": lambda x, y, draws: _sharp(np.sin(x) * np.sin(y), 3),
    "plain": lambda x, y, draws: np.zeros_like(x),
    "grainy": lambda x, y, draws: draws.bytes(SIDE, SIDE),
    "smoky": lambda x, y, draws: _sharp(smooth(draws, 7) - 0.5, 2),
}

PALETTES: dict[str, tuple[float, float, float]] = {
    "orange": (0.02, 0.13, 0.9),
    "blue": (0.53, 0.66, 0.9),
    "green": (0.27, 0.42, 0.7),
    "violet": (0.75, 0.86, 0.7),
}
"""Lowest hue, highest hue (in turns) and saturation."""


def smooth(draws: Draws, knots: int) -> Floats:
    """Smooth noise (SIDE, SIDE) in [0, 1]: `knots` x `knots` draws, interpolated linearly."""
    weights = _KNOTS[knots]
    return weights @ draws.bytes(knots, knots) @ weights.T


def _interpolation(knots: int) -> Floats:
    position = np.linspace(0, knots - 1, SIDE)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(knots))).astype(np.float32)


_KNOTS = {knots: _interpolation(knots) for knots in (3, 7)}


def colour(hue: float, saturation: float, value: float) -> Floats:
    """Hue (in turns), saturation and value as float32 RGB (3,) in [0, 1]."""
    sector = (np.array([0, 4, 2]) + hue * 6) % 6
    return (value * (1 - saturation * (1 - np.clip(np.abs(sector - 3) - 1, 0, 1)))).astype(np.float32)


def _palette_colours(palette: str, draws: Draws) -> tuple[Floats, Floats]:
    low, high, saturation = PALETTES[palette]
    light = colour(draws.uniform(low, high), saturation * draws.uniform(0.7, 1.1), draws.uniform(0.75, 1.0))
    dark = colour(draws.uniform(low, high), saturation * draws.uniform(0.7, 1.1), draws.uniform(0.2, 0.45))
    return (light, dark) if draws.uniform() < 0.5 else (dark, light)


def _any_colour(draws: Draws, saturation: float) -> Floats:
    return colour(draws.uniform(), draws.uniform(0, saturation), draws.uniform(0.15, 1))


def _blend(canvas: Floats, share: Floats, paint: Floats) -> None:
    """Paint over `canvas` (side, side, 3) where `share` (side, side) is above 0."""
    canvas += share[..., None] * (paint - canvas)


def _frame(draws: Draws, *, radius: float, reach: float) -> tuple[Floats, Floats]:
    """Coordinates (x, y), (side, side) each: the unit circle lies anywhere within `reach` pixels of the middle."""
    turn = draws.uniform(0, _TAU)
    cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
    across = _AXIS - (SIDE / 2 + draws.uniform(-reach, reach))
    down = (_AXIS - (SIDE / 2 + draws.uniform(-reach, reach)))[:, None]
    return across * cos + down * sin, down * cos - across * sin


def _background(draws: Draws) -> Floats:
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    canvas[:] = _any_colour(draws, 0.5)
    _blend(canvas, smooth(draws, 3), _any_colour(draws, 0.5))
    for _ in range(int(draws.uniform(1, 4))):
        radius = draws.uniform(2, 6)
        x, y = _frame(draws, radius=radius, reach=20)
        _blend(canvas, _sharp(1 - np.hypot(x, y * draws.uniform(0.3, 1)), radius), _any_colour(draws, 0.9))
    return canvas


def _paint_shape(canvas: Floats, recipe: Recipe, draws: Draws) -> None:
    shape, texture, palette = recipe
    radius = draws.uniform(10, 15) if shape in SCENES else draws.uniform(12, 18)
    x, y = _frame(draws, radius=radius, reach=SIDE / 2 - radius + 2 if shape not in SCENES else 8)
    first, second = _palette_colours(palette, draws)
    share = _sharp(SHAPES[shape](x, y), radius)
    scale = _TAU * radius / draws.uniform(7, 9)
    phase = draws.uniform(0, _TAU)
    mix = TEXTURES[texture](x * scale + phase, y * scale + phase, draws)[..., None]
    _blend(canvas, share, first + mix * (second - first))


def paint(recipe: Recipe, draws: Draws) -> NDArray[np.uint8]:
    """One image (SIDE, SIDE, 3) of (shape, texture, palette): clutter behind it, a bar across it, and sensor noise."""
    canvas = _background(draws)
    _paint_shape(canvas, recipe, draws)
    if draws.uniform() < 0.3:
        width = draws.uniform(1.5, 3)
        x, _ = _frame(draws, radius=width, reach=12)
        _blend(canvas, _sharp(1 - np.abs(x), width), _any_colour(draws, 0.5))
    contrast, brightness = draws.uniform(0.6, 1.1), draws.uniform(-0.12, 0.12)
    canvas = (canvas - 0.5) * contrast + (0.5 + brightness)
    canvas += (draws.bytes(SIDE, SIDE, 3) - 0.5) * draws.uniform(0.03, 0.15)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
