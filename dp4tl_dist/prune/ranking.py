"""From one score a sample to the samples that are kept: pure functions, numpy only, exact for any machine."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import one_of
from dp4tl_dist.prune.select import count_for_share

RULES = ("highest", "lowest", "middle")


def choose_samples(
    scores: NDArray[Any],
    share: float,
    *,
    rule: str,
    labels: NDArray[np.int64] | None = None,
    reverse: bool = False,
) -> NDArray[np.int64]:
    """Positions, sorted, of the `share` of the samples that `rule` puts first; with `reverse` of those it puts last.

    scores: (samples,), finite. rule: "highest", "lowest", or "middle": the ranks nearest to the median, evenly to both
    sides. Equal scores go by position. labels (samples,): the share is taken of every class by itself, at least one
    sample of each. A smaller share is a part of a larger one.
    """
    one_of("rule", rule, RULES)
    keys = -scores.astype(np.float64) if rule == "highest" else scores
    groups = np.zeros(len(scores), np.int64) if labels is None else labels
    order = np.lexsort((keys, groups))  # stable: equal ones stay in the order of their positions
    sizes = np.bincount(groups)
    rank = np.arange(len(scores)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = np.repeat(sizes, sizes)
    if rule == "middle":
        rank = _from_the_middle(rank, size)
    if reverse:
        rank = size - 1 - rank
    counts = np.array([count_for_share(int(size), share) if size else 0 for size in sizes], np.int64)
    return np.sort(order[rank < np.repeat(counts, sizes)])


def _from_the_middle(rank: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each rank of a group of `size` where the median comes first, then its neighbours in turn: of 5, the
    ranks 0 1 2 3 4 have the places 3 1 0 2 4."""
    offset = 2 * rank - (size - 1)  # ..., -4, -2, 0, 2, 4, ... or ..., -3, -1, 1, 3, ...
    return np.abs(offset) - (offset < 0)
