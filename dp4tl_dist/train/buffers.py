"""Batch-norm statistics: each rank has its own while it trains, and their mean is what is evaluated and saved."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from dp4tl_dist.world import World, all_sum


@contextlib.contextmanager
def averaged_buffers(module: nn.Module, world: World) -> Iterator[None]:
    """Inside the block the module's float buffers (batch-norm statistics) are the mean over the ranks.

    Afterwards each rank has its own again, so that evaluating or saving never changes how training goes on.
    """
    if world.num_ranks == 1:
        yield
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    local = [buffer.clone() for buffer in buffers]
    flat = torch.cat([buffer.double().flatten().cpu() for buffer in buffers] or [torch.zeros(0, dtype=torch.float64)])
    mean = torch.from_numpy(all_sum(world, flat.numpy()) / np.float64(world.num_ranks))
    _assign(buffers, list(mean.split([buffer.numel() for buffer in buffers])))
    try:
        yield
    finally:
        _assign(buffers, local)


def _assign(buffers: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value.view_as(buffer))
