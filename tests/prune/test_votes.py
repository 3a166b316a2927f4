"""LM and FM against slow oracles, on data with ties, empty groups and ragged sizes; sums that no split can change."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks

from dp4tl_dist.errors import UserError
from dp4tl_dist.prune import votes
from dp4tl_dist.world import World

CUTS = [[97], [1, 96], [40, 30, 27], [1] * 97, [96, 0, 1]]


def lm_oracle(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    found, mass = np.zeros(logits.shape[1], np.int64), np.zeros(logits.shape[1])
    for row in logits.astype(np.float64):
        found[max(range(len(row)), key=lambda c: (row[c], -c))] += 1
        weights = [math.exp(value - max(row)) for value in row]
        mass += np.array(weights) / sum(weights)
    return found, mass


def fm_oracle(
    features: NDArray[np.float32], centres: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    found, affinity = np.zeros(len(centres), np.int64), np.zeros(len(centres))
    for row in features.astype(np.float64):
        distances = [math.dist(row, centre) if not np.isnan(centre).any() else math.inf for centre in centres]
        found[min(range(len(centres)), key=lambda c: (distances[c], c))] += 1
        affinity -= np.array(distances)
    return found, affinity


def wrong_slot(features: NDArray[np.float32], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """Votes as the published code counts them: distances land in the slot of the sample, not of the class."""
    found = np.zeros(len(centres), np.int64)
    for i, row in enumerate(features):
        slots = np.zeros(max(len(centres), len(features)))
        for centre in centres:
            slots[i] = math.dist(row, centre)
        found[slots[: len(centres)].argmin()] += 1
    return found


def data(kind: str, *, n: int = 97, groups: int = 13, dim: int = 24) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Rows float32 (n, dim), centres float64 (groups, dim). "ties": small integers, equal centres, an empty group."""
    rng = np.random.default_rng(4)
    if kind == "ties":
        rows = rng.integers(0, 2, (n, dim)).astype(np.float32)
        centres = rng.integers(0, 2, (groups, dim)).astype(np.float64)
        centres[[7, 9]], centres[3] = centres[2], np.nan
        return rows, centres
    rows = np.maximum(rng.normal(size=(n, dim)), 0).astype(np.float32) * np.float32(3)
    return rows, np.maximum(rng.normal(size=(groups, dim)), 0) * 3 / 7


@pytest.mark.parametrize("kind", ["ties", "smooth"])
def test_lm_is_the_oracle(kind: str) -> None:
    logits, _ = data(kind)
    found, mass = votes.lm_votes(torch.from_numpy(logits), num_groups=24)
    expected, expected_mass = lm_oracle(logits)
    assert found.dtype == torch.int64 and mass.dtype == torch.float64
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(mass.numpy(), expected_mass, atol=97 * 2.0**-31)


@pytest.mark.parametrize("kind", ["ties", "smooth"])
@pytest.mark.parametrize("chunk", [1 << 20, 100])
def test_fm_is_the_oracle(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(votes, "CHUNK", chunk)
    features, centres = data(kind)
    found, affinity = votes.fm_votes(torch.from_numpy(features), torch.from_numpy(centres))
    expected, expected_affinity = fm_oracle(features, centres)
    assert found.dtype == torch.int64 and affinity.dtype == torch.float64
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(affinity.numpy(), expected_affinity, rtol=1e-12, atol=97 * 2.0**-31)


def test_the_oracle_catches_the_wrong_slot() -> None:
    features, centres = data("smooth")
    wrong, expected = wrong_slot(features, centres), fm_oracle(features, centres)[0]
    assert wrong[:2].sum() == len(features)  # the defect's mark: classes 0 and 1 get it all
    assert (wrong != expected).any() and (expected[2:] > 0).any()


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert votes.lm_votes(logits, num_groups=3)[0].tolist() == [1, 1, 0]
    centres = torch.tensor([[math.nan], [1.0], [-1.0], [1.0]])
    found, affinity = votes.fm_votes(torch.tensor([[0.0], [5.0]]), centres)
    assert found.tolist() == [0, 2, 0, 0]
    assert affinity.tolist() == [-math.inf, -5.0, -7.0, -5.0]


@pytest.mark.parametrize("dim", [1, 7, 512, 2048])
def test_equal_centres_are_equally_near(dim: int) -> None:
    """In any column of a matrix product, whatever its blocks, and with any number of threads."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.rand(33, dim, generator=generator, dtype=torch.float64) * 50
    centres = torch.rand(1, dim, generator=generator, dtype=torch.float64).repeat(101, 1)
    distances = votes.exact_distances(rows, centres)
    assert (distances == distances[:, :1]).all()
    assert (distances[5:6] == votes.exact_distances(rows[5:6], centres[3:4])).all()
    torch.testing.assert_close(distances[:, 0], (rows - centres[0]).norm(dim=1), rtol=1e-11, atol=1e-11)
    assert votes.exact_distances(rows, rows[4:5])[4, 0] == 0


def test_fm_ties_and_splits_at_full_size() -> None:
    """Each centre stands three times, far apart: a rounded matrix product would tell the copies apart."""
    features = torch.from_numpy(data("smooth", dim=512)[0])
    centres = torch.from_numpy(data("smooth", groups=111, dim=512)[1]).repeat(3, 1)
    whole = votes.fm_tally(features, centres)
    assert whole.predictions.max() < 111
    first, *copies = whole.affinity.view(3, 111)
    assert all(torch.equal(first, copy) for copy in copies)
    parts = [votes.fm_tally(part, centres) for part in features.split([1, 1, 50, 45])]
    assert torch.equal(whole.affinity, sum(part.affinity for part in parts))  # type: ignore[arg-type]
    assert torch.equal(whole.predictions, torch.cat([part.predictions for part in parts]))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_distances_keep_their_precision(scale: float) -> None:
    rows, centres = data("smooth")
    rows, centres = rows * np.float32(scale), centres * scale
    exact = [[math.dist(row, centre) for centre in centres] for row in rows.astype(np.float64)]
    found = votes.exact_distances(torch.from_numpy(rows).double(), torch.from_numpy(centres))
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-11)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["ties", "smooth"])
def test_any_split_gives_the_same_bits(kind: str, cuts: list[int]) -> None:
    rows, centres = (torch.from_numpy(array) for array in data(kind))
    labels = torch.arange(len(rows)) % 11
    for whole, parts in (
        (votes.lm_tally(rows), [votes.lm_tally(part) for part in rows.split(cuts)]),
        (votes.fm_tally(rows, centres), [votes.fm_tally(part, centres) for part in rows.split(cuts)]),
    ):
        assert torch.equal(whole.votes, sum(part.votes for part in parts))  # type: ignore[arg-type]
        assert torch.equal(whole.affinity, sum(part.affinity for part in parts))  # type: ignore[arg-type]
        assert torch.equal(whole.predictions, torch.cat([part.predictions for part in parts]))
    sums, counts = torch.zeros(12, 24, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
    for part, part_labels in zip(rows.split(cuts), labels.split(cuts), strict=True):
        votes.add_group_sums(sums, counts, part, part_labels)
    whole_sums, whole_counts = votes.group_sums(rows, labels, 12)
    assert torch.equal(votes.from_units(sums), whole_sums) and torch.equal(counts, whole_counts)


def test_group_means() -> None:
    features, _ = data("smooth")
    labels = np.arange(97) % 11
    sums, counts = votes.group_sums(torch.from_numpy(features), torch.from_numpy(labels), 12)
    assert counts.tolist() == np.bincount(labels, minlength=12).tolist()
    centres = votes.centres_of(sums.numpy(), counts.numpy())
    assert np.isnan(centres[11]).all()
    for group in range(11):
        np.testing.assert_allclose(centres[group], features[labels == group].mean(axis=0, dtype=float), atol=2.0**-30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e10])
def test_what_cannot_be_summed_is_refused(value: float) -> None:
    features = torch.ones(4, 3)
    features[2, 1] = value
    assert votes.largest(features) == (abs(value) if math.isfinite(value) else math.inf)
    tally = votes.fm_tally(features, torch.zeros(2, 3))
    with pytest.raises(UserError, match="not finite or far too large"):
        votes.check_sums(tally.largest, 4, what="features are")


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"24 outputs.*13 classes"):
        votes.lm_votes(torch.zeros(2, 24), num_groups=13)


def on_rank(world: World) -> list[bytes]:
    """LM and FM of this rank's ragged part, summed over the ranks: the bytes of all results."""
    from dp4tl_dist.world import all_sum

    rows, centres = (torch.from_numpy(array) for array in data("smooth"))
    first, last = (len(rows) * r * r // world.num_ranks**2 for r in (world.rank, world.rank + 1))
    part = rows[first:last]
    sums, counts = torch.zeros(5, 24, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    votes.add_group_sums(sums, counts, part, torch.arange(first, last) % 5)
    tallies = [votes.lm_tally(part), votes.fm_tally(part, centres)]
    results = [sums, counts, *(tensor for tally in tallies for tensor in (tally.votes, tally.affinity))]
    return [all_sum(world, result.numpy()).tobytes() for result in results]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(num_ranks: int) -> None:
    alone = on_rank(World())
    assert all(result == alone for result in run_ranks(on_rank, num_ranks))
