"""The draws are a function of their keys alone, and the crops are torchvision's."""

import math

import numpy as np
import pytest

from dp4tl_dist.data.augment import DRAW_LEFT, DRAW_TOP, centre_boxes, train_boxes, train_flips, uniform

MASK = (1 << 64) - 1


def slow_uniform(*keys: int) -> float:
    """splitmix64 over the keys, in Python integers."""
    word = 0
    for key in keys:
        word = ((word ^ key) + 0x9E3779B97F4A7C15) & MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        word ^= word >> 31
    return (word >> 11) * 2.0**-53


def slow_train_box(height: int, width: int, key: tuple[int, ...], min_scale: float, ratio: tuple[float, float]):
    """One random resized crop, try by try."""
    for attempt in range(10):
        area = height * width * (min_scale + (1 - min_scale) * slow_uniform(*key, 2 * attempt))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * slow_uniform(*key, 2 * attempt + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(slow_uniform(*key, DRAW_TOP) * (height - h + 1))
            return top, int(slow_uniform(*key, DRAW_LEFT) * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("min_scale", "ratio"), [(0.08, (3 / 4, 4 / 3)), (0.9, (0.9, 1.1)), (1.0, (1.0, 1.0))])
def test_train_boxes_match_the_slow_oracle(min_scale: float, ratio: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 500, (2, 300)).astype(np.uint16)
    heights[:40], widths[20:60] = 2, 3  # thin images, which reach the fallback on both sides
    identifiers = rng.permutation(10**6)[:300]
    boxes = train_boxes(heights, widths, identifiers, seed=-7, epoch=3, min_scale=min_scale, ratio=ratio, view=1)
    expected = [
        slow_train_box(int(h), int(w), (-7 & MASK, 3, 1, int(i)), min_scale, ratio)
        for h, w, i in zip(heights, widths, identifiers, strict=True)
    ]
    assert boxes.dtype == np.int32
    np.testing.assert_array_equal(boxes, expected)


def test_train_boxes_lie_inside_images_of_any_size() -> None:
    heights, widths = (a.ravel().astype(np.uint16) for a in np.meshgrid([1, 2, 7, 400, 65535], [1, 3, 50, 65535]))
    for epoch in range(20):
        top, left, h, w = train_boxes(heights, widths, np.arange(20), seed=0, epoch=epoch, min_scale=0.08).T
        assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (top + h <= heights).all() and (left + w <= widths).all()


def test_draws_do_not_depend_on_the_batch() -> None:
    identifiers = np.arange(1000, 1200)
    sizes = np.full(200, 64, np.uint16)
    order = np.random.default_rng(0).permutation(200)
    whole = train_boxes(sizes, sizes, identifiers, seed=1, epoch=2, min_scale=0.2)
    parts = [
        train_boxes(sizes[p], sizes[p], identifiers[p], seed=1, epoch=2, min_scale=0.2) for p in np.split(order, 8)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])
    flips = train_flips(identifiers, seed=1, epoch=2)
    np.testing.assert_array_equal(train_flips(identifiers[order], seed=1, epoch=2), flips[order])


def test_every_key_matters() -> None:
    base = {"seed": 1, "epoch": 2, "view": 0}
    draws = uniform(np.arange(100), np.arange(4), **base)
    for change in ({"seed": 2}, {"epoch": 3}, {"view": 1}, {"seed": 2, "epoch": 1}):
        other = uniform(np.arange(100), np.arange(4), **{**base, **change})
        assert not np.isin(draws, other).any()
    assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("axis", ["identifier", "draw", "epoch", "seed"])
def test_draws_are_uniform_and_independent_along_each_key(axis: str) -> None:
    n = 20_000
    if axis == "identifier":
        values = uniform(np.arange(n), 0, seed=0, epoch=0)[:, 0]
    elif axis == "draw":
        values = uniform(np.array([5]), np.arange(n), seed=0, epoch=0)[0]
    else:
        values = np.array([uniform(np.array([5]), 0, **{"seed": 0, "epoch": 0, axis: k})[0, 0] for k in range(n // 10)])
    bins = 50
    for sample in (values, (values[1:] - values[:-1]) % 1.0):  # neighbours differ by a uniform amount too
        counts = np.bincount((sample * bins).astype(int), minlength=bins)
        expected = len(sample) / bins
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 49 + 5 * math.sqrt(2 * 49)  # five standard deviations above the mean


def test_flips_come_half_of_the_time() -> None:
    assert abs(train_flips(np.arange(40_000), seed=3, epoch=0).mean() - 0.5) < 0.0125


def test_centre_boxes() -> None:
    boxes = centre_boxes(np.array([256, 300, 1], np.uint16), np.array([256, 401, 1], np.uint16), ratio=224 / 256)
    np.testing.assert_array_equal(boxes, [[16, 16, 224, 224], [19, 69, 262, 262], [0, 0, 1, 1]])
    assert boxes.dtype == np.int32
