"""Choosing samples by their scores: against a slow oracle, and the properties that arms rely on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError
from dp4tl_dist.prune.ranking import RULES, choose_samples

CASES = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=30)
SHARES = st.sampled_from([0.01, 0.2, 0.25, 0.5, 0.75, 1.0])


def in_order(scores: list[float], members: list[int], rule: str) -> list[int]:
    """Members, best first, the slow way."""
    rising = sorted(members, key=lambda i: (scores[i], i))
    if rule == "lowest":
        return rising
    if rule == "highest":
        return sorted(members, key=lambda i: (-scores[i], i))
    middle, found = (len(rising) - 1) / 2, []
    while rising:
        ranks = range(len(found) + len(rising))
        # Whichever end is farther from the middle goes last; the upper one of two that are equally far.
        low, high = _ends(found, rising, ranks)
        farther = -1 if high - middle >= middle - low else 0
        found.append(rising.pop(farther))
    return found[::-1]


def _ends(found: list[int], rising: list[int], ranks: range) -> tuple[int, int]:
    dropped_high = (len(found) + 1) // 2
    low = len(found) - dropped_high
    return ranks[low], ranks[len(ranks) - 1 - dropped_high]


@given(CASES, SHARES, st.sampled_from(RULES), st.booleans(), st.booleans())
def test_against_the_oracle(
    cases: list[tuple[int, int]], share: float, rule: str, balanced: bool, reverse: bool
) -> None:
    scores, labels = [float(score) for score, _ in cases], [label for _, label in cases]
    groups = [[i for i, own in enumerate(labels) if own == label] for label in range(4)] if balanced else None
    expected: list[int] = []
    for members in groups or [list(range(len(scores)))]:
        ranking = in_order(scores, members, rule)
        count = max(1, int(share * len(members) + 0.5)) if members else 0
        expected += ranking[::-1][:count] if reverse else ranking[:count]
    labels_of = np.array(labels, np.int64) if balanced else None
    found = choose_samples(np.array(scores, np.float32), share, rule=rule, labels=labels_of, reverse=reverse)
    assert found.tolist() == sorted(expected) and found.dtype == np.int64


def test_the_middle_of_five_and_of_four() -> None:
    def kept(scores: list[float], share: float) -> list[int]:
        return choose_samples(np.array(scores), share, rule="middle").tolist()

    assert kept([9, 1, 5, 7, 3], 0.2) == [2]
    assert kept([9, 1, 5, 7, 3], 0.6) == [2, 3, 4]
    assert kept([4, 1, 3, 2], 0.5) == [2, 3]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("balanced", [False, True])
def test_a_smaller_share_is_a_part_of_a_larger_one(rule: str, balanced: bool) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 200).astype(np.float32), rng.integers(0, 7, 200)
    last: NDArray[np.int64] = np.zeros(0, np.int64)
    for share in (0.05, 0.1, 0.3, 0.31, 0.8, 1.0):
        kept = choose_samples(scores, share, rule=rule, labels=labels if balanced else None)
        assert set(last) <= set(kept)
        last = kept
    assert last.tolist() == list(range(200))


def test_random_keys_of_64_bits_keep_their_order() -> None:
    keys = np.array([2**64 - 1, 2**63, 2**53 + 1, 2**53], np.uint64)
    assert choose_samples(keys, 0.25, rule="lowest").tolist() == [3]


def test_an_unknown_rule() -> None:
    with pytest.raises(UserError, match="highest, lowest, middle"):
        choose_samples(np.zeros(3), 0.5, rule="top")
