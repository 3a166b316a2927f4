"""Who am I among the ranks? Detected once from the environment, then passed down."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dp4tl_dist.collectives import all_max, all_sum, alone, barrier, gather_rows, on_main
from dp4tl_dist.errors import UserError
from dp4tl_dist.machine import num_cores
from dp4tl_dist.nodes import expand_nodes, interface_towards, num_tasks, peer_node, slurm_port
from dp4tl_dist.rendezvous import LOOPBACK, meet, stay_on_loopback
from dp4tl_dist.waiting import Watch

__all__ = [
    "World", "all_max", "all_sum", "alone", "barrier", "detect", "expand_nodes", "gather_rows", "joined", "leave",
    "lost_others", "on_main", "place", "slurm_port",
]  # fmt: skip
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")


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
        return asked or max(1, num_cores() // self.ranks_per_node)


def detect(environ: Mapping[str, str]) -> World:
    """The world that `environ` describes: torchrun's, srun's, or a single process.

    A partly set environment is a UserError that names the missing variables.
    """
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        _require(environ, TORCHRUN, "torchrun's")
        return World(
            rank=_number(environ, "RANK"),
            num_ranks=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK"),
            ranks_per_node=_number(environ, "LOCAL_WORLD_SIZE"),
            launcher="torchrun",
            master=f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        )
    # Inside `salloc` or a batch script SLURM_JOB_ID is there without a step: that is a single process.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and num_tasks(environ) != "1":
        _require(environ, SLURM, "srun's")
        num_ranks = _number({"SLURM_STEP_NUM_TASKS": num_tasks(environ)}, "SLURM_STEP_NUM_TASKS")
        nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "localhost")))
        return World(
            rank=_number(environ, "SLURM_PROCID"),
            num_ranks=num_ranks,
            local_rank=_number(environ, "SLURM_LOCALID"),
            ranks_per_node=max(1, num_ranks // len(nodes)),
            launcher="slurm",
            master=f"{environ.get('MASTER_ADDR', nodes[0] if len(nodes) > 1 else LOOPBACK)}:"
            f"{environ.get('MASTER_PORT', slurm_port(environ))}",
        )
    return World()


def _require(environ: Mapping[str, str], names: tuple[str, ...], whose: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"{whose} environment is only partly set: {', '.join(missing)} missing; "
            "start through torchrun or srun, or unset the others to run a single process"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(f"{name} is {environ[name]!r} in the environment, and should be a number: unset it, or mend it")
    return int(environ[name])


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


def threads_asked(environ: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS, where somebody asked for it. torchrun sets 1 where nobody did; what it was itself started with
    tells the two apart."""
    text = environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not text.isdecimal() or not int(text):
        return None
    if "TORCHELASTIC_RUN_ID" in environ:
        with contextlib.suppress(OSError):
            started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            return int(text) if any(item.startswith(b"OMP_NUM_THREADS=") for item in started_with) else None
    return int(text)


@contextlib.contextmanager
def joined(device: str = "auto", *, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the other ranks for the length of the block and yield the World.

    CPU tensors travel by gloo and CUDA tensors by NCCL, so that small control messages never synchronise the GPU.
    """
    import torch
    import torch.distributed as dist

    world = place(detect(os.environ), device)
    if world.device == "cpu":
        torch.set_num_threads(threads_asked(os.environ) or world.num_workers())
    else:
        torch.cuda.set_device(torch.device(world.device))
    if world.num_ranks == 1:
        yield world
        return
    if world.num_ranks == world.ranks_per_node:
        stay_on_loopback()
    elif world.launcher == "slurm" and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(peer_node(os.environ))
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = meet(world.master, rank=world.rank, num_ranks=world.num_ranks, timeout_s=timeout_s)
    dist.init_process_group(
        "gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=world.rank,
        world_size=world.num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=None if world.device == "cpu" else torch.device(world.device),
    )
    with Watch(store, rank=world.rank, num_ranks=world.num_ranks, timeout_s=timeout_s):
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
