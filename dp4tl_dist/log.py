"""What a run tells: bars on a terminal, plain lines elsewhere, and metrics.jsonl as the ground truth."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dp4tl_dist.errors import UserError, printable

PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the user on stdout."""
    print(text, flush=True)


def warn(text: str) -> None:
    """One warning line on stderr."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


Advance = Callable[..., None]
"""advance(done, total, **numbers): what a long operation calls now and then."""


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of the block: a bar on a terminal, else a line every few seconds. Silent where not `shown`."""
    if not shown:
        yield lambda done, total, **numbers: None
    elif on_terminal():
        with _bar(label) as advance:
            yield advance
    else:
        yield _PlainProgress(label)


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))  # fmt: skip
    with Progress(*columns, transient=False) as bar:
        task = bar.add_task(label, total=None, numbers="")
        yield lambda done, total, **numbers: bar.update(task, completed=done, total=total, numbers=_text(numbers))


class _PlainProgress:
    def __init__(self, label: str) -> None:
        self.label, self.last = label, time.monotonic()

    def __call__(self, done: int, total: int, **numbers: float) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_EVERY_S and done < total:
            self.last = now
            say(f"{self.label} {done}/{total} {_text(numbers)}".rstrip())


def _text(numbers: dict[str, Any]) -> str:
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )


class JsonLines:
    """A .jsonl file that only grows. What a full disk does not take is kept, and written as soon as it does.

    Opening the file of a run that resumes at `step` drops the lines past it, so that no line stands twice.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        truncate_jsonl(path, step)
        self.path, self.waiting, self.handle = path, b"", -1
        self.lock = threading.Lock()  # checkpoints are saved, and with them this file, by a thread of their own
        self.size = path.stat().st_size if path.exists() else 0

    def add(self, line: dict[str, Any]) -> None:
        with self.lock:
            refused_before = bool(self.waiting)
            self.waiting += json.dumps(line).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not refused_before:
                warn(f"could not write {self.path} ({error.strerror}): its lines wait for room")

    def flush(self, *, sync: bool = False) -> None:
        """Write what waits; with `sync`, down to the disk. Raises OSError where there is no room: nothing is cut."""
        with self.lock:
            if self.waiting:
                self._write()
        if sync and self.handle >= 0:
            os.fsync(self.handle)

    def _write(self) -> None:
        if self.handle < 0:
            self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        written = 0
        try:
            while written < len(self.waiting):
                written += os.pwrite(self.handle, self.waiting[written:], self.size + written)
        except OSError:
            with contextlib.suppress(OSError):  # a disk that became read-only
                os.ftruncate(self.handle, self.size)
            raise
        self.size, self.waiting = self.size + written, b""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was warned about
            self.flush()
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


class Metrics:
    """metrics.jsonl, with TensorBoard as a second sink, and order.jsonl, which is there once something is in it."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self.lines = JsonLines(folder / "metrics.jsonl", step=step)
        self.order = JsonLines(folder / "order.jsonl", step=step)
        self.board: Any = None
        if tensorboard:
            # The import costs half a second and pulls TensorFlow's stubs: only where asked for.
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """One line: {"kind": ..., "step": ..., **values}."""
        self.lines.add({"kind": kind, "step": step, **values})
        if self.board is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:  # its own thread met a full disk, and ended
            warn(f"TensorBoard's file cannot be written any more ({error.strerror}): metrics.jsonl has everything")
            self.board = None

    def save(self) -> None:
        """Everything so far, down to the disk; raises OSError. A checkpoint must not be ahead of its metrics."""
        self.lines.flush(sync=True)
        self.order.flush(sync=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lines.close()
        self.order.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a .jsonl file; a last line cut off by a crash is left out. A damaged one is a UserError."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_table(line, path, number) for number, line in enumerate(lines[:-1], 1) if line]


def _table(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number} is damaged ({error}): remove it, or the file") from error
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise UserError(f"{path}, line {number} is not a table with a step: remove it, or the file")
    return content


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file that lie past `step`, atomically."""
    from dp4tl_dist.atomic import atomic_file

    if path.exists():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
