"""`score` on real files: each method against a slow oracle, the same for any number of ranks; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.loader import BetonLoader, CentreView
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz
from dp4tl_dist.models import logits_and_features, normalise
from dp4tl_dist.prune import scores as by_sample
from dp4tl_dist.prune.score import METHODS, score
from dp4tl_dist.prune.scores_file import load_scores
from dp4tl_dist.train.checkpoint import load_model
from dp4tl_dist.world import World

NETWORK = [method for method, rule in METHODS.items() if rule.reads != "losses"]
Array = NDArray[np.float64]


def outputs(surrogate: Path, beton: Beton) -> tuple[Array, Array]:
    """Logits and features of every image, one at a time."""
    model = load_model(surrogate)[0].eval()
    loader = BetonLoader(beton)
    with torch.no_grad():
        both = [
            logits_and_features(model, normalise(batch.images))
            for batch in loader.epoch([np.array([i]) for i in range(beton.num_samples)], CentreView(32, 0.875))
        ]
    logits, features = (np.concatenate([pair[i].double().numpy() for pair in both]) for i in (0, 1))
    return logits, features


def errors(logits: Array, labels: NDArray[np.int64]) -> Array:
    masses = np.exp(logits - logits.max(axis=1, keepdims=True))
    return masses / masses.sum(axis=1, keepdims=True) - np.eye(logits.shape[1])[labels]


def of_classes(function: Callable[[Array], Array], features: Array, labels: NDArray[np.int64]) -> Array:
    found = np.full(len(labels), np.nan)
    for label in np.unique(labels):
        found[labels == label] = function(features[labels == label])
    return found


def moderate(x: Array) -> Array:
    return np.linalg.norm(x - np.median(x, axis=0), axis=1)


def herding(x: Array) -> Array:
    chosen: list[int] = []
    while len(chosen) < len(x):
        free = [i for i in range(len(x)) if i not in chosen]
        gaps = [np.linalg.norm(x.mean(axis=0) - x[[*chosen, i]].mean(axis=0)) for i in free]
        chosen.append(free[int(np.argmin(gaps))])
    return 1 - np.argsort(chosen) / len(x)


def k_centre(x: Array) -> Array:
    chosen = [int(np.argmin(np.linalg.norm(x - x.mean(axis=0), axis=1)))]
    while len(chosen) < len(x):
        free = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(free, key=lambda i: (min(np.linalg.norm(x[i] - x[j]) for j in chosen), -i)))
    return 1 - np.argsort(chosen) / len(x)


def oracle(method: str, surrogate: Path, source: Beton, target: Beton) -> Array:
    logits, features = outputs(surrogate, source)
    if method == "el2n":
        return np.linalg.norm(errors(logits, source.labels), axis=1)
    if method == "grand":
        padded = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        gradients = errors(logits, source.labels)[:, :, None] * padded[:, None, :]
        return np.sqrt((gradients**2).sum(axis=(1, 2)))
    if method == "retrieval":
        others = outputs(surrogate, target)[1]
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, others))
        return (a @ b.T).max(axis=1)
    return of_classes({"moderate": moderate, "herding": herding, "k-centre": k_centre}[method], features, source.labels)


def scored(surrogate: Path, source: Beton, target: Beton, out: Path, method: str, **more: Any) -> Array:
    targets = [target.path] if method == "retrieval" else []
    given = {"surrogates": [surrogate], "batch_size": 8, "force": True, **more}
    score(World(), method=method, source=source.path, targets=targets, out=out, **given)
    return load_scores(out, beton=source).scores.astype(np.float64)


@pytest.mark.parametrize("method", NETWORK)
def test_against_the_oracle(method: str, surrogate: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    found = scored(surrogate, source, target, tmp_path / "s.npz", method)
    np.testing.assert_allclose(found, oracle(method, surrogate, source, target), rtol=2e-3, atol=2e-3)
    assert len(np.unique(found)) > 5
    for batch_size in (1, 83):
        other = scored(surrogate, source, target, tmp_path / "s.npz", method, batch_size=batch_size)
        np.testing.assert_allclose(other, found, rtol=2e-4, atol=2e-4)
    arrays, meta = load_npz(tmp_path / "s.npz", "scores")
    assert arrays["scores"].shape == (83,) and arrays["scores"].dtype == np.float32
    assert meta["method"] == method and meta["keeps"] == METHODS[method].keeps
    assert meta["inputs"]["source"] == source.fingerprint and "surrogate0" in meta["inputs"]


def test_the_full_gradient_is_autograds(surrogate: Path, source: Beton, target: Beton, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(by_sample.GRADIENTS_AT_ONCE, "cpu", 1_000_000)  # a few samples at once, and not all of a batch
    found = scored(surrogate, source, target, tmp_path / "s.npz", "grand", full_gradient=True)
    model = load_model(surrogate)[0].eval().double()
    single = [np.array([i]) for i in range(source.num_samples)]
    expected = []
    for batch in BetonLoader(source).epoch(single, CentreView(32, 0.875)):
        loss = torch.nn.functional.cross_entropy(model(normalise(batch.images).double()), batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(float(torch.cat([part.double().flatten() for part in gradients]).norm()))
    # A gradient jumps where a rectifier's input is zero: what rounds to either side may do so here.
    apart = np.abs(found / expected - 1)
    assert (apart < 1e-3).mean() > 0.95 and apart.max() < 0.02
    last = scored(surrogate, source, target, tmp_path / "s.npz", "grand")
    assert (found >= last * 0.999).all() and (found > last * 1.01).any()


def test_the_mean_of_several_surrogates(
    surrogate: Path, make_surrogate: Callable[..., Path], source: Beton, target: Beton, tmp_path: Path
) -> None:
    other = make_surrogate(source, seed=2)
    both = scored(surrogate, source, target, tmp_path / "s.npz", "el2n", surrogates=[surrogate, other])
    one, two = (scored(path, source, target, tmp_path / "s.npz", "el2n") for path in (surrogate, other))
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-6)
    assert not np.allclose(one, two)


def on_ranks(world: World, surrogate: Path, source: Path, target: Path, folder: Path) -> list[Any]:
    """All methods: bytes of the scores from rank 0, summaries from all."""
    found: list[Any] = []
    for method in [*NETWORK, "full"]:
        out = folder / f"{method}-{world.num_ranks}.npz"
        summary = score(
            world, method="grand" if method == "full" else method, surrogates=[surrogate], source=source, out=out,
            targets=[target] if method == "retrieval" else [], full_gradient=method == "full", batch_size=8,
        )  # fmt: skip
        found.append((str(summary), load_npz(out, "scores")[0]["scores"].tobytes() if world.is_main else b""))
    return found


def test_one_two_and_three_ranks_score_alike(surrogate: Path, source: Beton, target: Beton, tmp_path: Path) -> None:
    alone = on_ranks(World(), surrogate, source.path, target.path, tmp_path)
    for num_ranks in (2, 3):
        everyone = run_ranks(on_ranks, num_ranks, surrogate, source.path, target.path, tmp_path)
        assert everyone[0] == alone
        assert all([text for text, _ in others] == [text for text, _ in alone] for others in everyone[1:])


def test_a_score_depends_on_its_sample_alone(
    surrogate: Path, target: Beton, make_beton: Callable[..., Beton], tmp_path: Path
) -> None:
    """A source of one image, and one whose ranks have nothing to do. (Two of a class are equally far from its mean.)"""
    for labels in ([0], [0, 9, 9, 9]):
        tiny = make_beton(labels, [f"class {i}" for i in range(10)])
        for method in NETWORK:
            found = scored(surrogate, tiny, target, tmp_path / "s.npz", method)
            np.testing.assert_allclose(found, oracle(method, surrogate, tiny, target), rtol=2e-3, atol=2e-3)
    assert len(run_ranks(on_ranks, 3, surrogate, tiny.path, target.path, tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "grant"}, "cld, el2n, forgetting"),
        ({"surrogates": []}, "add --surrogate"),
        ({"surrogates": [Path("none")]}, "none"),
        ({"source": Path("none.beton")}, "none.beton"),
        ({"method": "retrieval"}, "add --target"),
        ({"targets": ["TARGET"]}, "leave --target out"),
        ({"method": "el2n", "full_gradient": True}, "--full-gradient"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"precision": "fp8"}, "--precision"),
        ({"source": "TARGET"}, "trained on other classes"),
        ({"method": "forgetting"}, "log.sample_losses"),
        ({"surrogates": "SPOILT"}, "not finite"),
        ({"surrogates": "SPOILT", "method": "moderate"}, ""),
    ],
)
def test_bad_input(
    change: dict[str, Any], says: str, surrogate: Path, make_surrogate: Callable[..., Path], source: Beton,
    target: Beton, tmp_path: Path,
) -> None:  # fmt: skip
    known = {"TARGET": target.path, "SPOILT": [make_surrogate(source, spoil=True)] if "SPOILT" in str(change) else []}
    given: dict[str, Any] = {"method": "grand", "surrogates": [surrogate], "source": source.path, **change}
    given = {key: known.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    given["targets"] = [known.get(str(path), path) for path in given.get("targets", [])]
    if not says:  # the spoilt head does not touch the features
        score(World(), out=tmp_path / "s.npz", **given)
        return
    with pytest.raises(UserError, match=says) as caught:
        score(World(), out=tmp_path / "s.npz", **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_on_the_command_line(
    surrogate: Path, source: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.npz"
    line = ["score", "--surrogate", str(surrogate), "--surrogate", str(surrogate), "--source", str(source.path),
            "--out", str(out), "--device", "cpu"]  # fmt: skip
    assert main([*line, "--method", "grand", "--batch-size", "32"]) == 0
    assert "83 scores (grand)" in capsys.readouterr().out
    assert main([*line, "--method", "grand"]) == 2  # exists
    assert main([*line, "--method", "nearest"]) == 2
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "kind: scores" in shown and "keeps: highest" in shown
    pruned = ["prune", "--source", str(source.path), "--scores", str(out), "--keep", "0.5"]
    assert main([*pruned, "--out", str(tmp_path / "x.npz")]) == 0
    assert "42 of 83 samples (grand)" in capsys.readouterr().out
