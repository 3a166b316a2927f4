"""The other ranks of this machine, when the run has failed: found by their common parent, and ended where they hang.

A launcher gives a rank that does not react half a minute before it kills it; a rank that was stopped, or that spins,
would keep the job that long past its timeout.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTED = "DP4TL_STARTED"
"""Set for ranks that `python -m dp4tl_dist.ranks` started."""
GRACE_S = 5.0  # for ranks that run: they end by themselves, each with its own error
POLL_S = 0.1


@dataclass(frozen=True)
class Sibling:
    """Another rank that the same launcher started on this machine."""

    pid: int
    rank: int
    stopped: bool
    """Whether a signal (SIGSTOP) keeps it from running."""


def find(launcher: int, own: int) -> Iterator[Sibling]:
    """The ranks that process `launcher` started, but for process `own`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == own:
            continue
        with contextlib.suppress(OSError, ValueError):  # processes come and go; others' are not ours to read
            # After the name, which may hold anything: state, parent, ...
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) != launcher or state in "ZX":
                continue
            environ = dict(item.partition("=")[::2] for item in (entry / "environ").read_text().split("\0"))
            rank = environ.get("RANK", environ.get("SLURM_PROCID"))
            if rank is not None:
                yield Sibling(int(entry.name), int(rank), stopped=state in "Tt")


def started_by_launcher() -> bool:
    """Whether this process is a rank among several that torchrun or srun started."""
    if STARTED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return os.environ.get("WORLD_SIZE", "1") != "1"
    ranks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return "SLURM_STEP_ID" in os.environ and ranks != "1"


def stopped_ranks() -> list[int]:
    """The ranks of this machine that a signal keeps from running."""
    if not started_by_launcher():
        return []
    return sorted(sibling.rank for sibling in find(os.getppid(), os.getpid()) if sibling.stopped)


def end_hung() -> None:
    """Have those siblings killed that are stopped, at once, and those that still run after the grace time.

    A process of its own does it, as this one is about to end; it goes when the last of them has.
    """
    if started_by_launcher():
        with contextlib.suppress(OSError):  # no memory for it: the launcher's own patience will do
            # -S -E: it needs nothing but the standard library, and starts in 20 ms.
            line = [sys.executable, "-S", "-E", __file__, str(os.getppid()), str(os.getpid())]
            subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)  # fmt: skip


def reap(launcher: int, own: int, *, grace_s: float = GRACE_S) -> None:
    """Kill the ranks of `launcher` but `own`: stopped ones at once, the others after `grace_s`."""
    deadline = time.monotonic() + grace_s
    while siblings := list(find(launcher, own)):
        late = time.monotonic() >= deadline
        for sibling in siblings:
            if sibling.stopped or late:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(sibling.pid, signal.SIGKILL)
        time.sleep(POLL_S)


if __name__ == "__main__":
    reap(int(sys.argv[1]), int(sys.argv[2]))
