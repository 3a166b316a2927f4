"""Influence: masks, the estimate against a slow oracle, planted classes found again, and `prune` by it."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, make_meta, save_npz
from dp4tl_dist.prune.influence import (
    Influence,
    agreement,
    draw_mask,
    estimate,
    load_influence,
    rank_influence,
    save_influence,
)
from dp4tl_dist.prune.make import prune

HELPFUL, HARMFUL, CLASSES, DIM = 3, 7, 12, 24


def masks_of(count: int, num_classes: int, *, seed: int = 0) -> NDArray[np.bool_]:
    return np.stack([draw_mask(num_classes, row, seed=seed) for row in range(count)])


@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_masks_are_halves_that_differ(num_classes: int) -> None:
    masks = masks_of(200, num_classes)
    assert (masks.sum(axis=1) == num_classes // 2).all()
    assert np.array_equal(masks[:50], masks_of(50, num_classes)), "more masks leave the first ones as they are"
    share = masks.mean(axis=0)
    assert abs(share - num_classes // 2 / num_classes).max() < 0.15
    # Neighbouring seeds share no stream: row r + 1 of one is not row r of the next.
    if num_classes == 40:
        rows = {mask.tobytes() for seed in range(4) for mask in masks_of(100, num_classes, seed=seed)}
        assert len(rows) == 400


def test_estimate_is_a_difference_of_means() -> None:
    rng = np.random.default_rng(0)
    masks, accuracy = masks_of(30, 6), rng.random(30)
    value, stderr = estimate(masks, accuracy)
    for c in range(6):
        inside = [float(a) for a, mask in zip(accuracy, masks, strict=True) if mask[c]]
        outside = [float(a) for a, mask in zip(accuracy, masks, strict=True) if not mask[c]]
        assert value[c] == pytest.approx(statistics.fmean(inside) - statistics.fmean(outside))
        variance = statistics.variance(inside) / len(inside) + statistics.variance(outside) / len(outside)
        assert stderr[c] == pytest.approx(variance**0.5)


def test_the_standard_error_is_that_of_repeated_studies() -> None:
    """Over 300 studies of noise alone, estimates spread as their standard errors say."""
    rng = np.random.default_rng(1)
    masks = masks_of(40, 5)
    found = [estimate(masks, rng.normal(0.5, 0.1, 40)) for _ in range(300)]
    spread = np.std([value for value, _ in found], axis=0)
    assert spread == pytest.approx(np.mean([stderr for _, stderr in found], axis=0), rel=0.15)


def test_too_few_models() -> None:
    with pytest.raises(UserError, match="use more --masks"):
        estimate(masks_of(3, 20), np.zeros(3))


def learn(kept: NDArray[np.bool_], means: NDArray[np.float64], rng: np.random.Generator) -> float:
    """A learner that takes microseconds: features are what tells the kept source classes apart, a nearest centroid
    reads the target off them. The target's two classes differ along one direction, and vary much along another."""
    centred = means[kept] - means[kept].mean(axis=0)
    _, scale, basis = np.linalg.svd(centred, full_matrices=False)
    basis = basis[scale > 1e-9]
    labels = np.repeat([0, 1], 10)

    def images() -> NDArray[np.float64]:
        drawn = rng.normal(0, 0.3, (20, DIM))
        drawn[:, 0] += np.where(labels == 0, -1, 1)
        drawn[:, 1] += rng.normal(0, 6, 20)
        return drawn @ basis.T

    train, test = images(), images()
    centroids = np.stack([train[labels == label].mean(axis=0) for label in (0, 1)])
    guess = ((test[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    return float((guess == labels).mean())


def planted(seed: int, *, plant: bool = True, num_masks: int = 300) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Influence and standard error where one class varies along the target's direction, one along its nuisance."""
    rng = np.random.default_rng(seed)
    means = np.zeros((CLASSES, DIM))
    means[np.arange(CLASSES), 2 + np.arange(CLASSES)] = 1  # directions that the target does not use
    if plant:
        means[HELPFUL], means[HARMFUL] = 3 * np.eye(DIM)[0], 3 * np.eye(DIM)[1]
    masks = masks_of(num_masks, CLASSES, seed=seed)
    return estimate(masks, np.array([learn(mask, means, rng) for mask in masks]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_classes_are_found_again(seed: int) -> None:
    value, stderr = planted(seed)
    ranking = rank_influence(value)
    assert ranking[0] == HELPFUL and ranking[-1] == HARMFUL
    assert value[HELPFUL] > 5 * stderr[HELPFUL] and value[HARMFUL] < -3 * stderr[HARMFUL]
    others = np.delete(value / stderr, [HELPFUL, HARMFUL])
    assert abs(others).max() < 3.5, "the rest does nothing"


def test_nothing_is_found_where_nothing_was_planted() -> None:
    value, stderr = planted(0, plant=False)
    assert abs(value / stderr).max() < 3.5


def test_agreement_of_rankings() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    first = rng.permutation(40)
    second = rng.permutation(40)
    found = agreement(first, second)
    assert found["spearman"] == pytest.approx(spearmanr(np.argsort(first), np.argsort(second)).statistic)
    assert agreement(first, first)["spearman"] == 1 and agreement(first, first[::-1])["spearman"] == -1
    tops = {item["k"]: item["overlap"] for item in found["top"]}
    assert list(tops) == [2, 4, 8, 20]
    assert tops[8] == len(set(first[:8]) & set(second[:8])) / 8
    assert all(item["chance"] == item["k"] / 40 for item in found["top"])


@pytest.fixture
def path(source: Beton, tmp_path: Path) -> Path:
    value = np.array([0.3, -0.1, 0.2, 0.2, 0.0, -0.4, 0.1, 0.05, -0.2, 0.15])
    meta = make_meta("influence", inputs={"source": source.fingerprint})
    found = Influence(value, np.full(10, 0.01), masks_of(20, 10), np.linspace(0, 1, 20), meta)
    save_influence(tmp_path / "i.npz", found)
    return tmp_path / "i.npz"


@pytest.mark.parametrize(("reverse", "kept"), [(False, [0, 2, 3, 9]), (True, [1, 4, 5, 8])])
def test_prune_by_influence(source: Beton, path: Path, tmp_path: Path, reverse: bool, kept: list[int]) -> None:
    prune(source=source.path, influence=path, keep=0.4, out=tmp_path / "x.npz", reverse=reverse)
    subset = load_subset(tmp_path / "x.npz", beton=source)
    assert subset.groups.tolist() == kept and subset.meta["inputs"].keys() == {"source", "influence"}
    assert subset.method == ("influence-reverse" if reverse else "influence")


@pytest.mark.parametrize(
    ("more", "says"),
    [({"keep": "auto"}, "use it with --votes"), ({"coverage": 0.9}, "use it with --votes"),
     ({"keep": 0.4, "random": "classes"}, "exactly one")],
)  # fmt: skip
def test_prune_by_influence_refuses(source: Beton, path: Path, tmp_path: Path, more: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prune(source=source.path, influence=path, out=tmp_path / "x.npz", **more)


@pytest.mark.parametrize(
    "damage",
    [{"influence": np.zeros(9)}, {"stderr": np.full(10, np.nan)}, {"masks": np.zeros((3, 10), bool)},
     {"masks": np.zeros((20, 10))}, {"accuracy": np.zeros((20, 1))}, {"inputs": {}}],
    ids=lambda damage: next(iter(damage)),
)  # fmt: skip
def test_damaged_files(source: Beton, path: Path, damage: dict[str, Any]) -> None:
    arrays, meta = load_npz(path, "influence")
    for name, value in damage.items():
        (arrays if name in arrays else meta)[name] = value
    save_npz(path, arrays, meta)
    with pytest.raises(UserError, match=r"i\.npz"):
        load_influence(path, beton=source)
