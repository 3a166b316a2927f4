"""The log of every sample's loss: what it holds, exact under resume and over ranks; the scores that are made of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton
from ranks import run_ranks

from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.losses import NAME, SampleLosses, load_losses
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, save_npz
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.prune.loss_scores import cld, forgetting
from dp4tl_dist.prune.score import score
from dp4tl_dist.prune.scores_file import load_scores
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train import loop as train_loop
from dp4tl_dist.train.supervised import train
from dp4tl_dist.world import World

SAMPLES, EPOCHS, BATCH = 46, 4, 8  # 5 steps an epoch, which leave 6 samples out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("losses")
    make_beton(root / "train.beton", num_classes=2, per_class=23)
    make_beton(root / "val.beton", split="val", num_classes=2, per_class=5)
    return root


def config_of(root: Path, **log: Any) -> TrainConfig:
    return validate(TrainConfig, {
        "data": {"train": str(root / "train.beton"), "val": str(root / "val.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.05, "peak_epoch": 1, "resolution": 16,
                  "val_resolution": 16, "label_smoothing": 0.1},
        "engine": {"device": "cpu", "timeout_s": 30},
        "log": {"every": 3, "tensorboard": False, "sample_losses": True, "order": True, **log},
        "checkpoint": {"every_minutes": 0},
    }, source="test")  # fmt: skip


@pytest.fixture(scope="module")
def logged(root: Path) -> Path:
    train(config_of(root), out=root / "run", world=World())
    return root / "run"


def test_what_is_logged(root: Path, logged: Path) -> None:
    beton = open_beton(root / "train.beton")
    found = load_losses(logged / NAME, beton=beton)
    assert found.losses.shape == found.correct.shape == (EPOCHS, SAMPLES) and found.val_losses.shape == (EPOCHS, 2)
    order = [line["identifiers"] for line in read_jsonl(logged / "order.jsonl")]
    for epoch in range(EPOCHS):
        seen = {identifier for step in order[epoch * 5 : epoch * 5 + 5] for identifier in step}
        assert {int(i) for i in beton.identifiers[~np.isnan(found.losses[epoch])]} == seen and len(seen) == 40
        assert not found.correct[epoch][np.isnan(found.losses[epoch])].any()
    # A sample is classified correctly where its loss says so for sure: with two classes, below log 2.
    known = ~np.isnan(found.losses)
    assert np.array_equal(found.correct[known], found.losses[known] < np.log(2))
    for line in read_jsonl(logged / "metrics.jsonl"):
        if line["kind"] == "epoch":
            assert found.val_losses[line["epoch"]].mean() == pytest.approx(line["val_loss"], rel=1e-5)
    assert not list(logged.glob("*.rows"))


def test_logging_changes_nothing(root: Path, logged: Path, tmp_path: Path) -> None:
    train(config_of(root, sample_losses=False), out=tmp_path / "plain", world=World())
    both = [checkpoint.newest(folder) for folder in (logged, tmp_path / "plain")]
    weights = [(folder / "weights.safetensors").read_bytes() for folder in both if folder]
    assert weights[0] == weights[1] and not (tmp_path / "plain" / NAME).exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [2, 7, 13, 19])
def test_a_run_that_dies_goes_on_to_the_same_log(
    root: Path, logged: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies at `step`; the newest checkpoint is of the epoch's begin, or of two steps before."""
    log_order = train_loop.watch.log_order

    def die(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == step - 2 and step != 7:
            fit._save(stopping=False)
        if fit.at.step == step:
            raise Killed

    monkeypatch.setattr(train_loop.watch, "log_order", die)
    with pytest.raises(Killed):
        train(config_of(root), out=tmp_path / "run", world=World())
    monkeypatch.undo()
    assert not (tmp_path / "run" / NAME).exists()
    train(config_of(root), out=tmp_path / "run", world=World())
    before, after = (load_npz(folder / NAME, "losses")[0] for folder in (logged, tmp_path / "run"))
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_a_run_that_dies_before_the_file_is_whole(root: Path, logged: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(train_loop.watch, "finish_losses", lambda fit: None)
        train(config_of(root), out=tmp_path / "run", world=World())
    assert not (tmp_path / "run" / NAME).exists()
    train(config_of(root), out=tmp_path / "run", world=World())
    both = [load_npz(folder / NAME, "losses")[0]["losses"].tobytes() for folder in (logged, tmp_path / "run")]
    assert both[0] == both[1]


def on_ranks(world: World, root: Path, out: Path) -> None:
    train(config_of(root), out=out, world=world)


def test_two_ranks_log_every_sample_once(root: Path, logged: Path, tmp_path: Path) -> None:
    run_ranks(on_ranks, 2, root, tmp_path / "run")
    one, two = (load_losses(folder / NAME) for folder in (logged, tmp_path / "run"))
    assert np.array_equal(np.isnan(one.losses), np.isnan(two.losses))  # the same samples in every epoch
    known = ~np.isnan(two.losses)
    assert np.array_equal(two.correct[known], two.losses[known] < np.log(2))
    # Ranks normalise their own halves of a batch, so the losses differ; the first step's are of the same weights.
    np.testing.assert_allclose(np.nanmean(one.losses[0]), np.nanmean(two.losses[0]), atol=0.3)
    assert not np.isnan(two.val_losses).any()


def test_scores_of_a_log(root: Path, logged: Path, tmp_path: Path) -> None:
    beton = open_beton(root / "train.beton")
    losses = load_losses(logged / NAME, beton=beton)
    for method, function in (("forgetting", forgetting), ("cld", cld)):
        for place in (logged, checkpoint.newest(logged)):
            assert place is not None
            out = tmp_path / f"{method}.npz"
            score(World(), method=method, surrogates=[place], source=beton.path, out=out, force=True)
            found = load_scores(out, beton=beton)
            assert np.array_equal(found.scores, function(losses, beton.labels).astype(np.float32))
    with pytest.raises(UserError, match="made for another source"):
        score(World(), method="cld", surrogates=[logged], source=root / "val.beton", out=tmp_path / "x.npz")


# ---------------------------------------------------------------- oracles


def drawn(seed: int) -> tuple[SampleLosses, Any]:
    rng = np.random.default_rng(seed)
    losses = rng.random((7, 50)).astype(np.float32)
    losses[rng.random((7, 50)) < 0.2] = np.nan
    losses[:, 3] = np.nan
    losses[:, 4] = 0.5
    val = rng.random((7, 4)).astype(np.float32)
    val[2] = np.nan  # an epoch without validation
    val[:, 3] = np.nan  # a class without validation samples
    correct = (rng.random((7, 50)) < 0.6) & ~np.isnan(losses)
    correct[:, 5] = False
    return SampleLosses(losses, correct, val), rng.integers(0, 4, 50)


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_events(seed: int) -> None:
    losses, labels = drawn(seed)
    found = forgetting(losses, labels)
    for i in range(50):
        seen = [bool(c) for c, loss in zip(losses.correct[:, i], losses.losses[:, i], strict=True) if loss == loss]
        events = sum(a and not b for a, b in zip(seen, seen[1:], strict=False))
        assert found[i] == (events if any(seen) else 7)
    assert len(set(found)) > 2


@pytest.mark.parametrize("seed", range(5))
def test_correlation_of_loss_differences(seed: int) -> None:
    losses, labels = drawn(seed)
    found = cld(losses, labels)
    epochs = [0, 1, 3, 4, 5, 6]
    for i in range(50):
        pairs = []
        for a, b in zip(epochs, epochs[1:], strict=False):
            own = float(losses.losses[b, i]) - float(losses.losses[a, i])
            val = float(losses.val_losses[b, labels[i]]) - float(losses.val_losses[a, labels[i]])
            if own == own and val == val:
                pairs.append((own, val))
        spread = [len(set(side)) > 1 for side in zip(*pairs, strict=True)]
        expected = np.corrcoef(np.array(pairs).T)[0, 1] if len(pairs) > 1 and all(spread) else 0
        assert found[i] == pytest.approx(expected, abs=1e-9)
    assert found[3] == found[4] == 0 and np.abs(found).max() > 0.5


def test_a_log_without_validation() -> None:
    losses, labels = drawn(0)
    losses.val_losses[3:] = np.nan
    with pytest.raises(UserError, match="2 validated epochs"):
        cld(losses, labels)


@pytest.mark.parametrize(
    "damage",
    [
        {"losses": np.zeros((4, SAMPLES))}, {"losses": np.zeros((4, 3), np.float32)},
        {"losses": np.full((4, SAMPLES), np.inf, np.float32)}, {"correct": np.zeros((3, SAMPLES), bool)},
        {"val_losses": np.zeros((4, 9), np.float32)}, {"val_losses": np.zeros((3, 2), np.float32)}, {"inputs": 3},
        {"val_losses": np.zeros((4, 0), np.float32)},
    ],
    ids=lambda damage: next(iter(damage)),
)  # fmt: skip
def test_damaged_logs(root: Path, logged: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    arrays, meta = load_npz(logged / NAME, "losses")
    for name, value in damage.items():
        (arrays if name in arrays else meta)[name] = value
    save_npz(tmp_path / NAME, arrays, meta)
    with pytest.raises(UserError, match=NAME):
        load_losses(tmp_path / NAME, beton=open_beton(root / "train.beton"))
