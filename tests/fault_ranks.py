"""Ranks of `dp4tl` in processes of their own, one of which meets a fault at a step of its training."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ranks import CONTEXT


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int = 1
    step: int = 3
    path: str = ""
    """The file that it is about; of a slow disk, the seconds that a file takes."""

    def strike(self) -> None:
        if self.kind == "raise":
            raise ZeroDivisionError("the seventh wave")
        if self.kind == "exit":
            os._exit(7)
        if self.kind in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        if self.kind == "hang":
            while True:  # also asked to end: the signal sets a flag that nobody reads here
                time.sleep(1)
        if self.kind == "memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            np.ones(1 << 28)
        if self.kind == "truncate":
            os.truncate(self.path, Path(self.path).stat().st_size // 2)
        if self.kind == "replace":
            Path(self.path + ".other").replace(self.path)


def install(fault: Fault, rank: int) -> None:
    """Have the fault strike this process, if it is its rank's."""
    from dp4tl_dist.data.steps import Steps
    from dp4tl_dist.train import watch

    if rank != fault.rank:
        return
    if fault.kind == "slow disk":
        fsync = os.fsync

        def wait_and_sync(handle: int) -> None:
            if Path(f"/proc/self/fd/{handle}").readlink().name == "state.pt":
                time.sleep(float(fault.path))
            fsync(handle)

        os.fsync = wait_and_sync
        return
    if fault.kind == "thread":  # the thread that prepares batches ends without a word

        def hand_over(self: Any, slot: int, item: Any) -> None:
            raise SystemExit

        Steps._hand_over = hand_over  # type: ignore[method-assign]
        return
    log_order = watch.log_order

    def struck(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == fault.step:
            fault.strike()

    watch.log_order = struck


def run_with_fault(argv: list[str], fault: Fault, folder: Path, *, num_ranks: int = 2) -> tuple[list[int], str, float]:
    """(exit codes, what all ranks wrote, in order; seconds). A rank that is stopped is killed once the others ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = folder / "output.txt"
    ranks = [
        CONTEXT.Process(target=_rank, args=(argv, fault, rank, num_ranks, port, str(text)), daemon=True)
        for rank in range(num_ranks)
    ]
    began = time.monotonic()
    for process in ranks:
        process.start()
    for rank, process in enumerate(ranks):
        if (fault.kind, fault.rank) != ("SIGSTOP", rank):
            process.join(60)
    took = time.monotonic() - began
    alive = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    assert alive == [(fault.kind, fault.rank) == ("SIGSTOP", rank) for rank in range(num_ranks)], text.read_text()
    return [process.exitcode for process in ranks], text.read_text(), took


def torchrun_with_fault(argv: list[str], fault: Fault) -> tuple[int, str, float]:
    """As `run_with_fault`, by torchrun on two ranks: (its exit code, what was written to stderr, seconds)."""
    line = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
        __file__,
        fault.kind,
        str(fault.rank),
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    began = time.monotonic()
    process = subprocess.run([sys.executable, *line, *argv], env=environ, capture_output=True, text=True, timeout=200)
    return process.returncode, process.stderr, time.monotonic() - began


def _rank(argv: list[str], fault: Fault, rank: int, num_ranks: int, port: int, text: str) -> None:
    handle = os.open(text, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    from dp4tl_dist.cli import main

    install(fault, rank)
    sys.exit(main(argv))


if __name__ == "__main__":  # a rank that torchrun started: KIND RANK ARGV...
    from dp4tl_dist.cli import main

    install(Fault(sys.argv[1], int(sys.argv[2])), int(os.environ["RANK"]))
    sys.exit(main(sys.argv[3:]))
