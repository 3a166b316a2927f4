"""The clusters file: where k-means put the centres of a source, and which cluster each of its samples is in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz

KIND = "clusters"
NUM_NEAREST = 6


@dataclass(frozen=True, eq=False)
class Clusters:
    centres: NDArray[np.float64]
    """(clusters, dim): the mean feature of each; NaN for a cluster without samples."""
    assignment: NDArray[np.int32]
    """(samples,): the cluster of each sample, by its position in the source."""
    distances: NDArray[np.float32]
    """(samples,): how far each sample's feature is from its cluster's centre."""
    start: NDArray[np.int64]
    """(clusters,): positions of the samples whose features were the first centres."""
    inertia: float
    """The sum of the squared distances."""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_clusters(self) -> int:
        return len(self.centres)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(clusters,): samples in each."""
        return np.bincount(self.assignment, minlength=self.num_clusters)


def nearest(clusters: Clusters, count: int = NUM_NEAREST) -> NDArray[np.int64]:
    """(clusters, count): positions of the samples nearest to each centre, nearest first; -1 where there are fewer."""
    return nearest_of(clusters.assignment, clusters.distances, clusters.num_clusters, count)


def nearest_of(
    groups: NDArray[np.integer], distances: NDArray[np.floating], num_groups: int, count: int = NUM_NEAREST
) -> NDArray[np.int64]:
    """(num_groups, count): positions in `groups` (n,) of each one's samples with the least `distances` (n,), the least
    first and of equals the first; -1 where there are fewer."""
    found = np.full((num_groups, count), -1, np.int64)
    order = np.lexsort((np.arange(len(groups)), distances, groups))
    ends = np.cumsum(np.bincount(groups, minlength=num_groups))
    for i, members in enumerate(np.split(order, ends[:-1])):
        found[i, : len(members[:count])] = members[:count]
    return found


def save_clusters(path: Path, clusters: Clusters) -> None:
    """Write `clusters` atomically. Its meta must name inputs["source"] and inputs["surrogate"]."""
    arrays: dict[str, NDArray[Any]] = {
        "centres": clusters.centres, "assignment": clusters.assignment, "distances": clusters.distances,
        "start": clusters.start, "inertia": np.float64(clusters.inertia).reshape(1),
    }  # fmt: skip
    save_npz(path, arrays, {**clusters.meta, "kind": KIND})


def load_clusters(path: Path, *, beton: Beton | None = None) -> Clusters:
    """Load and validate clusters; with `beton` (the source), refuse those of another one."""
    arrays, meta = load_npz(path, KIND)
    centres = require_array(path, arrays, "centres", dtype="float64", ndim=2)
    assignment = require_array(path, arrays, "assignment", dtype="int32", ndim=1)
    distances = require_array(path, arrays, "distances", dtype="float32", ndim=1)
    start = require_array(path, arrays, "start", dtype="int64", ndim=1)
    inertia = require_array(path, arrays, "inertia", dtype="float64", ndim=1)
    if beton is not None:
        inputs = meta.get("inputs")
        expected = inputs.get("source") if isinstance(inputs, dict) else None
        check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
    if (
        not fit_together(assignment, len(centres), beton)
        or len(distances) != len(assignment)
        or len(start) != len(centres)
        or len(inertia) != 1
        or np.isinf(centres).any()
        or not np.isfinite(distances).all()
    ):
        raise UserError(f"{path} holds clusters that do not fit together: make it again with `dp4tl cluster`")
    return Clusters(centres, assignment, distances, start, float(inertia[0]), meta)


def fit_together(assignment: NDArray[np.int32], num_clusters: int, beton: Beton | None = None) -> bool:
    """Whether `assignment` puts each sample (of `beton`) into one of so many clusters."""
    if not len(assignment) or (beton is not None and len(assignment) != beton.num_samples):
        return False
    return bool(assignment.min() >= 0 and assignment.max() < num_clusters)
