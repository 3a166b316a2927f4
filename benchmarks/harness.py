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
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
from provenance import RESULTS, ROOT, git, machine, relative, source_hash, versions
from rich.console import Console
from rich.table import Table
from workers import Seconds, Workers, rank_environs, serve, timed

__all__ = [
    "RESULTS", "ROOT", "Bench", "Case", "Seconds", "Workers", "git", "machine", "parse", "rank_environs", "refuse",
    "relative", "serve", "source_hash", "versions",
]  # fmt: skip

sys.path.insert(0, str(ROOT))  # this checkout is measured, not an installed copy: the record names its commit


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], object]
    """One run. It is timed from outside, unless it returns Seconds."""
    items: float = 1
    """How many items a run handles: ratios are of the times for one item."""
    note: str = ""
    """What a reader must know to compare fairly."""
    facts: Callable[[float], Mapping[str, float | str]] | None = None
    """What else was found, asked with the median seconds once all runs are over: columns of their own."""


def parse(parser: argparse.ArgumentParser, *, runs: int = 5, warmup: int = 1) -> argparse.Namespace:
    """The script's arguments and those that all scripts share."""
    parser.add_argument(
        "--runs", type=int, default=runs, metavar="N", help=f"timed runs of each case (default: {runs})"
    )
    help_warmup = f"runs before them that do not count (default: {warmup})"
    parser.add_argument("--warmup", type=int, default=warmup, metavar="N", help=help_warmup)
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="peers to leave out, e.g. ffcv")
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results/ as well")
    parser.add_argument("--json", action="store_true", help="print JSON alone, without tables")
    return parser.parse_args()


class Bench:
    """Comparisons that end up in one record."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        self.comparisons: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.kept: dict[str, Any] = {}
        self.load_at_start = os.getloadavg()

    def compare(
        self,
        title: str,
        cases: Sequence[Case],
        *,
        unit: str,
        runs: int | None = None,
        aim: str = "",
        peers: bool = True,
    ) -> None:
        """Run the cases in turns (A B A B ...) and print how they compare; no ratios where they are no `peers`."""
        runs, warmup = runs or self.arguments.runs, self.arguments.warmup
        cases = [case for case in cases if case.name.split()[0] not in self.arguments.without]
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        print(f"{title} ...", file=sys.stderr)
        for i in range(-warmup, runs):
            for case in cases:
                took = timed(case.run)
                if i >= 0:
                    seconds[case.name].append(took)
        first = cases[0]
        rows = [_row(case, first if peers else case, seconds) for case in cases]
        found: dict[str, Any] = {"title": title, "unit": unit, "runs": runs, "warmup": warmup, "aim": aim, "rows": rows}
        self.comparisons.append(found)
        if not self.arguments.json:
            _show(found, peers=peers)

    def skip(self, name: str, reason: str) -> None:
        """Leave out what cannot run here, and say so, here and in the record."""
        if name not in self.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        self.skipped[name] = reason

    def keep(self, name: str, value: Any) -> None:
        """Put `value`, of plain JSON types, into the record."""
        self.kept[name] = value

    def report(self, title: str, rows: Sequence[Mapping[str, str]], notes: Sequence[str]) -> None:
        """Print a table of another form than a comparison's; its numbers go into the record by `keep`."""
        if self.arguments.json:
            return
        table = Table(title=title, title_justify="left")
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row.values())
        _print(table, notes)

    def finish(self) -> None:
        """Print the JSON if that was asked for, and write the record if that was."""
        now = datetime.datetime.now(datetime.timezone.utc)
        options = {name: value for name, value in vars(self.arguments).items() if name not in ("json", "record")}
        content: dict[str, Any] = {
            "name": self.name,
            "date": now.isoformat(timespec="seconds"),
            "command": shlex.join(["python", relative(sys.argv[0]), *sys.argv[1:]]),
            "options": json.loads(json.dumps(options, default=relative)),
            "machine": machine() | {"load_at_start": self.load_at_start, "load_at_end": os.getloadavg()},
            "versions": versions(),
            "git": git(),
            "source_hash": source_hash(Path(sys.argv[0])),
            "comparisons": self.comparisons,
            "skipped": self.skipped,
            **self.kept,
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


def _row(case: Case, first: Case, of: dict[str, list[float]]) -> dict[str, Any]:
    seconds = of[case.name]
    each, first_each = np.array(seconds) / case.items, np.array(of[first.name]) / first.items
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
        "facts": dict(case.facts(median(seconds))) if case.facts else {},
    }


def _show(found: dict[str, Any], *, peers: bool) -> None:
    table = Table(title=found["title"], title_justify="left")
    facts = list(dict.fromkeys(name for row in found["rows"] for name in row["facts"]))
    ratios = ("x ours", "in pairs") if peers else ()
    for name in ("case", "median", "min .. max", f"{found['unit']} a second", *ratios, *facts):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for i, row in enumerate(found["rows"]):
        numbers = (f"{row['ratio_of_medians']:.2f}", f"{row['median_of_pairwise_ratios']:.2f}")
        compared = () if not peers else numbers if i else ("", "")
        spread = f"{_time(row['min'])} .. {_time(row['max'])}"
        more = (_fact(row["facts"].get(name, "")) for name in facts)
        table.add_row(row["name"], _time(row["median"]), spread, _count(row["items_per_second"]), *compared, *more)
    notes = [f"{found['runs']} runs in turns after {found['warmup']} of warm-up"]
    notes += [f"{row['name']}: {row['note']}" for row in found["rows"] if row["note"]]
    _print(table, [*notes, *([f"aim: {found['aim']}"] if found["aim"] else [])])


def _print(table: Table, notes: Sequence[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False)
    console.print(table)
    for note in notes:
        console.print(f"  {note}", markup=False)
    console.print()


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _fact(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
