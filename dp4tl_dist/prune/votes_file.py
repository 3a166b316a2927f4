"""The votes file: who voted for what, and which source the groups belong to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz
from dp4tl_dist.prune.clusters_file import fit_together

KIND = "votes"


@dataclass(frozen=True, eq=False)
class Members:
    """Which samples of the source are in which group, where groups are clusters and labels do not tell."""

    assignment: NDArray[np.int32]
    """(samples,): the cluster of each sample, by its position in the source."""
    nearest: NDArray[np.int64]
    """(clusters, some): positions of the samples nearest to each centre, nearest first; -1 where there are fewer."""


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
    members: Members | None = None
    """None where the groups are the source's classes."""
    closest: NDArray[np.int64] | None = None
    """(classes, some): as `Members.nearest`, of FM's class means; None for LM and in older files."""

    @property
    def what(self) -> str:
        return "classes" if self.members is None else "clusters"


def same_members(left: Members | None, right: Members | None) -> bool:
    """Whether groups are the same ones: both the source's classes, or the same clusters."""
    if left is None or right is None:
        return left is right
    return np.array_equal(left.assignment, right.assignment)


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
    if votes.members is not None:
        arrays |= {"assignment": votes.members.assignment, "nearest": votes.members.nearest}
    elif votes.closest is not None:
        arrays["nearest"] = votes.closest
    save_npz(path, arrays, meta)


def load_votes(path: Path, *, beton: Beton | None = None) -> Votes:
    """Load and validate votes; with `beton` (the source), refuse those that were cast for another one."""
    arrays, meta = load_npz(path, KIND)
    sizes = require_array(path, arrays, "target_sizes", dtype="int64", ndim=1)
    predictions = require_array(path, arrays, "predictions", dtype="int64", ndim=1)
    axes = 1 if len(sizes) == 1 else 2
    votes = np.atleast_2d(require_array(path, arrays, "votes", dtype="int64", ndim=axes))
    affinity = np.atleast_2d(require_array(path, arrays, "affinity", dtype="float64", ndim=axes))
    members = closest = None
    if "assignment" in arrays:
        assignment = require_array(path, arrays, "assignment", dtype="int32", ndim=1)
        members = Members(assignment, require_array(path, arrays, "nearest", dtype="int64", ndim=2))
    elif "nearest" in arrays:
        closest = require_array(path, arrays, "nearest", dtype="int64", ndim=2)
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
        or (members is None and beton is not None and len(classes) != beton.num_classes)
        or (closest is not None and not _are_theirs(closest, len(classes), beton))
        or (members is not None and not _belong(members, len(classes), beton))
    ):
        raise UserError(f"{path} holds votes that do not add up: make it again with `dp4tl vote`")
    return Votes(votes, affinity, predictions, sizes, method, tuple(classes), meta, members, closest)


def _belong(members: Members, num_groups: int, beton: Beton | None) -> bool:
    """Whether each sample is in one of the groups, and `nearest` names samples."""
    near, num_samples = members.nearest, len(members.assignment)
    named = len(near) == num_groups and (near >= -1).all() and (near < num_samples).all()
    return bool(named) and fit_together(members.assignment, num_groups, beton)


def _are_theirs(closest: NDArray[np.int64], num_classes: int, beton: Beton | None) -> bool:
    """Whether `closest` names samples of each class (and, where the source is not there to be asked, could)."""
    if len(closest) != num_classes or (closest < -1).any():
        return False
    rows, columns = np.nonzero(closest >= 0)
    named = closest[rows, columns]
    if beton is None or not len(named):
        return True
    return bool(named.max() < beton.num_samples and (beton.labels[named] == rows).all())


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
