"""Activation checkpointing changes memory and time, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_ranks
from torch import nn

from dp4tl_dist.config import EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.errors import UserError
from dp4tl_dist.models import build_model
from dp4tl_dist.train.engine import DDPEngine
from dp4tl_dist.train.recompute import recompute_blocks, unchanged_statistics
from dp4tl_dist.train.task import Supervised
from dp4tl_dist.world import World


def images(count: int, side: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def trained(
    world: World, arch: str, *, recompute: bool, compiled: bool = False
) -> tuple[list[float], dict[str, NDArray[np.float32]]]:
    """The losses of three steps in two micro-batches, and weights and buffers after them."""
    torch.manual_seed(1)
    model = build_model(arch, 4).train()
    engine = DDPEngine(
        world, Supervised(model), OptimConfig(batch_size=8, accumulate=2, clip_norm=1.0),
        EngineConfig(precision="fp32", activation_checkpointing=recompute, compile="on" if compiled else "off"),
    )  # fmt: skip
    losses = []
    for step in range(3):
        batch = Batch(images(8, 32, seed=step), torch.arange(8) % 4, torch.arange(8))
        losses.append(engine.step(Batch(*(field[world.rank :: world.num_ranks] for field in batch)), lr=0.05).item())
    return losses, {name: value.numpy().copy() for name, value in model.state_dict().items()}


def both(world: World) -> list[tuple[list[float], dict[str, NDArray[np.float32]]]]:
    return [trained(world, "resnet_tiny", recompute=recompute) for recompute in (False, True)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_bits_with_and_without(num_ranks: int) -> None:
    for plain, recomputed in [both(World())] if num_ranks == 1 else run_ranks(both, 2):
        assert plain[0] == recomputed[0]
        assert plain[1].keys() == recomputed[1].keys()
        assert all(np.array_equal(value, recomputed[1][name]) for name, value in plain[1].items())
        assert plain[1]["blocks.0.bn1.num_batches_tracked"] == 6  # two micro-batches a step, each counted once


def test_the_same_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the running statistics: each micro-batch counts once, whatever is computed again."""
    real = torch.compile  # here everything but the making of kernels
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend="aot_eager", **options))
    eager = trained(World(), "resnet_tiny", recompute=False)
    for recompute in (False, True):
        losses, state = trained(World(), "resnet_tiny", recompute=recompute, compiled=True)
        np.testing.assert_allclose(losses, eager[0], rtol=1e-4)
        for name, value in eager[1].items():
            np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_less_is_kept_for_the_way_back(arch: str) -> None:
    torch.manual_seed(0)
    plain = build_model(arch, 4)
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed)
    kept = [kept_bytes(model, images(2, 64, seed=0).float()) for model in (plain, recomputed)]
    assert kept[1] < 0.6 * kept[0]


def kept_bytes(model: nn.Module, pixels: torch.Tensor) -> int:
    """Bytes of what autograd holds after the forward pass, parameters aside."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(pixels)
    assert output.requires_grad
    return sum(seen.values())


def test_evaluation_is_left_alone() -> None:
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 4).eval()
    pixels = images(2, 32, seed=0).float()
    before = model(pixels)
    recompute_blocks(model)
    assert torch.equal(model(pixels), before)


def test_statistics_come_back_after_an_error() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError, match="inside"), unchanged_statistics(norm):
        norm(torch.randn(2, 3, 4, 4))
        assert norm.running_mean is not None and not norm.running_mean.any()
        raise RuntimeError("inside")
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 0


def test_a_network_without_known_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="activation_checkpointing"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)))
