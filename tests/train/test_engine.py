"""One optimizer step is the same step, however it is cut into micro-batches or dealt out to ranks."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from torch import nn

from dp4tl_dist.config import EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.data.order import epoch_order, rank_batches
from dp4tl_dist.train.engine import DDPEngine, averaged_buffers, make_optimizer, split
from dp4tl_dist.train.source import FeatureSource
from dp4tl_dist.train.task import LinearProbe, Supervised
from dp4tl_dist.world import World

SGD = {"optimizer": "sgd", "weight_decay": 1e-3, "momentum": 0.9}


def perceptron() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def source() -> FeatureSource:
    generator = torch.Generator().manual_seed(1)
    return FeatureSource(torch.randn(60, 6, generator=generator), torch.randint(0, 3, (60,), generator=generator))


def batch_of(positions: Sequence[int]) -> Batch:
    (batch,) = source().epoch([np.array(positions)], None)  # type: ignore[arg-type]
    return batch


def trained(world: World, optim: OptimConfig, module: nn.Module, *, steps: int = 6) -> list[float]:
    """The weights after some steps over this rank's parts of the global batches, flat."""
    engine = DDPEngine(world, Supervised(module), optim, EngineConfig(precision="fp32"))
    order = epoch_order(np.arange(60), seed=0, epoch=0)
    mine = rank_batches(order, batch_size=optim.batch_size, num_ranks=world.num_ranks, rank=world.rank)
    for batch in source().epoch(list(mine[:steps]), None):  # type: ignore[arg-type]
        engine.step(batch, lr=0.1)
    return flat(module).tolist()


def flat(module: nn.Module) -> NDArray[np.float32]:
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in module.parameters()])


# ---------------------------------------------------------------- one rank


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_micro_batches_make_the_same_step(parts: int, clip: float) -> None:
    results = []
    for accumulate in (1, parts):
        optim = OptimConfig(**SGD, batch_size=8, accumulate=accumulate, clip_norm=clip)  # type: ignore[arg-type]
        results.append(trained(World(), optim, perceptron()))
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)
    assert np.abs(results[0] - flat(perceptron())).max() > 1e-3


def test_split_keeps_order_and_every_sample() -> None:
    batch = batch_of(range(8))
    parts = split(batch, 4)
    assert [part.identifiers.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert split(batch, 1)[0] is batch


def test_the_step_against_sgd_by_hand() -> None:
    module, batch = nn.Linear(6, 3), batch_of(range(8))
    weight = module.weight.detach().clone()
    logits = batch.images @ weight.T + module.bias.detach()
    error = (logits.softmax(dim=1) - nn.functional.one_hot(batch.labels, 3)) / 8
    expected = weight - 0.5 * (error.T @ batch.images + 1e-3 * weight)
    engine = DDPEngine(World(), Supervised(module), OptimConfig(**SGD, batch_size=8), EngineConfig())  # type: ignore[arg-type]
    loss = engine.step(batch, lr=0.5)
    torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, batch.labels).item(), rel=1e-5)
    assert not loss.requires_grad and module.weight.grad is None


def test_clipping_bounds_the_step() -> None:
    moves = []
    for clip in (0.0, 0.01):
        module = perceptron()
        optim = OptimConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0, batch_size=8, clip_norm=clip)
        trained(World(), optim, module, steps=1)
        moves.append(np.linalg.norm(flat(module) - flat(perceptron())))
    assert moves[0] > 0.01 and moves[1] == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimizers_hold_what_trains(name: str, kind: str) -> None:
    module = perceptron()
    module[0].requires_grad_(False)  # type: ignore[index]
    optim = OptimConfig(optimizer=name, weight_decay=0.25, momentum=0.5)  # type: ignore[arg-type]
    optimizer = make_optimizer(module, optim, fused=False)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == kind and group["weight_decay"] == 0.25
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in module[2].parameters()]  # type: ignore[index]
    assert name != "sgd" or group["momentum"] == 0.5


def test_precision_is_what_is_asked_for() -> None:
    for precision, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        module = nn.Linear(6, 3)
        engine = DDPEngine(World(), Supervised(module), OptimConfig(), EngineConfig(precision=precision))  # type: ignore[arg-type]
        with engine.autocast():
            assert module(torch.zeros(1, 6)).dtype == dtype


def test_a_probe_never_moves_its_backbone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
            self.fc = nn.Linear(8, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc(self.body(images))
            return result

    probe = LinearProbe(Net(), 3)
    before = copy.deepcopy(probe.state_dict())
    engine = DDPEngine(World(), Supervised(probe), OptimConfig(batch_size=8), EngineConfig())
    probe.train()
    for _ in range(3):
        engine.step(batch_of(range(8)), lr=0.5)
    after = probe.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {"head.weight", "head.bias"}
    assert probe.training and not probe.backbone.training


# ---------------------------------------------------------------- several ranks


def weights_on_rank(world: World, optim: OptimConfig) -> list[float]:
    return trained(world, optim, perceptron())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_ranks_makes_the_same_steps(accumulate: int) -> None:
    optim = OptimConfig(**SGD, batch_size=12, accumulate=accumulate, clip_norm=0.3)  # type: ignore[arg-type]
    alone = trained(World(), optim, perceptron(), steps=5)
    for num_ranks in (2, 3):
        results = run_ranks(weights_on_rank, num_ranks, optim)
        assert all(result == results[0] for result in results)
        np.testing.assert_allclose(results[0], alone, atol=2e-6)


def averaged_on_rank(world: World) -> tuple[list[float], list[float], int, bool]:
    """(inside, afterwards, the counter inside, whether an error leaves the own values)"""
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1))
    own = [0.1 + world.rank, 1e8 * world.rank, 1 / 3]
    with torch.no_grad():
        module[0].running_mean.copy_(torch.tensor(own[:2]))
        module[1].running_var.fill_(own[2])
        module[0].num_batches_tracked.fill_(7 + world.rank)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def values() -> list[float]:
        return [*module[0].running_mean.tolist(), *module[1].running_var.tolist()]

    with averaged_buffers(module, world):
        inside, count = values(), int(module[0].num_batches_tracked)
    after = values()
    try:
        with averaged_buffers(module, world):
            raise ZeroDivisionError
    except ZeroDivisionError:
        same = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return inside, after, count, same


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_buffers_are_averaged_inside_and_own_again_outside(num_ranks: int) -> None:
    results = run_ranks(averaged_on_rank, num_ranks) if num_ranks > 1 else [averaged_on_rank(World())]
    own = np.array([[0.1 + rank, 1e8 * rank, 1 / 3] for rank in range(num_ranks)], np.float32)
    mean = own.astype(np.float64).mean(axis=0).astype(np.float32)
    for rank, (inside, after, count, same) in enumerate(results):
        np.testing.assert_array_equal(np.float32(inside), mean)
        np.testing.assert_array_equal(np.float32(after), own[rank])
        assert count == 7 + rank and same
