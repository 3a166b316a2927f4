"""Class influence: what a class of the source does for a target, from many models trained on random halves of them.

influence(c) = mean accuracy of the models trained with c - mean accuracy of those trained without. numpy alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz
from dp4tl_dist.prune.select import random_choice

KIND = "influence"
LEAST = 2
"""Models with a class, and models without it, that its standard error needs."""


@dataclass(frozen=True, eq=False)
class Influence:
    influence: NDArray[np.float64]
    """(classes,): a difference of accuracies, as shares of 1."""
    stderr: NDArray[np.float64]
    """(classes,): its standard error."""
    masks: NDArray[np.bool_]
    """(models, classes): which classes each model was trained on."""
    accuracy: NDArray[np.float64]
    """(models,): what each one reached on the target."""
    meta: dict[str, Any] = field(default_factory=dict)


def draw_mask(num_classes: int, row: int, *, seed: int) -> NDArray[np.bool_]:
    """(classes,): a random half of the classes, a function of seed and row alone; of an odd number the smaller half."""
    # Two draws, so that neighbouring rows and seeds share nothing.
    key = int(np.random.Philox(key=[seed, row]).random_raw()) >> 1
    mask = np.zeros(num_classes, bool)
    mask[random_choice(num_classes, num_classes // 2, seed=key)] = True
    return mask


def estimate(
    masks: NDArray[np.bool_], accuracy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Influence (classes,) and its standard error (classes,) from masks (models, classes) and accuracy (models,).

    The two groups of models are independent samples, each with a variance of its own. UserError where a class has fewer
    than LEAST models on either side.
    """
    inside = masks.sum(axis=0)
    outside = len(masks) - inside
    fewest = int(min(inside.min(), outside.min()))
    if fewest < LEAST:
        raise UserError(
            f"of {len(masks)} masks only {fewest} hold (or lack) some class, and {LEAST} must: use more --masks"
        )
    sides = []
    for chosen, count in ((masks, inside), (~masks, outside)):
        mean = (accuracy[:, None] * chosen).sum(axis=0) / count
        square = (((accuracy[:, None] - mean) ** 2) * chosen).sum(axis=0) / (count - 1)
        sides.append((mean, square / count))
    (mean_in, error_in), (mean_out, error_out) = sides
    return mean_in - mean_out, np.sqrt(error_in + error_out)


def rank_influence(influence: NDArray[np.float64]) -> NDArray[np.int64]:
    """All class ids, most helpful first; equal ones by id."""
    return np.lexsort((np.arange(len(influence)), -influence)).astype(np.int64)


def agreement(first: NDArray[np.int64], second: NDArray[np.int64]) -> dict[str, Any]:
    """How far two rankings (classes,) of the same classes agree: Spearman's correlation, and the overlap of their tops.

    overlap: of the first k of each, the share that both have; chance would give k / classes.
    """
    total = len(first)
    place_first, place_second = np.argsort(first), np.argsort(second)
    difference = (place_first - place_second).astype(np.float64)
    spearman = 1 - 6 * float((difference**2).sum()) / (total * (total**2 - 1)) if total > 1 else 1.0
    tops = sorted({max(1, round(share * total)) for share in (0.05, 0.1, 0.2, 0.5)})
    overlap = [len(np.intersect1d(first[:k], second[:k])) / k for k in tops]
    return {"spearman": spearman, "top": [{"k": k, "overlap": value, "chance": k / total}
                                          for k, value in zip(tops, overlap, strict=True)]}  # fmt: skip


def save_influence(path: Path, found: Influence) -> None:
    """Write `found` atomically. Its meta must name the source's fingerprint: meta["inputs"]["source"]."""
    arrays = {name: getattr(found, name) for name in ("influence", "stderr", "masks", "accuracy")}
    save_npz(path, arrays, {**found.meta, "kind": KIND})


def load_influence(path: Path, *, beton: Beton) -> Influence:
    """Load and validate the influences of the classes of `beton`; refuse those that were found for another one."""
    arrays, meta = load_npz(path, KIND)
    influence = require_array(path, arrays, "influence", dtype="float64", ndim=1)
    stderr = require_array(path, arrays, "stderr", dtype="float64", ndim=1)
    masks = require_array(path, arrays, "masks", dtype="bool", ndim=2)
    accuracy = require_array(path, arrays, "accuracy", dtype="float64", ndim=1)
    inputs = meta.get("inputs")
    expected = inputs.get("source") if isinstance(inputs, dict) else None
    check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
    shapes = (influence.shape, stderr.shape, masks.shape)
    wanted = ((beton.num_classes,), (beton.num_classes,), (len(accuracy), beton.num_classes))
    if shapes != wanted or not all(np.isfinite(array).all() for array in (influence, stderr, accuracy)):
        raise UserError(f"{path} holds influences that do not fit its models: make it again with `dp4tl influence`")
    return Influence(influence, stderr, masks, accuracy, meta)
