"""Lloyd's k-means on features that are spread over the ranks: the same bits for any number of them.

A step is one pass over the stored features. Sums of members are whole numbers of a small unit, added exactly, and a
sample's nearest centre depends on its own feature and the centres alone; so nothing depends on who holds which samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.prune.select import random_choice
from dp4tl_dist.prune.store import Store
from dp4tl_dist.prune.votes import CHUNK, exact_distances, exact_squares, fitting_unit, from_units, to_units
from dp4tl_dist.world import World, all_sum

STARTS = ("kmeans++", "sample")
# k-means++ draws from so many samples a cluster: over all of a large source it would take a pass for each cluster.
SAMPLES_PER_CLUSTER = 16
MIN_SAMPLES = 8192
Report = Callable[[int, float], None]
"""report(steps done, inertia)"""


@dataclass(frozen=True, eq=False)
class Lloyd:
    """What k-means came to, the same on every rank but for `assignment` and `distances`."""

    centres: NDArray[np.float64]
    """(clusters, dim); NaN for a cluster without samples."""
    assignment: NDArray[np.int32]
    """(rows of this rank,): each one's nearest centre, the lowest of equals."""
    distances: NDArray[np.float32]
    """(rows of this rank,)"""
    inertia: tuple[float, ...]
    """The sum of squared distances at the start and after each step."""
    converged: bool
    reseeded: int
    """How often an empty cluster was given a sample."""


@dataclass
class _Pass:
    """The sums of one pass over all rows, in units; exact on every rank once they are reduced."""

    sums: NDArray[np.int64]
    counts: NDArray[np.int64]
    inertia: float
    moved: int


def lloyd(
    store: Store,
    world: World,
    start: NDArray[np.float64],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    report: Report = lambda step, inertia: None,
) -> Lloyd:
    """k-means from the centres `start` (clusters, dim), for at most so many `iterations`.

    It stops where no sample moves, or where inertia falls by less than the share `tolerance`. A cluster that loses its
    last sample is given the one that is farthest from its own centre. All ranks call it. The assignment is the nearest
    of the returned centres.
    """
    centres, history, reseeded, converged = start.astype(np.float64), [], 0, False
    assignment = np.full(store.num_rows, -1, np.int32)
    distances = np.zeros(store.num_rows, np.float32)
    unit = fitting_unit(store.largest, store.num_samples)
    for step in range(iterations + 1):
        found = _pass(store, world, centres, assignment, distances, unit)
        history.append(found.inertia)
        report(step, found.inertia)
        empty = np.flatnonzero(found.counts == 0)
        gained = history[-2] - history[-1] if step else math.inf
        settled = found.moved == 0 or gained <= tolerance * history[-2] if step else False
        given = _farthest(store, world, assignment, distances, len(empty)) if len(empty) and step < iterations else []
        if settled and not given:
            converged = True
        if converged or step == iterations:
            break
        reseeded += len(given)
        centres = _moved_centres(store, world, centres, found, empty[: len(given)], given, unit)
    centres[found.counts == 0] = np.nan
    return Lloyd(centres, assignment, distances, tuple(history), converged, reseeded)


def _pass(
    store: Store,
    world: World,
    centres: NDArray[np.float64],
    assignment: NDArray[np.int32],
    distances: NDArray[np.float32],
    unit: float,
) -> _Pass:
    """Assign every row of this rank, in place, and sum up over all ranks."""
    device, num_clusters = torch.device(world.device), len(centres)
    middle = torch.from_numpy(centres).to(device)
    sums = torch.zeros(middle.shape, dtype=torch.int64, device=device)
    # Squared distances are at most 4 dim largest^2.
    square_unit = fitting_unit(4 * store.dim * store.largest**2, store.num_samples)
    counts, squares, moved = np.zeros(num_clusters, np.int64), 0, 0
    for first, block in store.blocks():
        for offset in range(0, len(block), step := max(1, CHUNK // num_clusters)):
            rows = torch.from_numpy(block[offset : offset + step]).to(device).double()
            here = slice(first + offset, first + offset + len(rows))
            found = nearest_centres(rows, middle)
            square = exact_squares(rows - middle[found])
            sums.index_add_(0, found, to_units(rows, unit))
            squares += int(to_units(square, square_unit).sum())
            group = found.cpu().numpy().astype(np.int32)
            counts += np.bincount(group, minlength=num_clusters)
            moved += int(np.count_nonzero(assignment[here] != group))
            assignment[here], distances[here] = group, square.sqrt().cpu().numpy()
    numbers = all_sum(world, np.array([squares, moved], np.int64))
    return _Pass(
        all_sum(world, sums.cpu().numpy()), all_sum(world, counts), float(numbers[0]) * square_unit, int(numbers[1])
    )


def nearest_centres(rows: Tensor, centres: Tensor) -> Tensor:
    """int64 (n,): the nearest of `centres` (clusters, dim) to each of `rows` (n, dim), the lowest of equals.

    Both are float64. A plain matrix product finds it; where another is as near but for its rounding, `exact_distances`
    decide, so that the result is always theirs.
    """
    scores = (centres * centres).sum(dim=1) - 2 * (rows @ centres.T)
    best, found = scores.min(dim=1)
    size = float(rows.abs().max()) + float(centres.abs().max())
    close = (scores <= best[:, None] + rows.shape[1] * size**2 * 2.0**-36).sum(dim=1) > 1
    if close.any():
        found[close] = exact_distances(rows[close], centres).argmin(dim=1)
    return found


def _moved_centres(
    store: Store, world: World, centres: NDArray[np.float64], found: _Pass, empty: NDArray[np.int64],
    given: list[tuple[int, int]], unit: float,
) -> NDArray[np.float64]:  # fmt: skip
    """The means of the members, once the clusters `empty` have been given the samples (position, old cluster)."""
    sums, counts = found.sums.copy(), found.counts.copy()
    if given:
        rows = store.gather(world, np.array([position for position, _ in given]))
        units = to_units(torch.from_numpy(rows), unit).numpy()
        for cluster, (_, old), row in zip(empty, given, units, strict=True):
            sums[old] -= row
            counts[old] -= 1
            sums[cluster], counts[cluster] = row, 1
    means = from_units(torch.from_numpy(sums), unit).numpy() / np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, means, centres)


def _farthest(
    store: Store, world: World, assignment: NDArray[np.int32], distances: NDArray[np.float32], count: int
) -> list[tuple[int, int]]:
    """(position, cluster) of the `count` samples farthest from their centres, of all ranks; ties go to the first.

    Samples that are their centre are none of them, so there may be fewer.
    """
    mine = np.lexsort((np.arange(len(distances)), -distances))[:count]
    table = np.zeros((world.num_ranks, count, 3), np.float64)  # distance, position, cluster; whole numbers are exact
    table[world.rank, : len(mine)] = np.stack([distances[mine], mine + store.first, assignment[mine]], axis=1)
    rows = all_sum(world, table).reshape(-1, 3)
    rows = rows[rows[:, 0] > 0]
    best = rows[np.lexsort((rows[:, 1], -rows[:, 0]))[:count]]
    return [(int(position), int(cluster)) for _, position, cluster in best]


# ---------------------------------------------------------------- the start


def start_positions(store: Store, world: World, num_clusters: int, *, how: str, seed: int) -> NDArray[np.int64]:
    """The samples (clusters,) whose features are the first centres; the same on every rank.

    sample: drawn evenly. kmeans++: each in proportion to its squared distance from those before it, the best of a few
    draws, among at most `SAMPLES_PER_CLUSTER` samples a cluster (or `MIN_SAMPLES`), which are drawn evenly.
    """
    if how == "sample":
        return random_choice(store.num_samples, num_clusters, seed=seed)
    size = min(store.num_samples, max(MIN_SAMPLES, SAMPLES_PER_CLUSTER * num_clusters))
    pool = random_choice(store.num_samples, size, seed=seed)
    rows = torch.from_numpy(store.gather(world, pool)).to(world.device).double()
    return pool[_plus_plus(rows, num_clusters, seed=seed)]


def _plus_plus(rows: Tensor, num_clusters: int, *, seed: int) -> NDArray[np.int64]:
    """Rows (clusters,) of `rows` (n, dim) float64, chosen greedily by k-means++. Exact, hence equal on every rank."""
    bits = np.random.Philox(key=[seed, 0x2B2B])
    trials = 2 + int(math.log(num_clusters))
    chosen = [int(bits.random_raw() % np.uint64(len(rows)))]
    left = (exact_distances(rows, rows[chosen]) ** 2)[:, 0].cpu().numpy()
    while len(chosen) < num_clusters:
        ladder = np.cumsum(left)
        if ladder[-1] <= 0:  # fewer distinct features than clusters: the first that are left
            rest = np.setdiff1d(np.arange(len(rows)), chosen)[: num_clusters - len(chosen)]
            return np.array([*chosen, *rest], np.int64)
        draws = (bits.random_raw(trials) >> np.uint64(11)) * 2.0**-53 * ladder[-1]
        options = np.minimum(np.searchsorted(ladder, draws, side="right"), len(rows) - 1)
        squares = (exact_distances(rows, rows[torch.from_numpy(options)]) ** 2).cpu().numpy()  # (n, trials)
        after = np.minimum(left[:, None], squares)
        best = int(np.argmin([column.sum() for column in after.T]))
        chosen.append(int(options[best]))
        left = np.ascontiguousarray(after[:, best])
    return np.array(chosen, np.int64)
