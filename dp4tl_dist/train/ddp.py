"""Data parallelism by torch alone: every rank holds the whole model and the whole optimizer."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dp4tl_dist.config import EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.train.optimizer import load_optimizer, make_optimizer
from dp4tl_dist.train.recompute import recompute_blocks
from dp4tl_dist.train.task import Task
from dp4tl_dist.world import World

MOST_SHAPES = 64  # graphs of one function; beyond them torch goes on without compiling


class DDPEngine:
    """Gradients averaged by torch's DistributedDataParallel; a single rank runs the bare module."""

    def __init__(self, world: World, task: Task, train: OptimConfig, config: EngineConfig) -> None:
        self.world, self.task, self.train = world, task, train
        self.cuda = world.device != "cpu"
        self.bf16 = uses_bf16(config, world)
        allow_tf32(world)
        task.module.to(world.device)
        if config.channels_last:
            task.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.activation_checkpointing:
            recompute_blocks(task.module)
        self.optimizer = make_optimizer(task.module, train, fused=self.cuda)
        self.compiled = config.compile == "on" or (config.compile == "auto" and self.cuda)
        task.forward = self._wrap(task.module)

    def _wrap(self, module: nn.Module) -> Any:
        wrapped: Any = module
        if self.world.num_ranks > 1:
            # Batch-norm buffers stay local while training, and are averaged where they matter: `averaged_buffers`.
            # After the first step DDP lays its buckets out anew, by the order in which gradients came, and with them
            # the order in which more than two ranks sum. Looking for unused parameters keeps it from that: a resumed
            # run on CPUs ends bit-equal, for the price of one line of torch's that it found none. On GPUs speed matters
            # more.
            wrapped = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[torch.device(self.world.device).index] if self.cuda else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=not self.cuda and self.world.num_ranks > 2,
            )
        self.ddp = wrapped if wrapped is not module else None
        if not self.compiled:
            return wrapped
        # One graph for each resolution of a ramp: one for all of them has symbolic shapes, and slower kernels.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_SHAPES)
        return torch.compile(wrapped, dynamic=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it is on, else nothing."""
        return torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, enabled=self.bf16)

    def collect(self) -> None:
        """Bring what is trained into `task.module`: it is there already."""

    def adopt(self) -> None:
        """Train on from what was loaded into `task.module`."""

    def optimizer_state(self) -> tuple[dict[str, Any], None]:
        """What rank 0 saves of the optimizer, and what each rank saves of its own."""
        return self.optimizer.state_dict(), None

    def load_optimizer_state(self, shared: dict[str, Any], own: list[Any]) -> None:
        """Restore what `optimizer_state` gave: rank 0's and, in the order of ranks, each rank's own."""
        load_optimizer(self.optimizer, shared)

    def step(self, batch: Batch, *, lr: float, size: int = 0) -> torch.Tensor:
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
                loss = loss * share if (share := uneven(part, len(parts), self.world, size)) else loss
                loss.backward()
            total += loss.detach()
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.task.module.parameters(), self.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def uses_bf16(config: EngineConfig, world: World) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and world.device != "cpu")


def allow_tf32(world: World) -> None:
    if world.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def split(batch: Batch, parts: int) -> list[Batch]:
    """`batch` in `parts` micro-batches, in order; equal ones, where it can be divided so, else even to one sample."""
    if parts == 1:
        return [batch]
    return [Batch(*fields) for fields in zip(*(field.tensor_split(parts) for field in batch), strict=True)]


def uneven(part: Batch, parts: int, world: World, size: int) -> float:
    """What a micro-batch's mean loss counts where the step's `size` samples are not divided evenly: its samples in
    those of an even one. 0 where they are, or where `size` is 0, for unknown."""
    even, own = size / (parts * world.num_ranks), len(part.labels)
    return 0.0 if not size or own == even else own / even
