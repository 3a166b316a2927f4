"""k-means: scikit-learn's from the same start, the same bits for any number of ranks, and what happens at the edges."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from sklearn.cluster import KMeans

from dp4tl_dist.prune import kmeans
from dp4tl_dist.prune.store import Store
from dp4tl_dist.prune.votes import exact_distances
from dp4tl_dist.world import World

Floats = NDArray[np.float64]


def blobs(num_rows: int = 331, dim: int = 5, centres: int = 7, *, seed: int = 0) -> Floats:
    """Overlapping blobs, as they are stored: float32."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(centres, dim))[rng.integers(0, centres, num_rows)] * 2 + rng.normal(size=(num_rows, dim))
    return rows.astype(np.float32).astype(np.float64)


def stored(folder: Path, rows: Floats, world: World = World(), dtype: str = "float32") -> Store:  # noqa: B008
    """This rank's part of `rows` as a store; ranks take parts of different sizes."""
    ends = [round(len(rows) * ((rank + 1) / world.num_ranks) ** 2) for rank in range(world.num_ranks)]
    first, last = ([0, *ends][world.rank], ends[world.rank])
    path = folder / f"{world.rank}-of-{world.num_ranks}.bin"
    rows[first:last].astype(dtype).tofile(path)
    return Store(path, np.dtype(dtype), first, last - first, rows.shape[1], len(rows), float(np.abs(rows).max()))


def sklearn_of(rows: Floats, start: Floats, iterations: int) -> KMeans:
    return KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(rows)


@pytest.mark.parametrize("iterations", [1, 3, 300])
def test_as_scikit_learn_from_the_same_start(tmp_path: Path, iterations: int) -> None:
    rows = blobs()
    start = rows[[3, 50, 99, 120, 200, 201, 202, 330]]
    found = kmeans.lloyd(stored(tmp_path, rows), World(), start, iterations=iterations, tolerance=0)
    theirs = sklearn_of(rows, start, iterations)
    np.testing.assert_allclose(found.centres, theirs.cluster_centers_, rtol=1e-12, atol=1e-12)
    assert found.assignment.tolist() == theirs.labels_.tolist()
    assert found.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-12)
    assert found.converged == (iterations == 300)
    distances = np.linalg.norm(rows - found.centres[found.assignment], axis=1)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)
    assert list(found.inertia) == sorted(found.inertia, reverse=True)


def test_an_empty_cluster_gets_the_farthest_sample_as_in_scikit_learn(tmp_path: Path) -> None:
    rows = blobs()
    start = np.concatenate([rows[[3, 50, 99]], np.full((2, 5), 1e3)])  # nobody is near the last two
    found = kmeans.lloyd(stored(tmp_path, rows), World(), start, tolerance=0)
    theirs = sklearn_of(rows, start, 300)
    np.testing.assert_allclose(found.centres, theirs.cluster_centers_, rtol=1e-12, atol=1e-12)
    assert found.reseeded == 2 and np.bincount(found.assignment, minlength=5).min() > 0


def test_the_tolerance_stops_where_inertia_hardly_falls(tmp_path: Path) -> None:
    rows = blobs()
    all_of_it = kmeans.lloyd(stored(tmp_path, rows), World(), rows[:9], tolerance=0).inertia
    falls = -np.diff(all_of_it) / np.array(all_of_it[:-1])
    stop = int(np.argmax(falls <= 0.01)) + 1
    found = kmeans.lloyd(stored(tmp_path, rows), World(), rows[:9], tolerance=0.01)
    assert found.inertia == all_of_it[: stop + 1] and stop + 1 < len(all_of_it) and found.converged


def test_fewer_distinct_features_than_clusters(tmp_path: Path) -> None:
    rows = np.repeat(blobs(3), 4, axis=0)
    store = stored(tmp_path, rows)
    first = kmeans.start_positions(store, World(), 5, how="kmeans++", seed=0)
    assert len(set(first.tolist())) == 5
    found = kmeans.lloyd(store, World(), rows[first])
    assert found.inertia[-1] == 0 and found.converged
    assert sorted(np.bincount(found.assignment, minlength=5).tolist()) == [0, 0, 4, 4, 4]
    assert np.isnan(found.centres).all(axis=1).sum() == 2


def results(world: World, folder: Path) -> list[bytes]:
    """Both starts and k-means from each, on this rank's part; the last two ranks of three have little or nothing."""
    rows = blobs(211, 6)
    store, everything = stored(folder, rows, world), []
    for how in kmeans.STARTS:
        first = kmeans.start_positions(store, world, 9, how=how, seed=5)
        start = store.gather(world, first).astype(np.float64)
        start[-1] = 1e3  # an empty cluster at first
        found = kmeans.lloyd(store, world, start, tolerance=0)
        everything += [first.tobytes(), found.centres.tobytes(), repr(found.inertia).encode()]
        everything += [found.assignment.tobytes(), found.distances.tobytes()]
    return everything


def test_one_two_and_three_ranks_find_the_same_bits(tmp_path: Path) -> None:
    alone = results(World(), tmp_path)
    for num_ranks in (2, 3):
        everyone = run_ranks(results, num_ranks, tmp_path)
        for i, expected in enumerate(alone):
            parts = [result[i] for result in everyone]
            shared = i % 5 < 3
            assert parts == [expected] * num_ranks if shared else b"".join(parts) == expected


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = results(World(), tmp_path)
    monkeypatch.setattr("dp4tl_dist.prune.store.BLOCK_BYTES", 1000)
    monkeypatch.setattr(kmeans, "CHUNK", 50)
    assert results(World(), tmp_path) == whole


def test_the_nearest_of_equals_is_the_lowest() -> None:
    rows = torch.from_numpy(blobs(40))
    centres = torch.from_numpy(blobs(12, seed=1))
    centres = torch.cat([centres[:6], centres[:6], centres[6:] * (1 + 2**-50), centres[6:]])
    found = kmeans.nearest_centres(rows, centres)
    assert torch.equal(found, exact_distances(rows, centres).argmin(dim=1))
    assert not ((found >= 6) & (found < 12)).any()


def test_plus_plus_spreads_and_samples_do_not(tmp_path: Path) -> None:
    """Two far blobs of very different sizes: k-means++ starts in both, whatever the seed."""
    rows = np.concatenate([blobs(400), blobs(4) + 1e3])
    store = stored(tmp_path, rows)
    reached = {
        how: sum(kmeans.start_positions(store, World(), 3, how=how, seed=seed).max() >= 400 for seed in range(20))
        for how in kmeans.STARTS
    }
    assert reached["kmeans++"] == 20 and reached["sample"] < 5


def test_a_good_start_beats_scikit_learns_random_one(tmp_path: Path) -> None:
    rows = blobs(600, centres=12)
    store = stored(tmp_path, rows)
    ours, theirs = [], []
    for seed in range(6):
        first = kmeans.start_positions(store, World(), 12, how="kmeans++", seed=seed)
        ours.append(kmeans.lloyd(store, World(), rows[first]).inertia[0])
        random = KMeans(12, init="random", n_init=1, max_iter=1, random_state=seed).fit(rows)
        theirs.append(random.inertia_)
    assert np.mean(ours) < 1.25 * np.mean(theirs)
