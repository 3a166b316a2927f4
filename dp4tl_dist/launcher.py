"""One stage as processes of its own: plain Python for one rank, torchrun for several. Its output goes to a log and on.

The first rank that fails writes what happened to the file that DP4TL_ERROR_FILE names; that is what the user sees.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, LostRank, Stopped, UserError
from dp4tl_dist.log import on_terminal, say

ERROR_FILE = "DP4TL_ERROR_FILE"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, so that a killed run leaves nothing behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def report_error(code: int, message: str, *, consequence: bool = False, lost: bool = False) -> None:
    """Leave an error for the process that started this stage; the first rank to fail wins.

    consequence: whether it only tells that another rank is gone. lost: whether a rank was lost without a word.
    """
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(FileExistsError), open(path, "x") as handle:
            json.dump({"code": code, "message": message, "consequence": consequence, "lost": lost}, handle)


def uses_srun() -> bool:
    return os.environ.get("DP4TL_LAUNCHER") == "srun"


def command(argv: Sequence[str], nproc: int) -> list[str]:
    """The command line of a stage on `nproc` ranks: of this machine, or of the SLURM job that asks for srun."""
    stage = [sys.executable, "-m", "dp4tl_dist", *argv]
    if uses_srun():
        # The job is granted: what was said of its tasks when it was submitted need not hold for a stage of one rank.
        return ["srun", "--kill-on-bad-exit=1", f"--ntasks={nproc}", *(["--nodes=1"] if nproc == 1 else []), *stage]
    if nproc == 1:
        return stage
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "--max-restarts=0"]
    return [sys.executable, *torchrun, "-m", "dp4tl_dist", *argv]


REASONS = {
    "SIGKILL": "is the machine out of memory?",
    "SIGBUS": "was a file cut short while it was read, or is /dev/shm full?",
}


def killed(code: int, tail: Iterable[str]) -> str:
    """Which rank a signal ended, by the stage's exit code or torchrun's summary; empty where none did."""
    summary = "\n".join(tail).partition("Root Cause")[2]
    found = re.search(r"rank +: (\d+) .*exitcode +: -(\d+)", summary, flags=re.DOTALL)
    if not found and code >= 0:
        return ""
    rank, number = (found[1], int(found[2])) if found else ("0", -code)
    name = signal.Signals(number).name
    return f"rank {rank} was ended by {name}" + (f" ({REASONS[name]})" if name in REASONS else "")


class StageProcess:
    """Runs one stage to its end; signals that ask this process to stop are passed on and waited for."""

    def __init__(self, argv: Sequence[str], *, nproc: int, log: Path, label: str) -> None:
        self.argv, self.nproc, self.log, self.label = argv, nproc, log, label
        self.name = log.stem
        self.tail: deque[str] = deque(maxlen=40)
        self.asked_to_stop = False

    def run(self) -> None:
        """Raise what the stage ended with: UserError, Stopped or RuntimeError. Nothing where it is done."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        # Where ranks of other nodes find it, too.
        where = self.log.parent if uses_srun() else None
        with tempfile.TemporaryDirectory(dir=where) as scratch, open(self.log, "a") as log:
            error_file = Path(scratch) / "error.json"
            cores = len(os.sched_getaffinity(0))
            environ = {"OMP_NUM_THREADS": str(max(1, cores // self.nproc)), **os.environ, ERROR_FILE: str(error_file)}
            line = command(self.argv, self.nproc)
            log.write(f"$ {' '.join(line)}\n")
            process = subprocess.Popen(
                line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                text=True, errors="replace", start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            with self._forwarding(process):
                self._follow(process, log)
                code = process.wait()
            error = json.loads(error_file.read_text()) if error_file.exists() else None
        self._conclude(code, error, time.monotonic() - started)

    def _conclude(self, code: int, error: dict[str, object] | None, seconds: float) -> None:
        if code == EXIT_DONE:
            say(f"{self.label}: done in {seconds:.1f} s")
            return
        message = str(error["message"]) if error else ""
        if self.asked_to_stop or (error and error["code"] == EXIT_STOPPED):
            raise Stopped(message or f"{self.name}: stopped; run the same command again to continue")
        if error and error["code"] == EXIT_BAD_INPUT:
            raise UserError(f"{self.name}: {message}")
        if not error or error["consequence"]:
            message = killed(code, self.tail) or message
        last = message or next((line for line in reversed(self.tail) if line.strip()), f"exit code {code}")
        kind = LostRank if not error or error["lost"] else RuntimeError
        raise kind(f"{self.name} failed: {last} (log: {self.log})")

    @contextlib.contextmanager
    def _forwarding(self, process: "subprocess.Popen[str]") -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            # torchrun knows SIGTERM: it passes it to every rank and waits for them to save.
            self.asked_to_stop = True
            process.send_signal(signal.SIGTERM)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, forward) for number in numbers} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if process.poll() is None:
                process.kill()

    def _follow(self, process: "subprocess.Popen[str]", log: IO[str]) -> None:
        """Copy what the stage says to its log. Its lines on stdout, and its warnings, are shown: on a terminal as one
        moving line, else each. The rest of stderr (launchers are talkative) stays in the log."""
        assert process.stdout is not None and process.stderr is not None
        errors = threading.Thread(target=self._follow_errors, args=(process.stderr, log), daemon=True)
        with self._display() as show:
            errors.start()
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip():
                    show(line.rstrip())
        errors.join()

    def _follow_errors(self, stream: IO[str], log: IO[str]) -> None:
        for line in stream:
            log.write(line)
            log.flush()
            self.tail.append(line.rstrip())
            if line.startswith("warning: "):
                print(line.rstrip(), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[str], None]]:
        if not on_terminal():
            say(f"{self.label} ...")
            yield lambda text: say(f"    {text}")
            return
        from rich.console import Console
        from rich.markup import escape

        console = Console()
        with console.status(escape(self.label)) as status:
            yield lambda text: status.update(f"{escape(self.label)}  [dim]{escape(text[: console.width - 40])}[/dim]")
