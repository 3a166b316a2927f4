"""How many samples a subset will keep, before it is chosen: bounds, which are one where the choice has no say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError
from dp4tl_dist.prune.amount import LEAST
from dp4tl_dist.prune.choice import parse_within
from dp4tl_dist.prune.select import count_for_share

Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Kept:
    """At least and at most so many samples, of so many classes (none where single samples are chosen)."""

    least: int
    most: int
    groups: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


def kept_classes(
    options: Mapping[str, Sequence[str]], sizes: Sizes, *, like: Kept | None, clusters: int, ranked: bool
) -> Kept:
    """What `prune` keeps of classes of these sizes (classes,), or of so many clusters. ranked: by votes or influence,
    which put classes without samples last."""
    total = clusters or len(sizes)
    if like is not None:
        if like.groups is None:
            raise UserError("--like names single samples, and here classes are chosen")
        low, high = like.groups
    elif options["keep"][0] == "auto":
        low, high = count_for_share(total, LEAST), total
    else:
        low = high = count_for_share(total, float(options["keep"][0]))
    within = parse_within(options["within-class"][0]) if "within-class" in options else None
    share = within[1] if within else 1.0
    if clusters:
        # Their sizes are not known before k-means has run; on average they are even.
        samples = int(sizes.sum())
        return Kept(max(low, int(share * samples * low / total)), samples, (low, high))
    inside = np.sort([count_for_share(int(size), share) if size else 0 for size in sizes])
    chosen = inside[inside > 0] if ranked else inside
    return Kept(int(chosen[:low].sum()), int(inside[-high:].sum()), (low, high))


def kept_samples(share: float, sizes: Sizes, *, per_class: bool) -> int:
    """How many samples stay where they are chosen one by one, of the whole dataset or of every class alike."""
    if not per_class:
        return count_for_share(int(sizes.sum()), share)
    return sum(count_for_share(int(size), share) for size in sizes if size)
