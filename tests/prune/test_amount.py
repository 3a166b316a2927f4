"""How much to keep: the coverage curve, the knee and the suggestion, against slow, exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp4tl_dist.prune.amount import coverage_curve, knee, suggest

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any)


@given(COUNTS)
def test_curve_and_knee(counts: list[int]) -> None:
    ordered = sorted(counts, reverse=True)
    total = sum(ordered)
    oracle = [Fraction(sum(ordered[: k + 1]), total) for k in range(len(ordered))]
    assert coverage_curve(np.array(ordered)) == pytest.approx([float(share) for share in oracle])
    # The first point that lies farthest above the diagonal.
    above = [share - Fraction(k + 1, len(ordered)) for k, share in enumerate(oracle)]
    farthest = max(above)
    assert knee(np.array(ordered)) == (len(ordered) if len(set(ordered)) == 1 else above.index(farthest) + 1)


@given(COUNTS)
def test_knee_of_shares_is_that_of_counts(counts: list[int]) -> None:
    """Votes of several targets are shares, rounded; an average that is met exactly is no more than the average."""
    ordered = np.sort(np.array(counts))[::-1]
    shares = np.round(ordered / ordered.sum(), 12)
    expected = knee(ordered)
    if not (ordered * len(ordered) == ordered.sum()).any():
        assert knee(shares) == expected


@pytest.mark.parametrize(
    ("votes", "count", "rule"),
    [
        ([10, 9, 1, 0, 0, 0, 0, 0, 0, 0], 2, "coverage"),  # 19 of 20 votes
        ([9, 8, 2, 1, 0, 0, 0, 0, 0, 0], 3, "coverage"),
        ([20, 0, 0, 0, 0, 0, 0, 0, 0, 0], 2, "least"),  # 20 % of 10
        ([5] * 10, 10, "coverage"),
        ([1, 1, 1, 1, 0], 4, "coverage"),
        ([1001, 1000, *[0] * 8], 2, "coverage"),
        ([500, 480, 15, 5, 0, 0, 0, 0, 0, 0], 2, "coverage"),
    ],
)
def test_suggestion(votes: list[int], count: int, rule: str) -> None:
    found = suggest(np.array(votes))
    assert (found.count, found.rule) == (count, rule)
    assert found.reason and "\n" not in found.reason


def test_the_knee_may_ask_for_more_than_coverage() -> None:
    votes = np.array([*[317] * 30, *[110] * 3, *[2] * 66, 28])[np.r_[:33, 99, 33:99]]  # 100 a class on average
    assert votes.sum() == 10000 and knee(votes) == 33
    assert (suggest(votes).count, suggest(votes).rule) == (33, "knee")


@given(COUNTS)
def test_a_suggestion_holds_enough(counts: list[int]) -> None:
    votes = np.sort(np.array(counts))[::-1]
    found = suggest(votes)
    assert votes[: found.count].sum() >= 0.95 * votes.sum() - 1e-9
    assert found.count >= max(knee(votes), 0.2 * len(votes) - 0.5)
