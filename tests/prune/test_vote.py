"""`vote` on real files: LM and FM against oracles, bit-equal for any number of ranks; what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.loader import BetonLoader, CentreView
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz
from dp4tl_dist.models import logits_and_features, normalise
from dp4tl_dist.prune import surrogate as module
from dp4tl_dist.prune.clusters_file import NUM_NEAREST
from dp4tl_dist.prune.make import vote
from dp4tl_dist.prune.surrogate import Surrogate, stream
from dp4tl_dist.prune.votes_file import load_votes, save_votes
from dp4tl_dist.train.checkpoint import load_model
from dp4tl_dist.world import World


def outputs(surrogate: Path, beton: Beton) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits and features of every image, in odd batches."""
    model = load_model(surrogate)[0].eval()
    batches = np.array_split(np.arange(beton.num_samples), 5)
    with torch.no_grad():
        both = [
            logits_and_features(model, normalise(batch.images))
            for batch in BetonLoader(beton).epoch(batches, CentreView(32, 0.875))
        ]
    logits, features = (np.concatenate([pair[i].double().numpy() for pair in both]) for i in (0, 1))
    return logits, features


def test_stream_keeps_order_and_lengths(surrogate: Path, source: Beton) -> None:
    model, _ = load_model(surrogate)
    model.train()
    batches = [np.array([5, 3, 80]), np.array([0]), np.arange(10, 30)]
    eyes = Surrogate(model, CentreView(32, 0.875))
    seen = [(batch.identifiers.tolist(), *pair) for batch, *pair in stream(eyes, BetonLoader(source), batches)]
    logits, features = outputs(surrogate, source)
    assert [item[0] for item in seen] == [(5 * positions).tolist() for positions in batches]
    assert not model.training
    for positions, (_, some_logits, some_features) in zip(batches, seen, strict=True):
        assert some_logits.dtype == some_features.dtype == torch.float32
        np.testing.assert_allclose(some_logits, logits[positions], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(some_features, features[positions], rtol=1e-3, atol=1e-3)
    assert not torch.is_inference_mode_enabled()


def test_lm(surrogate: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    summary = vote(World(), method="lm", surrogate=surrogate, targets=[target.path], out=out, batch_size=8)
    logits, _ = outputs(surrogate, target)
    votes = load_votes(out, beton=source)
    assert votes.predictions.tolist() == logits.argmax(axis=1).tolist()
    assert votes.votes[0].tolist() == np.bincount(logits.argmax(axis=1), minlength=10).tolist()
    assert np.count_nonzero(votes.votes) > 1
    mass = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(votes.affinity[0], mass.sum(axis=0), rtol=1e-4, atol=1e-4)
    assert votes.meta["inputs"]["source"] == source.fingerprint
    assert votes.meta["inputs"]["target0"] == target.fingerprint
    assert votes.meta["config"]["resolution"] == 32
    assert summary.num_voters == 29 and str(summary).startswith("29 votes (lm) for ")


def test_fm(surrogate: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    vote(World(), method="fm", surrogate=surrogate, targets=[target.path], source=source.path, out=out, batch_size=8)
    _, features = outputs(surrogate, target)
    _, source_features = outputs(surrogate, source)
    with np.errstate(invalid="ignore"):
        sums = np.stack([source_features[source.labels == c].sum(axis=0) for c in range(10)])
        centres = sums / np.bincount(source.labels, minlength=10)[:, None]
    distances = np.linalg.norm(features[:, None] - centres[None], axis=2)
    distances[np.isnan(distances)] = np.inf
    votes = load_votes(out, beton=source)
    assert votes.predictions.tolist() == distances.argmin(axis=1).tolist()
    assert votes.votes[0].tolist() == np.bincount(distances.argmin(axis=1), minlength=10).tolist()
    assert votes.affinity[0, 6] == -np.inf  # the class without samples
    np.testing.assert_allclose(votes.affinity[0], -distances.sum(axis=0), rtol=1e-4)
    from_own = np.linalg.norm(source_features - centres[source.labels], axis=1)
    assert votes.closest is not None and votes.closest.shape == (10, NUM_NEAREST)
    for label, found in enumerate(votes.closest):
        mine = np.flatnonzero(source.labels == label)
        assert found[: len(mine)].tolist() == mine[np.argsort(from_own[mine])][:NUM_NEAREST].tolist()
        assert (found[len(mine) :] == -1).all()


def test_fm_looks_for_the_nearest_among_the_first(
    surrogate: Path, source: Beton, target: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 0)
    out = tmp_path / "v.npz"
    vote(World(), method="fm", surrogate=surrogate, targets=[target.path], source=source.path, out=out)
    votes = load_votes(out, beton=source)
    assert votes.closest is not None
    for label, found in enumerate(votes.closest):
        first = np.flatnonzero(source.labels == label)[:NUM_NEAREST].tolist()
        assert sorted(found.tolist()) == sorted([*first, *[-1] * (NUM_NEAREST - len(first))])
    wrong = votes.closest.copy()
    wrong[0, 0] = wrong[1, 0]
    for damaged in (wrong, wrong[:-1], np.full_like(wrong, -2), np.full_like(wrong, source.num_samples)):
        save_votes(out, replace(votes, closest=damaged))
        with pytest.raises(UserError, match="do not add up"):
            load_votes(out, beton=source)


def test_several_targets_stand_in_rows(surrogate: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    one, other, both = tmp_path / "1.npz", tmp_path / "2.npz", tmp_path / "3.npz"
    for out, targets in ((one, [target]), (other, [source]), (both, [target, source])):
        vote(World(), method="lm", surrogate=surrogate, targets=[beton.path for beton in targets], out=out)
    first, second, together = (load_votes(path) for path in (one, other, both))
    for name in ("votes", "affinity", "predictions", "target_sizes"):
        expected = np.concatenate([getattr(first, name), getattr(second, name)])
        assert np.array_equal(getattr(together, name), expected)
    assert together.meta["inputs"]["target1"] == source.fingerprint


def ballots(world: World, surrogate: Path, source: Path, targets: list[Path], folder: Path) -> list[bytes]:
    """Vote both ways and return the bytes of the arrays; batches of 8 leave a third rank less to do than the others."""
    written = []
    for method in ("lm", "fm"):
        out = folder / f"{method}-{world.num_ranks}.npz"
        summary = vote(world, method=method, surrogate=surrogate, targets=targets, source=source, out=out, batch_size=8)
        if world.is_main:
            arrays = load_npz(out, "votes")[0]
            written += [arrays[name].tobytes() for name in ("votes", "affinity", "predictions", "target_sizes")]
        written.append(str(summary).encode())
    return written


def test_one_two_and_three_ranks_vote_alike(
    surrogate: Path, source: Beton, target: Beton, make_beton: Callable[..., Beton], tmp_path: Path
) -> None:
    tiny = make_beton([0], ["only"])  # one image: two of three ranks have nothing to do
    args = (surrogate, source.path, [target.path, tiny.path], tmp_path)
    alone = ballots(World(), *args)
    for num_ranks in (2, 3):
        everyone = run_ranks(ballots, num_ranks, *args)
        assert everyone[0] == alone
        assert all(others == [alone[4], alone[9]] for others in everyone[1:])


def refused(world: World, **arguments: Any) -> str:
    try:
        vote(world, **arguments)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_refuse_together(
    source: Beton, target: Beton, surrogate: Path, make_surrogate: Callable[..., Path], tmp_path: Path
) -> None:
    """A NaN that only rank 0 meets, and an output that only rank 0 looks at, end every rank with the same line."""
    (tmp_path / "v.npz").touch()
    assert set(run_ranks(on_ranks, 2, surrogate, target.path, tmp_path / "v.npz")) == {
        f"{tmp_path / 'v.npz'} exists: choose another --out or add --force to replace it"
    }
    spoilt = make_surrogate(source, spoil=True)
    lines = set(run_ranks(on_ranks, 2, spoilt, target.path, tmp_path / "w.npz"))
    assert len(lines) == 1 and "not finite" in lines.pop()
    assert not (tmp_path / "w.npz").exists()


def on_ranks(world: World, surrogate: Path, target: Path, out: Path) -> str:
    return refused(world, method="lm", surrogate=surrogate, targets=[target], out=out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "mm"}, "fm, lm"),
        ({"method": "fm"}, "add --source"),
        ({"precision": "fp8"}, "--precision"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"targets": []}, "--target"),
        ({"targets": [Path("none.beton")]}, "none.beton"),
        ({"surrogate": Path("none")}, "none"),
        ({"resolution": -3}, "--resolution -3"),
        ({"source": "TARGET"}, "made for another source"),
    ],
)
def test_bad_input(change: dict[str, Any], says: str, surrogate: Path, target: Beton, tmp_path: Path) -> None:
    given = {"method": "lm", "surrogate": surrogate, "targets": [target.path], "out": tmp_path / "v.npz", **change}
    given = {key: target.path if value == "TARGET" else value for key, value in given.items()}
    line = refused(World(), **given)
    assert says in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_an_fm_surrogate_may_know_another_source(surrogate: Path, target: Beton, tmp_path: Path) -> None:
    out = tmp_path / "v.npz"
    vote(World(), method="fm", surrogate=surrogate, targets=[target.path], source=target.path, out=out)
    votes = load_votes(out, beton=open_beton(target.path))
    assert votes.classes == ("x", "y", "z") and votes.votes[0].tolist() == [9, 11, 9]
