"""How much to keep, read off the votes: the coverage curve, its knee and the size that is suggested. numpy alone."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.prune.select import DECIMALS, count_for_coverage, count_for_share

ENOUGH = 0.95
"""The share of the votes that a suggested size covers."""
LEAST = 0.2
"""The least share of the classes that is suggested: the method was published for pruning up to 80 %."""


@dataclass(frozen=True)
class Suggestion:
    """A number of classes to keep, and why."""

    count: int
    rule: str
    """Which of three numbers is the largest: "knee", "coverage" or "least"."""
    reason: str


def coverage_curve(votes_sorted: NDArray[np.number]) -> NDArray[np.float64]:
    """(groups,): the share of all votes that the first 1, 2, ... of `votes_sorted` (descending) hold."""
    reached = np.cumsum(votes_sorted, dtype=np.float64)
    return reached / reached[-1]


def knee(votes_sorted: NDArray[np.number]) -> int:
    """How many groups got more votes than the average group, or all of them where votes are even.

    There the coverage curve is farthest above the diagonal, its chord: the next group would cover less than its share.
    """
    scale = 10**DECIMALS if votes_sorted.dtype.kind == "f" else 1
    # In whole numbers, as for coverage: an average that is met exactly is not exceeded.
    whole = [int(votes) for votes in np.rint(votes_sorted * np.float64(scale))] if scale > 1 else votes_sorted.tolist()
    total = sum(whole)
    return sum(votes * len(whole) > total for votes in whole) or len(whole)


def suggest(votes_sorted: NDArray[np.number]) -> Suggestion:
    """The size that the votes suggest: the largest of the knee, ENOUGH coverage and LEAST of the groups."""
    total = len(votes_sorted)
    at_knee, enough = knee(votes_sorted), count_for_coverage(votes_sorted, ENOUGH)
    least = count_for_share(total, LEAST)
    curve = coverage_curve(votes_sorted)
    if least > max(at_knee, enough):
        found = f"{enough} classes hold {_percent(curve[enough - 1])} of the votes"
        return Suggestion(least, "least", f"{found}; less than {_percent(LEAST)} of the classes is not suggested")
    if at_knee > enough:
        held = _percent(curve[at_knee - 1])
        reason = f"{at_knee} classes got more votes than the average class, and hold {held} of them"
        if at_knee == total:
            reason = "all classes got as many votes: nothing tells them apart"
        return Suggestion(at_knee, "knee", reason)
    return Suggestion(enough, "coverage", f"these are the fewest classes that hold {_percent(ENOUGH)} of the votes")


def _percent(share: float) -> str:
    return f"{float(Fraction(round(float(share) * 1000), 10)):g} %"
