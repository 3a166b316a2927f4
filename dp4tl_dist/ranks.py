"""Several ranks of one verb on this machine: `python -m dp4tl_dist.ranks NPROC VERB ARGS...`.

The ranks are told what torchrun would tell them, and it can start them as well. Here they meet on the loopback alone;
what asks to stop reaches each of them, with as much time as saving takes; and the exit code is theirs.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from dp4tl_dist import streams
from dp4tl_dist.children import prepare_child, python, stage_environ
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, one_line
from dp4tl_dist.launcher import (
    ERROR_FILE,
    STOP_SIGNALS,
    ended_by,
    error_slot,
    report_error,
)
from dp4tl_dist.limits import MAX_RANKS
from dp4tl_dist.machine import num_cores
from dp4tl_dist.rendezvous import LISTENING, LOOPBACK
from dp4tl_dist.siblings import STARTED

GRACE_S = 30.0
"""For the other ranks to end by themselves once one of them has failed."""
POLL_S = 0.05


class Ranks:
    """The processes of one verb, from their start to the end of the last."""

    def __init__(self) -> None:
        self.asked_to_stop = False
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, num_ranks: int, argv: Sequence[str], error_file: str) -> None:
        """Start them. Rank 0 is given the socket where they meet, which listens already."""
        shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, STARTED: os.getpid(), ERROR_FILE: error_file}
        with socket.socket() as server:
            server.bind((LOOPBACK, 0))
            server.listen(1024)
            where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": server.getsockname()[1]}
            for rank in range(num_ranks):
                own = {"RANK": rank, "LOCAL_RANK": rank} | ({LISTENING: server.fileno()} if rank == 0 else {})
                places = {name: str(value) for name, value in {**shared, **where, **own}.items()}
                process = subprocess.Popen(
                    python("dp4tl_dist", *argv), env={**stage_environ(os.environ, nproc=num_ranks), **places},
                    stdin=subprocess.DEVNULL, pass_fds=(server.fileno(),) if rank == 0 else (),
                    preexec_fn=prepare_child,
                )  # fmt: skip
                self.processes.append(process)
        if self.asked_to_stop:  # meanwhile
            self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # nothing where it has ended

    def stop(self, number: int, frame: FrameType | None) -> None:
        """A signal asks to stop. It goes on as SIGTERM, however many there are."""
        self.asked_to_stop = True
        self.send(signal.SIGTERM)

    def wait(self) -> tuple[int, int]:
        """(rank, exit code) of the first that failed, or (0, 0), once all have ended. A failure ends the others."""
        failed, kill_at = (0, EXIT_DONE), float("inf")
        running = dict(enumerate(self.processes))
        while running:
            for rank, process in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[rank]
                    if code and not failed[1]:
                        failed, kill_at = (rank, code), time.monotonic() + GRACE_S
                        self.send(signal.SIGTERM)
            if time.monotonic() > kill_at:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)
        return failed


def run(num_ranks: int, argv: Sequence[str]) -> int:
    """Run a verb on `num_ranks` ranks and return its exit code: the one of the first rank that failed."""
    ranks = Ranks()
    with error_slot() as (slot, errors), _asked(ranks.stop):
        ranks.start(num_ranks, argv, slot)
        rank, code = ranks.wait()
        told = errors()
    if code == EXIT_DONE:
        return EXIT_DONE
    error = _cause(rank, code, told, asked_to_stop=ranks.asked_to_stop)
    report_error(**error)
    # Rank 0 told its own; the others tell failures, and leave it to rank 0 to say what all meet alike.
    heard = [one["message"] for one in told if one["rank"] == "0" or one["code"] == EXIT_FAILURE]
    if error["message"] not in heard:
        kind = "stopped" if error["code"] == EXIT_STOPPED else "error"
        print(f"dp4tl: {kind}: {error['message']}", file=sys.stderr, flush=True)
    return int(error["code"])


def _cause(rank: int, code: int, told: Sequence[dict[str, Any]], *, asked_to_stop: bool) -> dict[str, Any]:
    """What the ranks ended of: what the first of them told, unless that is only a consequence."""
    cause = next((error for error in told if not error["consequence"]), None)
    if cause:
        return cause
    if asked_to_stop:  # before they could listen, or as they ended
        message = "stopped before there was anything to save: run it again"
        return {"code": EXIT_STOPPED, "message": message, "rank": str(rank)}
    message = ended_by(rank, code)
    if told and not message:
        return told[0]
    message = message or f"rank {rank} ended with exit code {code}, and without a word"
    return {"code": EXIT_FAILURE, "message": message, "rank": str(rank), "lost": True}


@contextlib.contextmanager
def _asked(stop: Any) -> Iterator[None]:
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:  # how it ends is decided, and is this process's exit code: nothing is left that could be stopped
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def number_of_ranks(text: str) -> int:
    """A number of ranks, or one for each of what there is: "gpu", "cpu", or "auto" for GPUs where there are any.

    "default" is one for each GPU, and 2 without. Raises ValueError for anything else.
    """
    if text == "cpu":
        return num_cores()
    if text in ("gpu", "auto", "default"):
        import torch

        return torch.cuda.device_count() or {"gpu": 1, "auto": num_cores(), "default": 2}[text]
    if not text.isdecimal() or not 0 < int(text) <= MAX_RANKS:
        raise ValueError(text)
    return int(text)


def main() -> int:
    streams.keep()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        num_ranks = number_of_ranks(sys.argv[1])
    except (IndexError, ValueError):
        print("dp4tl: error: a number of ranks (or gpu), then a verb and its options", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        return run(num_ranks, sys.argv[2:])
    except OSError as error:
        print(f"dp4tl: error: {num_ranks} ranks cannot be started: {one_line(str(error))}", file=sys.stderr)
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
