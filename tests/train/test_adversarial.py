"""The attack stays in its ball, finds what a slow oracle finds, and leaves no trace on the model that it attacks."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_factory import make_beton
from numpy.typing import NDArray
from ranks import run_ranks
from torch import nn

from dp4tl_dist.cli import main
from dp4tl_dist.config import AdversarialConfig, EngineConfig, OptimConfig
from dp4tl_dist.data.augment import _mix
from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from dp4tl_dist.models import PIXEL_MEAN, PIXEL_STD, build_model
from dp4tl_dist.train import checkpoint, watch
from dp4tl_dist.train.adversarial import (
    FRACTION,
    Adversarial,
    Attack,
    in_pixels,
    robust_attack,
    training_attack,
    uniform_like,
)
from dp4tl_dist.train.engine import DDPEngine
from dp4tl_dist.train.task import LinearProbe
from dp4tl_dist.world import World


def batch_of(count: int = 8, side: int = 8, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    images[0], images[1] = 0, 255  # where the ball sticks out of the range of pixels
    labels = torch.randint(0, 4, (count,), generator=generator)
    return Batch(images.to(memory_format=torch.channels_last), labels, 1000 + torch.arange(count))


def network(*, norm: bool = True) -> nn.Module:
    torch.manual_seed(2)
    parts: list[nn.Module] = [nn.Conv2d(3, 6, 3, stride=2), *([nn.BatchNorm2d(6)] if norm else []), nn.Tanh()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(54, 4))


# ---------------------------------------------------------------- the attack


@pytest.mark.parametrize("eps", [0.0, 3 / 255, 0.01, 1 / 7, 1.0])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_inside_the_ball_and_the_range(eps: float, start: bool, autocast: bool) -> None:
    batch, radius = batch_of(), in_pixels(eps)
    attack = Attack(radius, 3, 2 * radius / 3, start)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attacked = attack(network(), batch)
    moved = (attacked.double() - batch.images.double()).abs()
    assert attacked.dtype == torch.float32 and abs(radius - 255 * eps) <= 0.5 / FRACTION
    assert moved.max() <= radius and attacked.min() >= 0 and attacked.max() <= 255
    # In the range's middle the corner of the ball is reached; a start may have begun on its other side.
    assert moved.max() == radius or eps == 1.0


def oracle(module: nn.Module, batch: Batch, start: NDArray[np.float64], *, eps: float, steps: int, size: float) -> Any:
    """PGD in float64, one sample at a time, projected by cases."""
    module = module.double().eval()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    result = []
    for image, label, offset in zip(batch.images.double(), batch.labels, start, strict=True):
        delta = torch.from_numpy(offset)
        for _ in range(steps):
            delta.requires_grad_()
            loss = nn.functional.cross_entropy(module(((image + delta - mean) / std)[None]), label[None])
            loss.backward(inputs=[delta])
            assert delta.grad is not None
            stepped = delta.detach() + size * torch.sign(delta.grad)
            stepped = torch.where(stepped > eps, eps, torch.where(stepped < -eps, -eps, stepped))
            delta = torch.where(image + stepped < 0, -image, torch.where(image + stepped > 255, 255 - image, stepped))
        result.append((image + delta).numpy())
    return np.stack(result)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_against_a_slow_oracle(start: bool, steps: int) -> None:
    batch, attack = batch_of(), Attack(3.0, steps, 1.25, start, seed=5)
    offset = np.zeros(batch.images.shape)
    if start:
        noise = uniform_like(batch.images.float(), batch.identifiers, seed=5, epoch=2).double().numpy()
        offset = np.clip(3.0 * (2 * noise - 1), -batch.images.double().numpy(), 255 - batch.images.double().numpy())
    found = attack(network(), batch, epoch=2).numpy()
    expected = oracle(network(), batch, offset, eps=3.0, steps=steps, size=1.25)
    # float32 and float64 may disagree on the sign of a gradient that is all but zero.
    assert np.mean(np.abs(found - expected) > 1e-4) < 2e-3


def test_the_attack_leaves_no_trace() -> None:
    module = network().train()
    module[1].eval()  # type: ignore[index]
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module[0].weight.grad = kept = torch.ones_like(module[0].weight)  # type: ignore[index, assignment]
    Attack(3.0, 3, 2.0)(module, batch_of())
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    grads = [parameter.grad for parameter in module.parameters()]
    assert grads[0] is kept and torch.equal(kept, torch.ones_like(kept)) and grads[1:] == [None] * len(grads[1:])
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_attack_lowers_the_margin_also_through_a_probe_and_in_inference_mode() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(build_model("resnet_tiny", 6), 4).train()
    with torch.inference_mode():
        batch = batch_of(8, 32)
        attacked = robust_attack(8 / 255)(probe, batch)
    losses = [
        nn.functional.cross_entropy(probe((images.float() - 120) / 58), batch.labels.clone()).item()
        for images in (batch.images, attacked)
    ]
    assert losses[1] > losses[0] + 0.05
    assert not probe(torch.zeros(1, 3, 32, 32)).grad_fn.next_functions[1][0]  # features of plain pixels carry no graph


def test_a_sample_that_is_left_out_is_not_stepped() -> None:
    batch = batch_of()
    batch = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
    assert torch.equal(Attack(3.0, 3, 2.0, False)(network(), batch), batch.images.float())


def test_what_the_config_means() -> None:
    assert training_attack(AdversarialConfig(), seed=4) == Attack(3.0, 3, 2.0, True, 4)
    fast = training_attack(AdversarialConfig(fast="fgsm", eps=8 / 255), seed=0)
    assert (fast.eps, fast.steps, fast.step_size) == (8.0, 1, 10.0)
    own = training_attack(AdversarialConfig(step_size=1 / 255, steps=7, random_start=False), seed=0)
    assert (own.steps, own.step_size, own.random_start) == (7, 1.0, False)
    assert robust_attack(4 / 255) == Attack(4.0, 10, 1.0)


# ---------------------------------------------------------------- the random start


def noise_oracle(identifier: int, place: int, *, seed: int, epoch: int) -> float:
    key = np.zeros(1, np.uint64)
    for value in (seed, epoch, identifier):
        key = _mix(key, value)
    word = (int(key[0]) & 0x7FFFFFFF) ^ (place * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        word = (word ^ word >> shift) * factor & 0xFFFFFFFF
    return (word >> 8) / (1 << 24)


def test_the_start_is_a_uniform_hash_of_the_sample() -> None:
    images, identifiers = torch.zeros(64, 3, 16, 16), torch.randperm(10**6)[:64]
    noise = uniform_like(images, identifiers, seed=2**62 + 1, epoch=9)
    for row, place in ((0, 0), (3, 1), (63, 767), (20, 400)):
        expected = noise_oracle(int(identifiers[row]), place, seed=2**62 + 1, epoch=9)
        assert noise.reshape(64, -1)[row, place] == expected
    assert torch.equal(uniform_like(images[:5], identifiers[9:14], seed=2**62 + 1, epoch=9), noise[9:14])
    assert abs(noise.mean() - 1 / 2) < 0.01 and abs(noise.var() - 1 / 12) < 0.01
    others = [uniform_like(images, identifiers, seed=s, epoch=e) for s, e in ((0, 9), (2**62 + 1, 8))]
    rows = torch.cat([noise[:3].flatten(1), *(other[:3].flatten(1) for other in others)])
    assert (torch.corrcoef(rows) - torch.eye(9)).abs().max() < 0.2


# ---------------------------------------------------------------- training


def losses(world: World, fast: str) -> list[float]:
    """The mean losses of a few steps over this rank's parts of the global batches."""
    config = AdversarialConfig(fast=fast, eps=8 / 255)  # type: ignore[arg-type]
    task = Adversarial(network(norm=False), config, seed=1, label_smoothing=0.0)
    engine = DDPEngine(world, task, OptimConfig(batch_size=12), EngineConfig(precision="fp32"))
    found = []
    for step in range(4):
        task.epoch = step // 2
        batch = batch_of(12, seed=step)
        mine = Batch(*(field[world.rank :: world.num_ranks] for field in batch))
        found.append(engine.step(mine, lr=0.05).item())
    return found


@pytest.mark.parametrize("fast", ["none", "fgsm"])
def test_two_ranks_train_as_one(fast: str) -> None:
    alone, both = losses(World(), fast), run_ranks(losses, 2, fast)
    assert np.mean(both, axis=0) == pytest.approx(alone, rel=1e-3)
    assert alone != losses(World(), "fgsm" if fast == "none" else "none")


def argv(root: Path, out: Path, *more: str) -> list[str]:
    settings = {
        "data.train": root / "train.beton", "data.val": root / "val.beton", "task.kind": "adversarial",
        "model.arch": "resnet_tiny", "train.epochs": 2, "train.batch_size": 6, "train.peak_epoch": 1, "train.lr": 0.05,
        "train.resolution": 32, "train.resolution_step": 8, "train.val_resolution": 32, "engine.device": "cpu",
        "log.tensorboard": "false", "task.adversarial.eps": 0.02, "log.every": 1,
    }  # fmt: skip
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--config", "resnet18-surrogate", "--out", str(out), *sets, *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("betons")
    make_beton(folder / "train.beton", per_class=6)
    make_beton(folder / "val.beton", split="val", per_class=3)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    assert main(argv(root, root / "run")) == EXIT_DONE
    return root / "run"


def test_validation_tells_robust_accuracy(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert len(epochs) == 2 and all(0 <= line["val_robust_top1"] <= line["val_top1"] for line in epochs)
    meta = checkpoint.read_meta(checkpoint.resolve(trained))
    assert meta["val"]["robust_top1"] == epochs[-1]["val_robust_top1"]


def test_stopped_and_continued_ends_bit_equal(
    root: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, log_order = argv(root, tmp_path / "run"), watch.log_order

    def signalled(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == 6:  # inside the second epoch, whose random starts differ from the first one's
            os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patch:
        patch.setattr(watch, "log_order", signalled)
        assert main(line) == EXIT_STOPPED
    assert main(line) == EXIT_DONE
    ends = [checkpoint.load_weights(checkpoint.resolve(run)) for run in (trained, tmp_path / "run")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("cached", [True, False])
def test_transfer_tells_robust_accuracy(root: Path, trained: Path, tmp_path: Path, cached: bool) -> None:
    small = {"epochs": 2, "batch_size": 6, "resolution": 32, "resolution_step": 8, "val_resolution": 32}
    sets = [word for key, value in small.items() for word in ("--set", f"train.{key}={value}")]
    out = tmp_path / "R.json"
    flags = ["--cached"] if cached else []
    line = ["transfer", "--checkpoint", str(trained), "--train", str(root / "train.beton"), "--mode", "lp",
            "--test", str(root / "val.beton"), "--robust", "--out", str(out), "--set", "engine.device=cpu"]  # fmt: skip
    assert main([*line, *flags, *sets]) == EXIT_DONE
    result = json.loads(out.read_text())
    assert 0 <= result["robust_top1"] <= result["top1"] and result["num_test"] == 12


@pytest.mark.parametrize("eps", ["-0.1", "1.5", "nan"])
def test_a_radius_outside_the_range_is_refused(
    root: Path, tmp_path: Path, eps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = argv(root, tmp_path / "run", "--set", f"task.adversarial.eps={eps}")
    assert main(line) == EXIT_BAD_INPUT
    (error,) = capsys.readouterr().err.splitlines()
    assert "task.adversarial.eps" in error and not (tmp_path / "run").exists()
