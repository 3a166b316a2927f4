"""The embedded dataset: a source of 40 drawn classes and a target of 8 classes that resembles 16 of them.

A class is a recipe: shape, texture and palette. The objects of the target and those of the source are the two parts of
one product of shapes, textures and palettes, so each target class differs from some source classes in one attribute and
equals none. The other source classes are scenes, whose shapes, textures and palettes the target does not use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.encode import Sample
from dp4tl_dist.data.synthetic_draw import Draws, Recipe, paint
from dp4tl_dist.errors import UserError

Kind = Literal["source", "target"]
Split = Literal["train", "val", "test"]

COUNTS: Mapping[tuple[str, str], int] = {
    ("source", "train"): 100,
    ("source", "val"): 20,
    ("target", "train"): 30,
    ("target", "test"): 50,
}
"""Images of each class in `dataset`, by kind and split."""

_OBJECTS = (("ring", "triangle", "star", "cross"), ("striped", "dotted", "checked"), ("orange", "blue"))
_SCENES = (("bands", "waves", "rays", "patches"), ("plain", "grainy", "smoky"), ("violet", "green"))


def _recipes() -> dict[str, tuple[Recipe, ...]]:
    shapes, textures, palettes = _OBJECTS
    target = {
        Recipe(shape, textures[(i + j) % len(textures)], palette)
        for i, shape in enumerate(shapes)
        for j, palette in enumerate(palettes)
    }
    objects = {Recipe(*attributes) for attributes in product(*_OBJECTS)} - target
    scenes = {Recipe(*attributes) for attributes in product(*_SCENES)}
    # Sorted by name, as class folders are: a class's number says nothing about what it resembles.
    return {"source": tuple(sorted(objects | scenes)), "target": tuple(sorted(target))}


RECIPES = _recipes()
"""Recipes by kind; a class's label is its position."""


def source_classes() -> list[str]:
    """Names such as "ring-striped-orange", by label."""
    return ["-".join(recipe) for recipe in RECIPES["source"]]


def target_classes() -> list[str]:
    """Names such as "ring-dotted-blue", by label. None is a source class."""
    return ["-".join(recipe) for recipe in RECIPES["target"]]


def num_shared(one: Recipe, other: Recipe) -> int:
    """How many of shape, texture and palette two recipes have in common."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def related_classes() -> NDArray[np.int64]:
    """Source classes, ascending, that share two of shape, texture and palette with some target class."""
    related = [
        label
        for label, recipe in enumerate(RECIPES["source"])
        if any(num_shared(recipe, target) >= 2 for target in RECIPES["target"])
    ]
    return np.array(related, dtype=np.int64)


def draw(kind: Kind, split: Split, label: int, index: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Image `index` of a class: uint8 (40, 40, 3), a function of the arguments alone. UserError for wrong ones."""
    _check_part(kind, split)
    if not 0 <= label < len(RECIPES[kind]) or not 0 <= index < 2**32 or not 0 <= seed < 2**64:
        raise UserError(f"no {kind} image has label {label}, index {index} and seed {seed}: use smaller, positive ones")
    part = list(COUNTS).index((kind, split))
    return paint(RECIPES[kind][label], Draws((seed, part << 48 | label << 32 | index)))


@dataclass(frozen=True)
class Drawing:
    """An image that is drawn when it is called for; small enough to be sent to other processes."""

    kind: Kind
    split: Split
    label: int
    index: int
    seed: int = 0

    def __call__(self) -> NDArray[np.uint8]:
        return draw(self.kind, self.split, self.label, self.index, seed=self.seed)


def dataset(kind: Kind, split: Split, *, seed: int = 0) -> tuple[list[Sample], list[str]]:
    """All samples of one part, sorted by class and not drawn yet, and the class names: what `write_samples` takes."""
    _check_part(kind, split)
    classes = source_classes() if kind == "source" else target_classes()
    samples = [
        Sample(Drawing(kind, split, label, index, seed), label)
        for label in range(len(classes))
        for index in range(COUNTS[kind, split])
    ]
    return samples, classes


def _check_part(kind: str, split: str) -> None:
    if (kind, split) not in COUNTS:
        known = ", ".join(" ".join(part) for part in COUNTS)
        raise UserError(f"the embedded dataset has no part {kind} {split}: choose one of {known}")
