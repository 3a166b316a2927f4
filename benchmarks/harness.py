"""One way to measure: cases take turns within one run, warm-up does not count, and every single time is kept.

    arguments = harness.parse(parser)
    bench = Bench("order", arguments)
    bench.compare("a title", [Case("dp4tl", ours, items=n), Case("peer", theirs, items=n)], unit="samples")
    bench.finish()

The first case of a comparison is this project's; the others are its peers, and ratios say how many times longer a peer
takes for the same number of items.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from provenance import RESULTS, ROOT, git, machine, relative, source_hash, versions
from rich.console import Console
from rich.table import Table

__all__ = [
    "RESULTS", "ROOT", "Bench", "Case", "Seconds", "Workers", "git", "machine", "parse", "refuse", "relative", "serve",
    "source_hash", "versions",
]  # fmt: skip

sys.path.insert(0, str(ROOT))  # this checkout is measured, not an installed copy: the record names its commit


class Seconds(float):
    """What a case returns that was timed elsewhere, in a process of its own."""


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], object]
    """One run. It is timed from outside, unless it returns Seconds."""
    items: float = 1
    """How many items a run handles: ratios are of the times for one item."""
    note: str = ""
    """What a reader must know to compare fairly."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The script's arguments and those that all scripts share."""
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed runs of each case (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before them that do not count")
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="peers to leave out, e.g. ffcv")
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results/ as well")
    parser.add_argument("--json", action="store_true", help="print JSON alone, without tables")
    return parser.parse_args()


class Bench:
    """Comparisons that end up in one record."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        self.comparisons: list[dict[str, Any]] = []
        self.load_at_start = os.getloadavg()

    def compare(self, title: str, cases: Sequence[Case], *, unit: str, runs: int | None = None, aim: str = "") -> None:
        """Run the cases in turns (A B A B ...) and print how they compare."""
        runs, warmup = runs or self.arguments.runs, self.arguments.warmup
        cases = [case for case in cases if case.name.split()[0] not in self.arguments.without]
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        print(f"{title} ...", file=sys.stderr)
        for i in range(-warmup, runs):
            for case in cases:
                took = _seconds(case.run)
                if i >= 0:
                    seconds[case.name].append(took)
        first = cases[0]
        rows = [_row(case, seconds[case.name], first, seconds[first.name]) for case in cases]
        found: dict[str, Any] = {"title": title, "unit": unit, "runs": runs, "warmup": warmup, "aim": aim, "rows": rows}
        self.comparisons.append(found)
        if not self.arguments.json:
            _show(found)

    def finish(self) -> None:
        """Print the JSON if that was asked for, and write the record if that was."""
        now = datetime.datetime.now(datetime.timezone.utc)
        options = {name: value for name, value in vars(self.arguments).items() if name not in ("json", "record")}
        content: dict[str, Any] = {
            "name": self.name,
            "date": now.isoformat(timespec="seconds"),
            "command": shlex.join(["python", relative(sys.argv[0]), *sys.argv[1:]]),
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
            "machine": machine() | {"load_at_start": self.load_at_start, "load_at_end": os.getloadavg()},
            "versions": versions(),
            "git": git(),
            "source_hash": source_hash(Path(sys.argv[0])),
            "comparisons": self.comparisons,
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        if self.arguments.json:
            print(text, end="")
        if self.arguments.record:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{now.date()}_{self.name}_{content['machine']['name']}.json"
            path.write_text(text)
            print(f"wrote {relative(path)}", file=sys.stderr)


def refuse(reason: str) -> NoReturn:
    """End with one line and exit code 2: what is needed is not here."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = run()
    return float(result) if isinstance(result, Seconds) else time.perf_counter() - start


def _row(case: Case, seconds: list[float], first: Case, first_seconds: list[float]) -> dict[str, Any]:
    each, first_each = np.array(seconds) / case.items, np.array(first_seconds) / first.items
    quarter, three_quarters = np.percentile(seconds, [25, 75])
    return {
        "name": case.name,
        "note": case.note,
        "items": case.items,
        "seconds": seconds,
        "median": median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "quartiles": [float(quarter), float(three_quarters)],
        "items_per_second": case.items / median(seconds),
        "ratio_of_medians": float(np.median(each) / np.median(first_each)),
        "median_of_pairwise_ratios": float(np.median(each / first_each)),
    }


def _show(found: dict[str, Any]) -> None:
    table = Table(title=found["title"], title_justify="left")
    for name in ("case", "median", "min .. max", f"{found['unit']} a second", "x ours", "in pairs"):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for i, row in enumerate(found["rows"]):
        ratios = ("", "") if i == 0 else (f"{row['ratio_of_medians']:.2f}", f"{row['median_of_pairwise_ratios']:.2f}")
        spread = f"{_time(row['min'])} .. {_time(row['max'])}"
        table.add_row(row["name"], _time(row["median"]), spread, _count(row["items_per_second"]), *ratios)
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"  {found['runs']} runs in turns after {found['warmup']} of warm-up")
    for row in found["rows"]:
        if row["note"]:
            console.print(f"  {row['name']}: {row['note']}", markup=False)
    if found["aim"]:
        console.print(f"  aim: {found['aim']}", markup=False)
    console.print()


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- cases in processes of their own


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
        """Let all run `what`; the seconds of the slowest."""
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
            print(_seconds(partial(run, line.strip())), file=answers, flush=True)
