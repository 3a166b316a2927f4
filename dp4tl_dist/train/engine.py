"""Engines: what runs an optimizer step over the ranks. One door for data parallelism, precision and compilation."""

import contextlib
import copy
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dp4tl_dist.config import EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.errors import UserError
from dp4tl_dist.train.buffers import averaged_buffers
from dp4tl_dist.train.ddp import DDPEngine, allow_tf32, split, uneven, uses_bf16
from dp4tl_dist.train.optimizer import fits, load_optimizer, make_optimizer
from dp4tl_dist.train.recompute import recompute_blocks
from dp4tl_dist.train.shards import Block, reshard
from dp4tl_dist.train.task import Task
from dp4tl_dist.world import World

__all__ = [
    "DDPEngine", "DeepSpeedEngine", "Engine", "averaged_buffers", "check_engine", "make_engine", "make_optimizer",
    "split",
]  # fmt: skip


class Engine(Protocol):
    """Runs optimizer steps on a task; the task's module is where everybody else reads and writes the weights."""

    def step(self, batch: Batch, *, lr: float, size: int = 0) -> Tensor:
        """One optimizer step on this rank's part of the global batch; returns its mean loss, on the device.

        size: samples of the global batch, where it may not be divided evenly; each counts alike.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        ...

    def collect(self) -> None:
        """Bring what is trained into the task's module, on every rank. All ranks call it."""
        ...

    def adopt(self) -> None:
        """Train on from what was loaded into the task's module. All ranks call it."""
        ...

    def optimizer_state(self) -> tuple[Any, Any]:
        """(what rank 0 saves of the optimizer, what this rank adds of its own or None)."""
        ...

    def load_optimizer_state(self, shared: Any, own: list[Any]) -> None:
        """Restore rank 0's part and, listed in the order of ranks, what each rank had added."""
        ...


def make_engine(world: World, task: Task, train: OptimConfig, config: EngineConfig) -> Engine:
    """The engine that `engine.kind` names."""
    kinds: dict[str, type[DDPEngine] | type[DeepSpeedEngine]] = {"ddp": DDPEngine, "deepspeed": DeepSpeedEngine}
    return kinds[config.kind](world, task, train, config)


def check_engine(config: EngineConfig) -> None:
    """Raise UserError where the engine cannot run here."""
    if config.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError('engine.kind = "deepspeed": it is not installed: pip install "dp4tl_dist[deepspeed]"')


class DeepSpeedEngine:
    """ZeRO by DeepSpeed: each rank holds a share of the optimizer (1), of the gradients (2), of the weights (3).

    With ZeRO 3 the task's module is a plain copy of what is trained, so that evaluation (whose batches differ in number
    from rank to rank), attacks and checkpoints need no collective inside the forward pass; `collect` fills it.
    """

    def __init__(self, world: World, task: Task, train: OptimConfig, config: EngineConfig) -> None:
        self.world, self.task, self.train, self.zero = world, task, train, config.zero
        self.bf16 = uses_bf16(config, world)
        allow_tf32(world)
        module = task.module.to(world.device)
        if self.zero == 3:
            buffers = {id(buffer): buffer for buffer in module.buffers()}  # one set of statistics for both
            module = copy.deepcopy(module, buffers)
        if config.activation_checkpointing:
            recompute_blocks(module)
        self.deepspeed = load_deepspeed(world)
        with launcher_variables(world):
            self.engine, *_ = self.deepspeed.initialize(
                model=module,
                optimizer=make_optimizer(module, train, fused=world.device != "cpu"),
                config=self._config(),
            )
        self.basic = self.engine.basic_optimizer
        self.is_read = hasattr(task, "attack") or hasattr(task, "queue")  # the weights, by the task, at each step
        task.forward = self.engine

    def _config(self) -> dict[str, Any]:
        train = self.train
        return {
            "train_micro_batch_size_per_gpu": train.batch_size // (self.world.num_ranks * train.accumulate),
            "gradient_accumulation_steps": train.accumulate,
            "gradient_clipping": train.clip_norm,  # left out, it would be 1
            "zero_optimization": {"stage": self.zero},
            "zero_allow_untested_optimizer": True,
            # No module is safe: gradients stay float32 when they are summed over the ranks.
            "torch_autocast": {"enabled": self.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 1 << 62,
        }

    def autocast(self) -> AbstractContextManager[Any]:
        device = torch.device(self.world.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def step(self, batch: Batch, *, lr: float, size: int = 0) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.world.device)
        parts = split(batch, self.train.accumulate)
        if self.is_read:
            self.collect()
        for part in parts:
            with self.autocast():
                loss = self.task(part)["loss"]
                loss = loss * share if (share := uneven(part, len(parts), self.world, size)) else loss
            self.engine.backward(loss)  # divides by the number of micro-batches
            self.engine.step()  # moves the weights after the last of them
            total += loss.detach() / len(parts)
        return total

    def collect(self) -> None:
        if self.zero == 3:
            with torch.no_grad(), self._whole(modifier=None) as pairs:
                for plain, trained in pairs:
                    plain.copy_(trained)

    def adopt(self) -> None:
        if self.zero == 3:
            with torch.no_grad(), self._whole(modifier=0) as pairs:
                for plain, trained in pairs:
                    trained.copy_(plain)
        if self.zero:
            self.engine.optimizer.refresh_fp32_params()

    @contextlib.contextmanager
    def _whole(self, *, modifier: int | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """(parameter of the task's module, the same of the trained one), which is whole inside the block."""
        trained = list(self.engine.module.parameters())
        with self.deepspeed.zero.GatheredParameters(trained, modifier_rank=modifier):
            yield list(zip(self.task.module.parameters(), trained, strict=True))

    def optimizer_state(self) -> tuple[Any, Any]:
        if self.zero == 0:
            return self.basic.state_dict(), None
        return None, [_to_cpu(self.basic.state.get(flat, {})) for flat in self._flats()]

    def load_optimizer_state(self, shared: Any, own: list[Any]) -> None:
        """Shares of another number of ranks are dealt out anew."""
        if self.zero == 0:
            load_optimizer(self.basic, shared)
            return
        flats = self._flats()
        if len(own) != self.world.num_ranks and len(flats) > 1:
            raise UserError(
                f"the optimizer of {len(own)} ranks is in {len(flats)} parts, which cannot be dealt out to "
                f"{self.world.num_ranks}: go on with {len(own)} ranks, or start from its weights by model.init"
            )
        for i, flat in enumerate(flats):
            states = [rank[i] for rank in own]
            state = states[self.world.rank] if len(own) == self.world.num_ranks else self._dealt(states, flat)
            if any(isinstance(value, Tensor) and not fits(value, flat) for value in state.values()):
                raise ValueError(f"the optimizer's part {i} is not one of {list(flat.shape)}")
            self.basic.state[flat] = {key: _onto(value, flat) for key, value in state.items()}

    def _dealt(self, states: list[dict[str, Any]], flat: Tensor) -> dict[str, Any]:
        """This rank's part of the optimizer's state that other ranks saved."""
        numels = [item.ds_numel if self.zero == 3 else item.numel() for item in self._trained()]
        blocks = [Block(numel) for numel in numels] if self.zero == 3 else [Block(sum(numels), flat.numel())]
        world = self.world
        return {
            key: reshard([state[key] for state in states], blocks, num_ranks=world.num_ranks, rank=world.rank)
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in states[0].items()
        }

    def _trained(self) -> list[Any]:
        return [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]

    def _flats(self) -> list[Tensor]:
        """What the optimizer itself sees of this rank's share: flat float32 tensors."""
        zero = self.engine.optimizer
        found = zero.fp32_partitioned_groups_flat if self.zero == 3 else zero.single_partition_of_fp32_groups
        return list(found)


def _to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    # Clones: the flat tensors go on changing while a checkpoint is written in the background.
    return {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _onto(value: Any, flat: Tensor) -> Any:
    return value.to(flat.device) if isinstance(value, Tensor) else value


def load_deepspeed(world: World) -> Any:
    """DeepSpeed, joined to the group of ranks that this process is in; a single process gets a group of its own."""
    cuda = world.device != "cpu"
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"  # it would take a GPU that it sees
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.comm.comm

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # An operation for shared memory that it would compile for a minute or two, and does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    deepspeed.comm.comm.cdb = None  # a group of an earlier run in this process is gone
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextlib.contextmanager
def launcher_variables(world: World) -> Iterator[None]:
    """Inside the block the environment is torchrun's, as DeepSpeed wants to read it, whoever launched this rank."""
    host, _, port = (world.master or "127.0.0.1:29500").rpartition(":")
    index = torch.device(world.device).index or 0
    values = {"RANK": world.rank, "WORLD_SIZE": world.num_ranks, "LOCAL_RANK": index, "MASTER_ADDR": host,
              "MASTER_PORT": port}  # fmt: skip
    before = dict(os.environ)
    os.environ.update({key: str(value) for key, value in values.items()})
    try:
        yield
    finally:
        for key in values:
            os.environ.pop(key)
        os.environ.update({key: before[key] for key in values.keys() & before.keys()})
