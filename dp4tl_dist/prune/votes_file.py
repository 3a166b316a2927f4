"""The votes file: who voted for what, and which source the groups belong to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz

KIND = "votes"


@dataclass(frozen=True, eq=False)
class Votes:
    votes: NDArray[np.int64]
    """(targets, groups): how many images of a target voted for a group."""
    affinity: NDArray[np.float64]
    """(targets, groups): summed softmax mass (LM) or minus the summed distance (FM); decides between equal votes."""
    predictions: NDArray[np.int64]
    """(images of all targets,): the group that each voted for, in the order of the targets and of their files."""
    target_sizes: NDArray[np.int64]
    """(targets,): images of each."""
    method: str
    classes: tuple[str, ...]
    """The groups' names."""
    meta: dict[str, Any] = field(default_factory=dict)


def save_votes(path: Path, votes: Votes) -> None:
    """Write `votes` atomically; one target's rows lose their first axis. Its meta must name inputs["source"]."""
    meta = {**votes.meta, "kind": KIND, "method": votes.method, "classes": list(votes.classes)}
    single = len(votes.target_sizes) == 1
    arrays: dict[str, NDArray[Any]] = {
        "votes": votes.votes[0] if single else votes.votes,
        "affinity": votes.affinity[0] if single else votes.affinity,
        "predictions": votes.predictions,
        "target_sizes": votes.target_sizes,
    }
    save_npz(path, arrays, meta)


def load_votes(path: Path, *, beton: Beton | None = None) -> Votes:
    """Load and validate votes; with `beton` (the source), refuse those that were cast for another one."""
    arrays, meta = load_npz(path, KIND)
    sizes = require_array(path, arrays, "target_sizes", dtype="int64", ndim=1)
    predictions = require_array(path, arrays, "predictions", dtype="int64", ndim=1)
    axes = 1 if len(sizes) == 1 else 2
    votes = np.atleast_2d(require_array(path, arrays, "votes", dtype="int64", ndim=axes))
    affinity = np.atleast_2d(require_array(path, arrays, "affinity", dtype="float64", ndim=axes))
    classes, method = meta.pop("classes", None), meta.pop("method", None)
    if beton is not None:
        inputs = meta.get("inputs")
        expected = inputs.get("source") if isinstance(inputs, dict) else None
        check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes) and isinstance(method, str)
    if (
        not named
        or votes.shape != (len(sizes), len(classes))
        or affinity.shape != votes.shape
        or np.isnan(affinity).any()
        or not _add_up(votes, predictions, sizes)
        or (beton is not None and len(classes) != beton.num_classes)
    ):
        raise UserError(f"{path} holds votes that do not add up: make it again with `dp4tl vote`")
    return Votes(votes, affinity, predictions, sizes, method, tuple(classes), meta)


def _add_up(votes: NDArray[np.int64], predictions: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Whether each row of votes counts what that target's images voted for."""
    num_groups = votes.shape[1]
    # Sizes are bounded before they are added, so that no sum wraps around.
    if not len(sizes) or sizes.min() < 1 or sizes.max() > len(predictions) or sizes.sum() != len(predictions):
        return False
    if predictions.min() < 0 or predictions.max() >= num_groups:
        return False
    each = np.split(predictions, np.cumsum(sizes)[:-1])
    return all(
        np.array_equal(np.bincount(own, minlength=num_groups), row) for own, row in zip(each, votes, strict=True)
    )
