"""The subset file: which samples of one beton a pruned run keeps, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.order import check_indices
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npzs

KIND = "subset"


@dataclass(frozen=True, eq=False)
class Subset:
    indices: NDArray[np.int64]
    """Kept positions in the source, sorted and distinct."""
    groups: NDArray[np.int64]
    """Kept classes or clusters, sorted; empty where single samples were chosen."""
    ratio: float
    """The share that was dropped, of groups (or of samples where there are no groups)."""
    method: str
    meta: dict[str, Any] = field(default_factory=dict)


def save_subset(path: Path, subset: Subset) -> None:
    """Write `subset` atomically. Its meta must name the source's fingerprint: meta["inputs"]["source"]."""
    save_subsets({path: subset})


def save_subsets(subsets: Mapping[Path, Subset]) -> None:
    """Like `save_subset` for subsets that belong together: an old one never lies beside a new one (`atomic_files`)."""
    contents = {}
    for path, subset in subsets.items():
        meta = {**subset.meta, "kind": KIND, "method": subset.method, "ratio": subset.ratio}
        contents[path] = ({"indices": subset.indices, "groups": subset.groups}, meta)
    save_npzs(contents)


def load_subset(path: Path, *, beton: Beton | None) -> Subset:
    """Load and validate a subset; with `beton`, refuse one that was made for another file."""
    arrays, meta = load_npz(path, KIND)
    indices = require_array(path, arrays, "indices", dtype="int64", ndim=1)
    groups = require_array(path, arrays, "groups", dtype="int64", ndim=1)
    ratio, method = meta.pop("ratio", None), meta.pop("method", None)
    if not isinstance(ratio, float | int) or not 0 <= ratio <= 1 or not isinstance(method, str):
        raise UserError(f"{path} has the ratio {ratio!r} and the method {method!r}: make it again with `dp4tl prune`")
    if beton is not None:
        inputs = meta.get("inputs")
        expected = inputs.get("source") if isinstance(inputs, dict) else None
        check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
        check_indices(indices, beton.num_samples, what=str(path))
    rising = all((ids[:1] >= 0).all() and (ids[1:] > ids[:-1]).all() for ids in (indices, groups))
    if len(indices) == 0 or not rising:
        raise UserError(f"{path} is empty, unsorted or has repeats: make it again with `dp4tl prune`")
    return Subset(indices, groups, float(ratio), method, meta)


def samples_of_groups(group_of_sample: NDArray[np.integer], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the samples whose group is in `groups`, sorted."""
    return np.flatnonzero(np.isin(group_of_sample, groups)).astype(np.int64)
