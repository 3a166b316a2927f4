"""`cluster` on real files, `vote` and `prune` by its clusters, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks import run_ranks
from sklearn.cluster import KMeans

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.info import describe
from dp4tl_dist.prune.cluster import ClusterSummary, cluster
from dp4tl_dist.prune.clusters_file import load_clusters, nearest, save_clusters
from dp4tl_dist.prune.make import prune, vote
from dp4tl_dist.prune.store import Store
from dp4tl_dist.prune.votes_file import load_votes, save_votes
from dp4tl_dist.world import World

K = 6


def run(world: World, surrogate: Path, source: Beton, out: Path, **more: Any) -> ClusterSummary:
    arguments: dict[str, Any] = {"num_clusters": K, "tolerance": 0.0, "batch_size": 8, **more}
    return cluster(world, surrogate=surrogate, source=source.path, out=out, **arguments)


@pytest.fixture(scope="module")
def made(surrogate: Path, source: Beton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clusters") / "c.npz"
    run(World(), surrogate, source, out)
    return out


def features_of(folder: Path, source: Beton, dtype: str = "float32") -> NDArray[np.float64]:
    """What one rank stored."""
    return np.fromfile(folder / "rank_00000.bin", dtype).reshape(source.num_samples, -1).astype(np.float64)


def test_as_scikit_learn_on_the_stored_features(made: Path, source: Beton) -> None:
    clusters = load_clusters(made, beton=source)
    features = features_of(made.with_name("c.features"), source)
    theirs = KMeans(K, init=features[clusters.start], n_init=1, tol=0).fit(features)
    assert clusters.assignment.tolist() == theirs.labels_.tolist()
    np.testing.assert_allclose(clusters.centres, theirs.cluster_centers_, rtol=1e-10, atol=1e-10)
    assert clusters.inertia == pytest.approx(theirs.inertia_, rel=1e-9) == clusters.meta["inertia"]
    assert clusters.sizes.tolist() == np.bincount(theirs.labels_, minlength=K).tolist()


def test_nearest_are_the_nearest(made: Path, source: Beton) -> None:
    clusters = load_clusters(made)
    found = nearest(clusters, 40)
    for i, row in enumerate(found):
        members = np.flatnonzero(clusters.assignment == i)
        expected = members[np.argsort(clusters.distances[members], kind="stable")][:40]
        assert row[: len(expected)].tolist() == expected.tolist() and (row[len(expected) :] == -1).all()


def on_ranks(world: World, surrogate: Path, source: Path, folder: Path, force: bool = False) -> str:
    out = folder / f"{world.num_ranks}.npz"
    same: dict[str, Any] = {"num_clusters": K, "tolerance": 0.0, "batch_size": 8}
    return str(cluster(world, surrogate=surrogate, source=source, out=out, force=force, **same))


def test_one_two_and_three_ranks_make_the_same_clusters(surrogate: Path, source: Beton, tmp_path: Path) -> None:
    on_ranks(World(), surrogate, source.path, tmp_path)
    for num_ranks in (2, 3):
        lines = run_ranks(on_ranks, num_ranks, surrogate, source.path, tmp_path)
        assert len(set(lines)) == 1 and f"83 samples in {K} clusters" in lines[0]
    first, *others = (load_clusters(tmp_path / f"{num_ranks}.npz") for num_ranks in (1, 2, 3))
    for other in others:
        for name in ("centres", "assignment", "distances", "start"):
            assert np.array_equal(getattr(first, name), getattr(other, name))
        assert first.inertia == other.inertia
    again = run_ranks(on_ranks, 2, surrogate, source.path, tmp_path, True)
    assert "used again" in again[0] and "used again" not in lines[0]


def test_features_are_used_again_until_something_changes(
    surrogate: Path, source: Beton, make_beton: Callable[..., Beton], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    summaries = [
        run(World(), surrogate, source, tmp_path / "c.npz", store=store, force=True, **more)
        for more in ({}, {"num_clusters": 3}, {"resolution": 16}, {"store_precision": "float16"}, {"seed": 1})
    ]
    assert [summary.reused for summary in summaries] == [False, True, False, False, False]
    half = run(World(), surrogate, source, tmp_path / "h.npz", store=store, store_precision="float16")
    assert not half.reused and 2 * half.store_bytes == summaries[0].store_bytes
    assert run(World(), surrogate, source, tmp_path / "i.npz", store=store, store_precision="float16").reused
    (store / "rank_00000.bin").write_bytes(b"cut short")
    assert not run(World(), surrogate, source, tmp_path / "j.npz", store=store, store_precision="float16").reused
    first, second = load_clusters(tmp_path / "h.npz"), load_clusters(tmp_path / "j.npz")
    assert np.array_equal(first.centres, second.centres)
    other = make_beton([0, 1] * 20, ["a", "b"])
    assert not run(World(), surrogate, other, tmp_path / "k.npz", store=store, store_precision="float16").reused


def test_no_more_than_a_block_is_ever_in_memory(
    surrogate: Path, source: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-means asks for the features a block at a time, however many samples there are."""
    asked: list[int] = []
    rows = Store.rows

    def watched(self: Store, row: int, count: int = 1) -> NDArray[np.float32]:
        asked.append(count * self.dim * 4)
        return rows(self, row, count)

    monkeypatch.setattr(Store, "rows", watched)
    monkeypatch.setattr("dp4tl_dist.prune.store.BLOCK_BYTES", 4096)
    run(World(), surrogate, source, tmp_path / "c.npz")
    assert max(asked) <= 4096 and sum(asked) > 3 * 83 * 512


# ---------------------------------------------------------------- votes and subsets by clusters


@pytest.fixture(scope="module")
def votes(made: Path, surrogate: Path, target: Beton) -> Path:
    out = made.with_name("v.npz")
    summary = vote(World(), method="fm", surrogate=surrogate, targets=[target.path], clusters=made, out=out)
    assert f"of {K} clusters; " in str(summary) and "first: cluster " in str(summary)
    return out


def test_targets_vote_for_the_nearest_centre(
    made: Path, votes: Path, surrogate: Path, source: Beton, target: Beton, tmp_path: Path
) -> None:
    run(World(), surrogate, target, tmp_path / "t.npz", num_clusters=1)
    features, clusters = features_of(tmp_path / "t.features", target), load_clusters(made)
    distances = np.linalg.norm(features[:, None] - clusters.centres[None], axis=2)
    cast = load_votes(votes, beton=source)
    assert cast.predictions.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(cast.affinity[0], -distances.sum(axis=0), rtol=1e-5)
    assert cast.what == "clusters" and cast.classes[1] == "cluster 1" and cast.members is not None
    assert cast.members.assignment.tolist() == clusters.assignment.tolist()
    assert cast.members.nearest.tolist() == nearest(clusters).tolist()
    assert cast.meta["inputs"].keys() == {"source", "surrogate", "clusters", "target0"}


@pytest.mark.parametrize("reverse", [False, True])
def test_prune_keeps_the_members_of_the_kept_clusters(
    votes: Path, source: Beton, tmp_path: Path, reverse: bool
) -> None:
    out = tmp_path / "x.npz"
    summary = prune(source=source.path, votes=votes, keep=0.5, out=out, reverse=reverse, apply_to=source.path)
    subset, cast = load_subset(out, beton=source), load_votes(votes)
    assert cast.members is not None
    order = sorted(range(K), key=lambda i: (-cast.votes[0][i], -cast.affinity[0][i], i))
    kept = sorted(order[::-1][:3] if reverse else order[:3])
    assert subset.groups.tolist() == kept and subset.ratio == 0.5
    assert subset.indices.tolist() == [i for i, group in enumerate(cast.members.assignment) if group in kept]
    assert "of 3 of 6 clusters (fm" in str(summary) and "left whole: clusters were chosen" in str(summary)
    val = load_subset(tmp_path / "x.val.npz", beton=source)
    assert len(val.indices) == source.num_samples and not len(val.groups)


def test_several_votes_files_are_of_the_same_clusters(
    votes: Path, surrogate: Path, source: Beton, target: Beton, tmp_path: Path
) -> None:
    run(World(), surrogate, source, tmp_path / "c.npz", start="sample")
    other = tmp_path / "v.npz"
    vote(World(), method="fm", surrogate=surrogate, targets=[target.path], clusters=tmp_path / "c.npz", out=other)
    with pytest.raises(UserError, match="holds votes for other groups than"):
        prune(source=source.path, votes=[votes, other], keep=0.5, out=tmp_path / "x.npz")
    prune(source=source.path, votes=[votes, votes], keep=0.5, within="random:0.5", out=tmp_path / "x.npz")
    subset, cast = load_subset(tmp_path / "x.npz", beton=source), load_votes(votes)
    assert cast.members is not None
    sizes = np.bincount(cast.members.assignment, minlength=K)[subset.groups]
    kept = np.bincount(cast.members.assignment[subset.indices], minlength=K)[subset.groups]
    assert kept.tolist() == [int(size / 2 + 0.5) for size in sizes]


def test_the_command_line(made: Path, surrogate: Path, source: Beton, tmp_path: Path) -> None:
    out = tmp_path / "c.npz"
    argv = ["cluster", "--surrogate", str(surrogate), "--source", str(source.path), "--clusters", str(K),
            "--tolerance", "0", "--batch-size", "8", "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert main(argv) == 0 and main(argv) == 2 and main([*argv, "--force"]) == 0
    assert np.array_equal(load_clusters(out).centres, load_clusters(made).centres)
    assert describe(out)["samples_per_cluster"]["max"] == load_clusters(made).sizes.max()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_clusters": 84}, "--clusters 84 is not between 1 and the 83 samples"),
        ({"num_clusters": 0}, "--clusters 0 is not between"),
        ({"start": "magic"}, "--init"), ({"iterations": 0}, "--iterations 0"), ({"seed": -1}, "--seed -1"),
        ({"tolerance": float("nan")}, "--tolerance nan"), ({"batch_size": 0}, "--batch-size 0"),
        ({"store_precision": "float8"}, "--store-precision"), ({"resolution": -3}, "--resolution -3"),
    ],
)  # fmt: skip
def test_bad_input(surrogate: Path, source: Beton, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(World(), surrogate, source, tmp_path / "c.npz", **change)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_left_alone(surrogate: Path, source: Beton, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rank_00000.bin").write_text("precious")
    with pytest.raises(UserError, match="holds no features: choose another --store"):
        run(World(), surrogate, source, tmp_path / "c.npz", store=tmp_path / "mine")
    assert (tmp_path / "mine" / "rank_00000.bin").read_text() == "precious"


def test_no_room_for_the_features(
    surrogate: Path, source: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="the features need .* GB .*: make room, choose another --store"):
        run(World(), surrogate, source, tmp_path / "c.npz")


def test_features_that_are_not_finite(make_surrogate: Callable[..., Path], source: Beton, tmp_path: Path) -> None:
    from dp4tl_dist.train import checkpoint

    folder = make_surrogate(source)
    weights = checkpoint.load_weights(folder)
    weights["stem.0.weight"][0] = float("nan")
    checkpoint.save(folder, weights=weights, state={}, meta=checkpoint.read_meta(folder))
    with pytest.raises(UserError, match="not finite or too large for float32"):
        run(World(), folder, source, tmp_path / "c.npz")
    assert not list((tmp_path / "c.features").glob("rank_*"))


def test_clusters_of_another_surrogate_source_or_view(
    made: Path, surrogate: Path, make_surrogate: Callable[..., Path], source: Beton, target: Beton, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"targets": [target.path], "clusters": made, "out": tmp_path / "v.npz"}
    other = make_surrogate(target)
    for arguments, says in (
        ({"method": "fm", "surrogate": other}, "was made for another surrogate"),
        ({"method": "fm", "surrogate": surrogate, "source": target.path}, "was made for another source"),
        ({"method": "fm", "surrogate": surrogate, "resolution": 16}, "pass --resolution 32"),
        ({"method": "lm", "surrogate": surrogate}, "are the groups of --method fm"),
    ):
        with pytest.raises(UserError, match=says):
            vote(World(), **arguments, **common)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(made: Path, votes: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    clusters, cast = load_clusters(made), load_votes(votes)
    assert cast.members is not None
    wrong = clusters.assignment.copy()
    wrong[0] = K
    for change in ({"assignment": wrong}, {"distances": clusters.distances[1:]}, {"start": clusters.start[1:]},
                   {"distances": clusters.distances * np.float32("nan")}):  # fmt: skip
        save_clusters(tmp_path / "c.npz", replace(clusters, **change))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="do not fit together"):
            load_clusters(tmp_path / "c.npz")
    with pytest.raises(UserError, match="was made for another source"):
        load_clusters(made, beton=target)
    members = cast.members
    for changed in (replace(members, assignment=wrong), replace(members, assignment=members.assignment[1:]),
                    replace(members, nearest=members.nearest + 83)):  # fmt: skip
        save_votes(tmp_path / "v.npz", replace(cast, members=changed))
        with pytest.raises(UserError, match="do not add up"):
            load_votes(tmp_path / "v.npz", beton=source)
