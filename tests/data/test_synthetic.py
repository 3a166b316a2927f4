"""The embedded dataset is what its rules say: distinct recipes, stated resemblance, reproducible pixels."""

import os
import pickle
import subprocess
import sys
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dp4tl_dist.data.synthetic import (
    COUNTS,
    RECIPES,
    Drawing,
    Kind,
    Split,
    dataset,
    draw,
    num_shared,
    related_classes,
    source_classes,
    target_classes,
)
from dp4tl_dist.data.synthetic_draw import PALETTES, SHAPES, TEXTURES, Draws, Recipe, paint
from dp4tl_dist.errors import UserError

PARTS: list[tuple[Kind, Split]] = [("source", "train"), ("source", "val"), ("target", "train"), ("target", "test")]


def test_class_counts_and_names() -> None:
    assert len(source_classes()) == 40
    assert len(target_classes()) == 8
    names = source_classes() + target_classes()
    assert len(set(names)) == 48, "no recipe is used twice, so no target class is a source class"
    assert all(name.count("-") == 2 for name in names)
    assert source_classes() == sorted(source_classes())


def test_resemblance_follows_from_the_recipes() -> None:
    related = related_classes()
    assert related.dtype == np.int64
    assert related.tolist() == sorted(set(related.tolist()))
    assert len(related) == 16
    for label, recipe in enumerate(RECIPES["source"]):
        closest = max(num_shared(recipe, target) for target in RECIPES["target"])
        assert closest == (2 if label in related else 0), f"{recipe}: related share two attributes, the others none"
    for target in RECIPES["target"]:
        assert sum(num_shared(target, RECIPES["source"][label]) == 2 for label in related) >= 4, target


def test_unrelated_classes_use_nothing_of_the_target() -> None:
    related = set(related_classes().tolist())
    used = [set(values) for values in zip(*RECIPES["target"], strict=True)]
    others = [recipe for label, recipe in enumerate(RECIPES["source"]) if label not in related]
    assert not any(value in used[place] for recipe in others for place, value in enumerate(recipe))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_recipe_can_be_painted(shape: str) -> None:
    for texture, palette in product(TEXTURES, PALETTES):
        image = paint(Recipe(shape, texture, palette), Draws((1, 2)))
        assert image.shape == (40, 40, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5


def test_pixels_depend_on_every_argument_and_on_nothing_else() -> None:
    first = draw("source", "train", 3, 5)
    draw("target", "test", 0, 0)
    assert np.array_equal(first, draw("source", "train", 3, 5, seed=0))
    images = [first, draw("source", "val", 3, 5), draw("target", "train", 3, 5), draw("target", "test", 3, 5)]
    images += [draw("source", "train", 4, 5), draw("source", "train", 3, 6), draw("source", "train", 3, 5, seed=1)]
    assert len({image.tobytes() for image in images}) == len(images)


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import sys; from dp4tl_dist.data.synthetic import draw\n"
        "sys.stdout.buffer.write(draw('source', 'val', 7, 11).tobytes())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout
    assert other == draw("source", "val", 7, 11).tobytes()


def test_uniform_draws_fill_the_unit_interval() -> None:
    draws = Draws((3, 4))
    values = np.array([draws.uniform(2, 4) for _ in range(1000)])
    assert 2 <= values.min() < 2.05 < 3.95 < values.max() < 4
    assert abs(values.mean() - 3) < 0.06
    noise = draws.bytes(40, 40)
    assert noise.dtype == np.float32
    assert noise.min() >= 0 and noise.max() <= 1 and abs(noise.mean() - 0.5) < 0.03


@pytest.mark.parametrize("kind, split", PARTS)
def test_dataset_lists_every_image_once(kind: Kind, split: Split) -> None:
    samples, classes = dataset(kind, split, seed=2)
    count = COUNTS[kind, split]
    assert classes == (source_classes() if kind == "source" else target_classes())
    assert [sample.label for sample in samples] == np.repeat(np.arange(len(classes)), count).tolist()
    assert len({sample.source for sample in samples}) == len(samples) == len(classes) * count
    last = samples[-1].source
    assert isinstance(last, Drawing)
    assert np.array_equal(last(), draw(kind, split, len(classes) - 1, count - 1, seed=2))


def test_samples_are_small_messages_to_other_processes() -> None:
    sample = dataset("source", "train")[0][0]
    message = pickle.dumps(sample)
    assert len(message) < 300
    copy = pickle.loads(message)
    assert copy == sample
    assert isinstance(copy.source, Drawing)
    assert np.array_equal(copy.source(), draw("source", "train", 0, 0))


@pytest.mark.parametrize("kind, split", [("source", "test"), ("target", "val"), ("other", "train")])
def test_unknown_parts_are_refused(kind: Kind, split: Split) -> None:
    with pytest.raises(UserError, match="source train, source val, target train, target test"):
        draw(kind, split, 0, 0)
    with pytest.raises(UserError, match="choose one of"):
        dataset(kind, split)


@pytest.mark.parametrize("label, index, seed", [(-1, 0, 0), (40, 0, 0), (0, -1, 0), (0, 2**32, 0), (0, 0, -1)])
def test_numbers_out_of_range_are_refused(label: int, index: int, seed: int) -> None:
    with pytest.raises(UserError, match=f"label {label}, index {index} and seed {seed}"):
        draw("source", "train", label, index, seed=seed)


# ---------------------------------------------------------------- what a classifier can see


@cache
def _features(kind: Kind, split: Split, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A colour histogram and contrast at four scales (n, 72) of `count` images a class, and the labels (n,)."""
    labels = np.repeat(np.arange(len(RECIPES[kind])), count)
    images = np.stack([draw(kind, split, label, i % count) for i, label in enumerate(labels.tolist())])
    codes = (images // 64).astype(np.int64) @ np.array([16, 4, 1])
    colours = np.stack([np.bincount(code.ravel(), minlength=64) for code in codes]) / codes[0].size
    grey = images.mean(axis=3)
    steps = [grey[:, lag:] - grey[:, :-lag] for lag in (1, 2, 4, 8)]
    steps += [grey[:, :, lag:] - grey[:, :, :-lag] for lag in (1, 2, 4, 8)]
    contrast = np.stack([np.abs(step).mean(axis=(1, 2)) / 64 for step in steps], axis=1)
    return np.concatenate([np.sqrt(colours), contrast], axis=1), labels


def _ridge(features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
    """Weights (features + 1, classes) of a linear classifier by regularised least squares."""
    inputs = np.pad(features, ((0, 0), (0, 1)), constant_values=1)
    goals = np.eye(labels.max() + 1)[labels]
    return np.linalg.solve(inputs.T @ inputs + np.eye(inputs.shape[1]), inputs.T @ goals)


def _logits(features: NDArray[np.float64], weights: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    return features @ weights[:-1] + weights[-1]


def test_classes_differ_in_their_pixels_and_vary_inside() -> None:
    """Simple statistics tell classes apart far above chance (2.5 %), and far from surely."""
    weights = _ridge(*_features("source", "train", 30))
    features, labels = _features("source", "val", 10)
    accuracy = float((_logits(features, weights).argmax(axis=1) == labels).mean())
    assert 0.12 < accuracy < 0.7


def test_voting_finds_the_related_classes_and_chance_does_not() -> None:
    related = related_classes()
    weights = _ridge(*_features("source", "train", 30))
    logits = _logits(_features("target", "train", 20)[0], weights)
    votes = np.bincount(logits.argmax(axis=1), minlength=40)
    kept = np.lexsort((-logits.sum(axis=0), -votes))[: len(related)]
    assert np.isin(related, kept).mean() >= 0.8
    chance = [np.isin(related, np.random.default_rng(i).permutation(40)[: len(related)]).mean() for i in range(200)]
    assert max(chance) < 0.8
