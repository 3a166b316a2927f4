"""Cases that run in processes of their own, so that none runs with what another has imported, compiled or set."""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType

__all__ = ["PASSIVE", "Seconds", "Workers", "rank_environs", "serve", "timed"]


PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""The environment of a process whose threads do not spin while they wait; the command `dp4tl` sets it for itself."""


class Seconds(float):
    """What a case returns that was timed elsewhere, in a process of its own."""


def timed(run: Callable[[], object]) -> float:
    """The seconds that `run` takes, or those that it returns."""
    start = time.perf_counter()
    result = run()
    return float(result) if isinstance(result, Seconds) else time.perf_counter() - start


def rank_environs(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each of `num_ranks` ranks on this machine, at a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


class Workers:
    """Processes that hold a case ready and run it, all at the same time, whenever the object is called."""

    def __init__(self, commands: Sequence[Sequence[str]], environs: Sequence[Mapping[str, str]] = ()) -> None:
        environs = environs or [{}] * len(commands)
        self.commands = [shlex.join([sys.executable, *command]) for command in commands]
        self.processes = [
            subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **environ},
            )
            for command, environ in zip(self.commands, environs, strict=True)
        ]  # fmt: skip
        for process in self.processes:
            self._answer(process)

    def __call__(self, what: str = "run") -> Seconds:
        """Let all run `what`; the seconds of the slowest (or the largest of what they return as such)."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(what + "\n")
            process.stdin.flush()
        return Seconds(max(float(self._answer(process)) for process in self.processes))

    def _answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self.commands[self.processes.index(process)]} ended early: its error stands above")
        return line

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(run: Callable[[str], object]) -> None:
    """The other side of Workers: `run` with each line that comes in, and its seconds as the answer."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is not an answer
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(timed(partial(run, line.strip())), file=answers, flush=True)
