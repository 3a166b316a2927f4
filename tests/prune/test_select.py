"""Ranking, amounts, combining and lists: exact, with a rule for every tie."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp4tl_dist.errors import UserError
from dp4tl_dist.prune import select

CLASSES = ("tench", "goldfish", "great white shark", "7", "hash # tag", "tench")
AFFINITIES = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 0.25, 3.0])


@given(st.lists(st.tuples(st.integers(0, 3), AFFINITIES), min_size=1, max_size=30))
def test_ranking_is_votes_then_affinity_then_id(pairs: list[tuple[int, float]]) -> None:
    oracle = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], -pairs[i][1], i))
    votes, affinity = np.array([v for v, _ in pairs]), np.array([a for _, a in pairs])
    ranking = select.rank_groups(votes, affinity)
    assert ranking.dtype == np.int64
    assert ranking.tolist() == oracle


def test_ranking_of_large_votes_is_exact() -> None:
    votes = np.array([2**53, 2**53 + 1, 2**53])  # float64 cannot tell these apart
    assert select.rank_groups(votes, np.zeros(3)).tolist() == [1, 0, 2]


@given(st.integers(1, 2000), st.integers(1, 1000))
def test_share_rounds_halves_up(num_groups: int, thousandths: int) -> None:
    oracle = max(1, (2 * thousandths * num_groups + 1000) // 2000)
    assert select.count_for_share(num_groups, thousandths / 1000) == oracle


def test_share_means_the_decimal_that_is_written() -> None:
    assert 0.285 * 100 < 28.5  # as floats
    assert select.count_for_share(100, 0.285) == 29
    assert select.count_for_share(1000, 1e-9) == 1
    assert select.count_for_share(7, 1) == 7


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(UserError, match="--keep"):
        select.count_for_share(10, share)
    with pytest.raises(UserError, match="--coverage"):
        select.count_for_coverage(np.array([3, 2]), share)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.integers(1, 100))
def test_coverage_is_the_smallest_count(counts: list[int], percent: int) -> None:
    votes = np.sort(np.array(counts))[::-1]
    oracle = next(k for k in range(1, len(votes) + 1) if Fraction(int(votes[:k].sum()) * 100, percent) >= votes.sum())
    assert select.count_for_coverage(votes, percent / 100) == oracle
    normalised = np.round(votes / votes.sum(), select.DECIMALS)
    assert abs(select.count_for_coverage(normalised, percent / 100) - oracle) <= 1


def test_coverage_counts_in_whole_votes() -> None:
    assert 0.07 * 100 > 7  # as floats
    assert select.count_for_coverage(np.array([7, *[1] * 93]), 0.07) == 1
    assert select.count_for_coverage(np.array([5, 3, 0, 0]), 1.0) == 2


@pytest.mark.parametrize("count", [0, -1, 11])
def test_bad_counts_are_refused(count: int) -> None:
    with pytest.raises(UserError, match="--keep-classes"):
        select.check_count(10, count)


class TestCombine:
    votes = np.array([[90, 10, 0, 0], [0, 1, 1, 8]])
    affinity = np.array([[80.0, 15.0, 4.0, 1.0], [0.5, 1.5, 2.0, 6.0]])

    def test_one_target_is_left_as_it_is(self) -> None:
        for how in select.COMBINE:
            votes, affinity = select.combine(self.votes[:1], self.affinity[:1], how=how)
            assert votes.dtype == np.int64
            assert (votes == self.votes[0]).all() and (affinity == self.affinity[0]).all()

    def test_normalised_gives_each_target_one_voice(self) -> None:
        votes, affinity = select.combine(self.votes, self.affinity)
        np.testing.assert_allclose(votes, [0.9, 0.2, 0.1, 0.8], atol=1e-12)
        np.testing.assert_allclose(affinity, [0.85, 0.3, 0.24, 0.61], atol=1e-12)

    def test_sum_and_max(self) -> None:
        votes, affinity = select.combine(self.votes, self.affinity, how="sum")
        assert np.array_equal(votes, select.combine(self.votes, self.affinity, how="counts")[0])
        assert votes.tolist() == [90, 11, 1, 8] and affinity.tolist() == [80.5, 16.5, 6.0, 7.0]
        votes, _ = select.combine(self.votes, self.affinity, how="max")
        np.testing.assert_allclose(votes, [0.9, 0.1, 0.1, 0.8], atol=1e-12)

    def test_weights(self) -> None:
        votes, _ = select.combine(self.votes, self.affinity, weights=[1, 3])
        np.testing.assert_allclose(votes, [0.225, 0.1, 0.075, 0.6], atol=1e-12)
        votes, _ = select.combine(self.votes, self.affinity, how="sum", weights=[1, 1])
        np.testing.assert_allclose(votes, [45, 5.5, 0.5, 4], atol=1e-12)

    def test_equal_shares_tie(self) -> None:
        votes = np.array([[1, 3, 6], [2, 0, 8]])  # 0.1 + 0.2 and 0.3 + 0.0, which floats tell apart
        combined, _ = select.combine(votes, np.zeros((2, 3)))
        assert combined[0] == combined[1]

    def test_empty_groups_stay_last(self) -> None:
        affinity = np.array([[-1.0, -np.inf], [-2.0, -np.inf]])
        for how in select.COMBINE:
            _, combined = select.combine(np.array([[5, 0], [5, 0]]), affinity, how=how, weights=[1, 2])
            assert combined[1] == -np.inf and np.isfinite(combined[0])

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [2.0, -1.0]])
    def test_bad_weights(self, weights: list[float]) -> None:
        with pytest.raises(UserError, match="--weights"):
            select.combine(self.votes, self.affinity, weights=weights)

    def test_unknown_way(self) -> None:
        with pytest.raises(UserError, match="normalised"):
            select.combine(self.votes, self.affinity, how="mean")


class TestRandomChoice:
    def test_is_a_function_of_the_seed(self) -> None:
        # Pinned: the same classes on every machine and every numpy.
        assert select.random_choice(20, 5, seed=0).tolist() == PINNED
        assert select.random_choice(20, 5, seed=1).tolist() != PINNED

    @given(st.integers(1, 60), st.data())
    def test_nested_sorted_unique(self, num_items: int, data: st.DataObject) -> None:
        small, large = sorted(data.draw(st.tuples(st.integers(1, num_items), st.integers(1, num_items))))
        few, many = (select.random_choice(num_items, count, seed=7) for count in (small, large))
        assert len(few) == small and (np.diff(many) > 0).all() and many.max() < num_items
        assert set(few) <= set(many)

    def test_every_item_is_as_likely(self) -> None:
        counts = np.bincount(np.concatenate([select.random_choice(10, 3, seed=s) for s in range(2000)]), minlength=10)
        assert abs(counts - 600).max() < 5 * np.sqrt(600 * 0.7)

    def test_bad_seed(self) -> None:
        with pytest.raises(UserError, match="--seed"):
            select.random_choice(10, 3, seed=-1)


PINNED = [0, 2, 9, 11, 17]


class TestList:
    def read(self, folder: Path, text: str) -> list[int]:
        path = folder / "list.txt"
        path.write_text(text)
        return select.read_list(path, CLASSES).tolist()

    def test_names_ids_and_comments(self, tmp_path: Path) -> None:
        text = "# sea life\ngreat white shark  # the film\n\n1\n  tench\t# twice\n0\nhash # tag\n"
        assert self.read(tmp_path, text) == [0, 1, 2, 4]

    def test_a_name_comes_before_an_id(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, "7\n") == [3]

    def test_unknown_names_list_close_ones(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"list.txt:2: .*'goldfisch'.*'goldfish'") as caught:
            self.read(tmp_path, "tench\ngoldfisch\n")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "says"), [("", "lists no class"), ("# x\n", "lists no class"), ("6\n", "past the")]
    )
    def test_bad_lists(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            self.read(tmp_path, text)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot read"):
            select.read_list(tmp_path / "none.txt", CLASSES)
        (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="not text"):
            select.read_list(tmp_path / "bytes", CLASSES)
