"""What a run tells: bars on a terminal, plain lines elsewhere, and metrics.jsonl as the ground truth."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the user on stdout."""
    print(text, flush=True)


def warn(text: str) -> None:
    """One warning line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


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


class Metrics:
    """Append-only metrics.jsonl with TensorBoard as a second sink.

    Opening a run that resumes at `step` drops the lines past it, so that no line stands twice and none is missing.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        truncate_jsonl(self.path, step)
        self.file = open(self.path, "a")  # noqa: SIM115 (closed in __exit__)
        self.board: Any = None
        if tensorboard:
            # The import costs half a second and pulls TensorFlow's stubs: only where asked for.
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """One line: {"kind": ..., "step": ..., **values}."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a .jsonl file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file that lie past `step`, atomically."""
    from dp4tl_dist.files import atomic_file

    if path.exists():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
