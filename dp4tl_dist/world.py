"""Who am I among the ranks? Detected once from the environment, then passed down."""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError
from dp4tl_dist.nodes import expand_nodes, interface_towards, peer_node, slurm_port

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of a run."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1
    device: str = "cpu"
    """"cpu", or "cuda:I" with this rank's GPU."""
    launcher: str = "single"
    """"torchrun", "slurm" (srun) or "single"."""
    master: str = ""
    """host:port of the rendezvous; empty for a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def num_workers(self, asked: int = 0) -> int:
        """Decoding threads for this rank: `asked`, or an even share of the cores that this process may use."""
        return asked or max(1, len(os.sched_getaffinity(0)) // self.ranks_per_node)


def detect(environ: Mapping[str, str]) -> World:
    """The world that `environ` describes: torchrun's, srun's, or a single process.

    A partly set environment is a UserError that names the missing variables.
    """
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        _require(environ, TORCHRUN, "torchrun's")
        return World(
            rank=int(environ["RANK"]),
            num_ranks=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            ranks_per_node=int(environ["LOCAL_WORLD_SIZE"]),
            launcher="torchrun",
            master=f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        )
    # Inside `salloc` or a batch script SLURM_JOB_ID is there without a step: that is a single process.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and environ.get("SLURM_NTASKS", "1") != "1":
        _require(environ, SLURM, "srun's")
        num_ranks = int(environ["SLURM_NTASKS"])
        nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "localhost")))
        return World(
            rank=int(environ["SLURM_PROCID"]),
            num_ranks=num_ranks,
            local_rank=int(environ["SLURM_LOCALID"]),
            ranks_per_node=max(1, num_ranks // len(nodes)),
            launcher="slurm",
            master=f"{environ.get('MASTER_ADDR', nodes[0])}:{environ.get('MASTER_PORT', slurm_port(environ))}",
        )
    return World()


def _require(environ: Mapping[str, str], names: tuple[str, ...], whose: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"{whose} environment is only partly set: {', '.join(missing)} missing; "
            "start through torchrun or srun, or unset the others to run a single process"
        )


def place(world: World, device: str) -> World:
    """`world` with its device: "auto" takes CUDA where there is one; "cuda" insists."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return replace(world, device="cpu")
    if not torch.cuda.is_available():
        raise UserError('CUDA was asked for, and torch sees no GPU here: use device = "cpu" or see `dp4tl doctor`')
    # A launcher may narrow each rank's view to one GPU; then that one is number 0 for everybody.
    visible = torch.cuda.device_count()
    index = world.local_rank if visible > 1 or world.ranks_per_node == 1 else 0
    if index >= visible:
        raise UserError(f"rank {world.rank} needs GPU {index}, and {visible} are visible: start fewer ranks per node")
    return replace(world, device=f"cuda:{index}")


@contextlib.contextmanager
def joined(device: str = "auto", *, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the other ranks for the length of the block and yield the World.

    CPU tensors travel by gloo and CUDA tensors by NCCL, so that small control messages never synchronise the GPU.
    """
    import torch
    import torch.distributed as dist

    world = place(detect(os.environ), device)
    if world.device == "cpu":
        torch.set_num_threads(world.num_workers())
    else:
        torch.cuda.set_device(torch.device(world.device))
    if world.num_ranks == 1:
        yield world
        return
    if world.launcher == "slurm" and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(peer_node(os.environ))
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        "gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"tcp://{world.master}" if world.launcher == "slurm" else "env://",
        rank=world.rank,
        world_size=world.num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=None if world.device == "cpu" else torch.device(world.device),
    )
    yield world
    leave()  # a rank that fails leaves in `cli.main`, once its error is told: when it leaves, the others fail as well


def leave() -> None:
    """Leave the group of ranks, if this process is in one."""
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()


LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
    "timeout caused pair closure", "NCCL error", "Watchdog caught collective",
)  # fmt: skip


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed since another rank ended or no longer answers: a consequence, not a cause."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


# ---------------------------------------------------------------- collectives, the identity for a single rank


def barrier(world: World) -> None:
    if world.num_ranks > 1:
        all_sum(world, np.zeros(1))


def on_main(world: World, action: Callable[[], Result]) -> Result | None:
    """Run `action` on rank 0 and return its result there, None elsewhere; its UserError is raised on every rank."""
    result, failure = None, ""
    if world.is_main:
        try:
            result = action()
        except UserError as error:
            failure = str(error)
    if world.num_ranks > 1:
        import torch.distributed as dist

        shared = [failure]
        dist.broadcast_object_list(shared)
        failure = shared[0]
    if failure:
        raise UserError(failure)
    return result


def all_sum(world: World, values: NDArray[Any]) -> NDArray[Any]:
    """The elementwise sum of `values` over the ranks (int64 or float64), on every rank."""
    return _all_reduce(world, values, "SUM")


def all_max(world: World, values: NDArray[Any]) -> NDArray[Any]:
    """The elementwise maximum of `values` over the ranks, on every rank."""
    return _all_reduce(world, values, "MAX")


def _all_reduce(world: World, values: NDArray[Any], how: str) -> NDArray[Any]:
    if world.num_ranks == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor: torch.Tensor = torch.from_numpy(np.array(values))
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how))
    return tensor.numpy()


def gather_rows(world: World, positions: NDArray[np.int64], rows: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """Put each rank's `rows` (n_of_rank, ...) at `positions` (n_of_rank,) of one array (num_rows, ...), on every rank.

    Raises RuntimeError unless every position of `num_rows` is written exactly once over all ranks.
    """
    # A sum over disjoint rows is a gather that needs no padding and no knowledge of the others' sizes.
    inside = (positions >= 0) & (positions < num_rows)
    counts = np.bincount(positions[inside], minlength=num_rows).astype(np.int64)
    result = np.zeros((num_rows, *rows.shape[1:]), rows.dtype)
    result[positions[inside]] = rows[inside]
    # One number more tells every rank of what lies outside on any.
    outside, *_ = all_sum(world, np.array([np.count_nonzero(~inside)]))
    counts = all_sum(world, counts)
    if outside:
        raise RuntimeError(f"{outside} positions are not among the {num_rows} rows")
    if not (counts == 1).all():
        wrong = np.flatnonzero(counts != 1)
        raise RuntimeError(f"{len(wrong)} of {num_rows} rows were not written exactly once (first: row {wrong[:1]})")
    return all_sum(world, result)
