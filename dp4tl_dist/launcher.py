"""One stage as processes of its own, on one rank or several. Its output goes to a log and on.

The first rank that fails writes what happened to the file that DP4TL_ERROR_FILE names; that is what the user sees.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from dp4tl_dist.children import die_with_parent, python, stage_environ, uses_srun
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, LostRank, Stopped, UserError
from dp4tl_dist.log import on_terminal, say, warn

ERROR_FILE = "DP4TL_ERROR_FILE"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def command(argv: Sequence[str], nproc: int) -> list[str]:
    """The command line of a stage on `nproc` ranks: of this machine, or of the SLURM job that asks for srun."""
    stage = python("dp4tl_dist", *argv)
    if uses_srun():
        # The job is granted: what was said of its tasks when it was submitted need not hold for a stage of one rank.
        return ["srun", "--kill-on-bad-exit=1", f"--ntasks={nproc}", *(["--nodes=1"] if nproc == 1 else []), *stage]
    return stage if nproc == 1 else python("dp4tl_dist.ranks", str(nproc), *argv)


# ---------------------------------------------------------------- what a stage ended with


@contextlib.contextmanager
def error_slot(folder: Path | None = None) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """(a path for `report_error`, a function that returns what was left there, the first error first).

    The path leads to this process's memory, which needs no room on a disk; or, for ranks of other nodes, into `folder`.
    """
    if folder is None:
        handle = os.memfd_create("errors")
        path = Path(f"/proc/{os.getpid()}/fd/{handle}")
    else:
        handle, path = -1, folder / f".error.{os.getpid()}.{time.monotonic_ns()}.json"
    try:
        yield str(path), lambda: _read_errors(path)
    finally:
        if handle >= 0:
            os.close(handle)
        else:
            path.unlink(missing_ok=True)


def _read_errors(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError):  # nobody left one, or not all of it
        return []


def report_error(code: int, message: str, *, rank: str = "0", consequence: bool = False, lost: bool = False) -> None:
    """Leave an error for the process that started this stage; the first rank to fail is the first there.

    consequence: whether it only tells that another rank is gone. lost: whether a rank was lost without a word.
    """
    path = os.environ.get(ERROR_FILE, "")
    if path:
        error = {"code": code, "message": message, "rank": rank, "consequence": consequence, "lost": lost}
        # A file on a disk that the nodes share is the first rank's alone. A disk may be full: the message is on stderr.
        with contextlib.suppress(OSError), open(path, "ab" if path.startswith("/proc/") else "xb", buffering=0) as file:
            file.write(json.dumps(error).encode() + b"\n")


REASONS = {
    "SIGKILL": "is the machine out of memory?",
    "SIGBUS": "was a file cut short while it was read, or is /dev/shm full?",
}


def ended_by(rank: int, code: int) -> str:
    """What to tell of a rank that a signal ended, by its exit code; empty where none did."""
    if code >= 0:
        return ""
    name = signal.Signals(-code).name
    return f"rank {rank} was ended by {name}" + (f" ({REASONS[name]})" if name in REASONS else "")


class Log:
    """A stage's log: a courtesy. Where it cannot be written the stage goes on all the same."""

    def __init__(self, path: Path) -> None:
        self.path, self.refused = path, False
        self._lock = threading.Lock()
        self._handle = -1

    def add(self, text: str) -> None:
        """Append `text`; one warning where there is no room for it."""
        data = text.encode(errors="surrogateescape")
        with self._lock:
            try:
                if self._handle < 0:
                    self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                while data:
                    data = data[os.write(self._handle, data) :]
                return
            except OSError as error:
                reason, first = error.strerror, not self.refused
                self.refused = True
        if first:
            warn(f"the log {self.path} cannot be written ({reason}): going on without what it does not take")

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class StageProcess:
    """Runs one stage to its end; signals that ask this process to stop are passed on and waited for."""

    def __init__(self, argv: Sequence[str], *, nproc: int, log: Path, label: str) -> None:
        self.argv, self.nproc, self.log, self.label = argv, nproc, log, label
        self.name = log.stem
        self.tail: deque[str] = deque(maxlen=40)
        self.asked_to_stop = False

    def run(self) -> None:
        """Raise what the stage ended with: UserError, Stopped or RuntimeError. Nothing where it is done."""
        with contextlib.suppress(OSError):  # the log tells
            self.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        log = Log(self.log)
        # Where ranks of other nodes find it, too.
        with contextlib.closing(log), error_slot(self.log.parent if uses_srun() else None) as (slot, errors):
            environ = {**stage_environ(os.environ, nproc=self.nproc), ERROR_FILE: slot}
            line = command(self.argv, self.nproc)
            log.add(f"$ {' '.join(line)}\n")
            process = subprocess.Popen(
                line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                text=True, encoding="utf-8", errors="replace", start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            with self._forwarding(process):
                self._follow(process, log)
                code = process.wait()
            error = next(iter(errors()), None)
        self._conclude(code, error, time.monotonic() - started)

    def _conclude(self, code: int, error: dict[str, Any] | None, seconds: float) -> None:
        if code == EXIT_DONE:
            say(f"{self.label}: done in {seconds:.1f} s")
            return
        message = str(error["message"]) if error else ""
        if self.asked_to_stop or (error and error["code"] == EXIT_STOPPED):
            raise Stopped(message or f"{self.name}: stopped; run the same command again to continue")
        if error and error["code"] == EXIT_BAD_INPUT:
            raise UserError(f"{self.name}: {message}")
        if not error or error["consequence"]:
            message = ended_by(0, code) or message
        last = message or next((line for line in reversed(self.tail) if line.strip()), f"exit code {code}")
        kind = LostRank if not error or error["lost"] else RuntimeError
        raise kind(f"{self.name} failed: {last} (log: {self.log})")

    @contextlib.contextmanager
    def _forwarding(self, process: "subprocess.Popen[str]") -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            # SIGTERM reaches every rank, and all of them save.
            self.asked_to_stop = True
            process.send_signal(signal.SIGTERM)

        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, forward) for number in STOP_SIGNALS} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if process.poll() is None:
                process.kill()

    def _follow(self, process: "subprocess.Popen[str]", log: Log) -> None:
        """Copy what the stage says to its log. Its lines on stdout, and its warnings, are shown: on a terminal as one
        moving line, else each. The rest of stderr (launchers are talkative) stays in the log."""
        assert process.stdout is not None and process.stderr is not None
        errors = threading.Thread(target=self._follow_errors, args=(process.stderr, log), daemon=True)
        with self._display() as show:
            errors.start()
            for line in process.stdout:
                log.add(line)
                if line.strip():
                    show(line.rstrip())
        errors.join()

    def _follow_errors(self, stream: IO[str], log: Log) -> None:
        for line in stream:
            log.add(line)
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
