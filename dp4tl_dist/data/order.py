"""Which samples make which batch on which rank: pure functions of their arguments, numpy only.

Randomness is the raw bit stream of a counter-based generator keyed by (seed, epoch). numpy keeps bit streams stable
over its versions, and does not promise that for what its Generator methods make of them.
"""

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError

Indices = NDArray[np.int64]


def check_indices(indices: NDArray[np.integer], num_samples: int, *, what: str) -> Indices:
    """`indices` as int64 (n,), once they are proved to be distinct integers in [0, num_samples)."""
    array = np.asarray(indices)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{what}: indices must be one row of integers, not {array.dtype} with {array.ndim} axes")
    if len(array) == 0:
        return array.astype(np.int64)
    if array.min() < 0 or array.max() >= num_samples:
        raise UserError(f"{what}: indices from {array.min()} to {array.max()} do not fit {num_samples} samples")
    seen = np.zeros(num_samples, bool)
    seen[array] = True
    if np.count_nonzero(seen) != len(array):
        raise UserError(f"{what}: {len(array) - np.count_nonzero(seen)} indices are repeated")
    return array.astype(np.int64)


def epoch_order(kept: Indices, pages: Indices | None = None, *, seed: int, epoch: int, window: int = 64) -> Indices:
    """A random permutation of `kept` (n,) that depends on the set `kept`, seed and epoch alone.

    With `pages` (n,), the page of each element of `kept`, pages are shuffled and samples are drawn from a moving window
    of about `window` pages: each page is needed during one short stretch of the epoch only, so that a file larger than
    memory is read about once. O(n log n), no loop: a sample's sort key is its page's place plus a random offset.
    """
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64 and window > 0):
        raise UserError(f"seed {seed} and epoch {epoch} must be non-negative, and window {window} positive")
    if pages is not None and len(pages) != len(kept):
        raise UserError(f"{len(pages)} pages were given for {len(kept)} samples")
    if (kept[1:] < kept[:-1]).any():
        by_id = np.argsort(kept, kind="stable")
        kept, pages = kept[by_id], None if pages is None else pages[by_id]
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    if pages is not None:
        names, place = np.unique(pages, return_inverse=True)
        # A window over the whole file is no window: a plain shuffle is more even, and costs the same reads.
        if len(names) > window:
            rank_of_page = np.argsort(np.argsort(bits.random_raw(len(names)), kind="stable"))
            offset = (bits.random_raw(len(kept)) >> np.uint64(11)) * 2.0**-53
            return kept[np.argsort(rank_of_page[place] + window * offset, kind="stable")]
    return kept[np.argsort(bits.random_raw(len(kept)), kind="stable")]


def rank_batches(order: Indices, *, batch_size: int, num_ranks: int, rank: int, drop_first: int = 0) -> Indices:
    """This rank's share of every full step, int64 (steps, batch_size // num_ranks).

    `batch_size` is global: step t is order[drop_first + t * batch_size :][:batch_size], cut into even, contiguous
    parts for the ranks, so its samples do not depend on their number. `drop_first` counts samples already seen in this
    epoch; the incomplete last batch is dropped.
    """
    _check_ranks(batch_size, num_ranks, rank)
    if batch_size % num_ranks:
        raise UserError(f"the global batch of {batch_size} does not divide among {num_ranks} ranks: change one of them")
    if len(order) < batch_size:
        raise UserError(f"{len(order)} samples do not fill one global batch of {batch_size}: use a smaller batch_size")
    if not 0 <= drop_first <= len(order):
        raise UserError(f"drop_first {drop_first} is outside an epoch of {len(order)} samples")
    steps = (len(order) - drop_first) // batch_size
    batches = order[drop_first : drop_first + steps * batch_size]
    return batches.reshape(steps, num_ranks, batch_size // num_ranks)[:, rank]


def spread_batches(order: Indices, *, batch_size: int, num_ranks: int, rank: int, first: int = 0) -> list[Indices]:
    """This rank's share of every step from `first` on, where no sample is left out.

    An epoch has as few steps as batches of at most `batch_size` (global) take. Its samples are spread over them, and
    each step's over the ranks, evenly to one and in their order, so that a step's samples do not depend on the number
    of ranks.
    """
    _check_ranks(batch_size, num_ranks, rank)
    steps = np.array_split(order, -(-len(order) // batch_size))
    return [np.array_split(step, num_ranks)[rank] for step in steps[first:]]


def inference_batches(kept: Indices, *, batch_size: int, num_ranks: int, rank: int) -> list[Indices]:
    """This rank's batches of `kept`; over all ranks they are `kept` in order, each sample once.

    Batches are cut as for a single rank (the last one may be short) and ranks take contiguous runs of whole batches:
    what shares a batch, hence every number computed from it, is the same for any number of ranks.
    """
    _check_ranks(batch_size, num_ranks, rank)
    num_batches = -(-len(kept) // batch_size)
    first, last = rank * num_batches // num_ranks, (rank + 1) * num_batches // num_ranks
    return [kept[i * batch_size : (i + 1) * batch_size] for i in range(first, last)]


def _check_ranks(batch_size: int, num_ranks: int, rank: int) -> None:
    if batch_size < 1 or num_ranks < 1 or not 0 <= rank < num_ranks:
        raise UserError(f"batch_size {batch_size}, num_ranks {num_ranks} and rank {rank} do not go together")
