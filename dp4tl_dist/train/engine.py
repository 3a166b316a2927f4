"""Engines: what runs an optimizer step over the ranks. One door for data parallelism, precision and compilation."""

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from dp4tl_dist.config import EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.train.task import Task
from dp4tl_dist.world import World, all_sum


class DDPEngine:
    """Gradients averaged by torch's DistributedDataParallel; a single rank runs the bare module."""

    def __init__(self, world: World, task: Task, train: OptimConfig, config: EngineConfig) -> None:
        self.world, self.task, self.train = world, task, train
        self.cuda = world.device != "cpu"
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.cuda)
        if self.cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        task.module.to(world.device)
        if config.channels_last:
            task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(task.module, train, fused=self.cuda)
        self.compiled = config.compile == "on" or (config.compile == "auto" and self.cuda)
        task.forward = self._wrap(task.module)

    def _wrap(self, module: nn.Module) -> Any:
        wrapped: Any = module
        if self.world.num_ranks > 1:
            # Batch-norm buffers stay local while training, and are averaged where they matter: `averaged_buffers`.
            # After the first step DDP lays its buckets out anew, by the order in which gradients came, and with them
            # the order in which more than two ranks sum. Looking for unused parameters keeps it from that: a resumed
            # run on CPUs ends bit-equal. On GPUs speed matters more.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
            wrapped = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[torch.device(self.world.device).index] if self.cuda else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=not self.cuda,
            )
        self.ddp = wrapped if wrapped is not module else None
        return torch.compile(wrapped) if self.compiled else wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it is on, else nothing."""
        return torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, enabled=self.bf16)

    def step(self, batch: Batch, *, lr: float) -> torch.Tensor:
        """One optimizer step on this rank's part of the global batch; returns its mean loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.world.device)
        parts = split(batch, self.train.accumulate)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            sync = contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()
            with sync, self.autocast():
                loss = self.task(part)["loss"] / len(parts)
                loss.backward()
            total += loss.detach()
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.task.module.parameters(), self.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def make_optimizer(module: nn.Module, train: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer over the parameters that ask for gradients. Its learning rate is set anew at every step."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=fused
        )
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=fused)


def split(batch: Batch, parts: int) -> list[Batch]:
    """`batch` in `parts` equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    return [Batch(*fields) for fields in zip(*(field.chunk(parts) for field in batch), strict=True)]


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
