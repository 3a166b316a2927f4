"""Activation checkpointing: a block keeps its input alone, and computes the rest again when gradients are needed."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dp4tl_dist.errors import UserError

BLOCKS = ("BasicBlock", "Bottleneck", "EncoderBlock", "Block")
"""Classes of the repeated parts of ResNets (torchvision, timm) and vision transformers (torchvision, timm)."""


def recompute_blocks(module: nn.Module) -> None:
    """Have each block of `module` computed again in the backward pass. Names, weights and results stay."""
    for block in blocks_of(module):
        block.forward = functools.partial(_forward, block, block.forward)


def blocks_of(module: nn.Module) -> list[Any]:
    """The repeated parts of a network; UserError where none are known."""
    blocks = [part for part in module.modules() if type(part).__name__ in BLOCKS]
    if not blocks:
        raise UserError(
            f"engine.activation_checkpointing: {type(module).__name__} has no blocks that are known here "
            f"({', '.join(BLOCKS)}): set it to false"
        )
    return blocks


def _forward(block: nn.Module, forward: Any, *inputs: Any) -> Any:
    if not block.training:
        return forward(*inputs)
    if torch.compiler.is_compiling():  # the compiled backward pass computes again what it needs, and updates nothing
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=functools.partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first pass and of the second."""
    return contextlib.nullcontext(), unchanged_statistics(block)


@contextlib.contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Inside the block batch norm normalises by its batch, and its running statistics and counts stay as they are."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # With a momentum of 0 the kernel computes 1 x old + 0 x new; the statistics themselves must stay arguments, for
        # both passes are to save the same tensors.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
