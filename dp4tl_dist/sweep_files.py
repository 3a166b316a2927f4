"""A sweep's files: tidy rows as CSV and JSON lines, the summary and the surrogates as JSON, and both for reading."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from dp4tl_dist.atomic import atomic_file
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import write_json
from dp4tl_dist.log import say
from dp4tl_dist.marks import MARK, marked
from dp4tl_dist.stages import Graph
from dp4tl_dist.sweep_surrogates import study_agreement, study_surrogates
from dp4tl_dist.sweep_table import Row, summarise, tidy


def write_tables(graph: Graph) -> None:
    """Write sweep.csv and sweep.jsonl (tidy rows), sweep.json (summary, surrogates) and sweep.txt, and print that one.

    What is not done yet is left out, and counted.
    """
    if not (graph.out / "stages").is_dir():
        raise UserError(f"{graph.out} holds no stage of the sweep: run it first, or check --out")
    rows = tidy(graph)
    summary, surrogates = summarise(rows), study_surrogates(graph, rows)
    agreement = study_agreement(graph)
    with atomic_file(graph.out / "sweep.csv") as temporary, open(temporary, "w", newline="") as handle:
        table = csv.DictWriter(handle, list(rows[0]) if rows else ["arm"])
        table.writeheader()
        table.writerows(rows)
    with atomic_file(graph.out / "sweep.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(graph.out / "sweep.json", {"summary": summary, "surrogates": surrogates, "agreement": agreement})
    text = as_text(summary, surrogates) + "".join(_agreed(row) for row in agreement)
    with atomic_file(graph.out / "sweep.txt") as temporary:
        temporary.write_text(text)
    say(text.rstrip("\n"))
    total = sum(len(trial.transfers) for trial in graph.trials)
    say(f"sweep: {len(rows)} of {total} results are there: {graph.out / 'sweep.csv'}, .jsonl, .json, .txt")


def as_text(summary: Sequence[Row], surrogates: Sequence[Row]) -> str:
    """Both tables, as a terminal shows them."""
    from rich.console import Console

    page = io.StringIO()
    console = Console(file=page, width=120)
    console.print(_accuracies(summary))
    if surrogates:
        console.print(_surrogates(surrogates))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def _accuracies(rows: Sequence[Row]) -> Any:
    heads = ["target", "arm", "mode", "samples", "total", "speed-up", "top-1 %", "n", "to random", "pairs"]
    cells = [
        [row["target"], marked(row["arm"], row["marks"]), row["mode"], f"{row['samples']:.0f}",
         f"{row['total_s']:.1f} s", "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}x",
         _pm(row["mean"], row["std"]), str(row["n"]),
         _pm(row["to_random"], row["to_random_se"], sign="+"), str(row["pairs"])]
        for row in rows
    ]  # fmt: skip
    caption = "top-1: mean +- std over seeds. To random: paired by seed and target at the same size, mean +- std. error"
    caption += "".join(f"\n{MARK} {line}" for line in dict.fromkeys(line for row in rows for line in row["marks"]))
    return _table("accuracy", heads, cells, caption)


def _surrogates(rows: Sequence[Row]) -> Any:
    heads = ["surrogate", "choice", "target", "arch", "epochs", "cost", "val %", "overlap", "mode", "top-1 %"]
    heads.append("to random")
    cells = [
        [marked(row["surrogate"] or "(default)", row["marks"]), f"{row['method']}@{row['keep']}", row["target"],
         row["arch"], str(row["epochs"]), f"{row['seconds']:.1f} s", _pm(row["val_top1"]), _pm(row["overlap"]),
         row["mode"],
         _pm(row["mean"]), _pm(row["to_random"], sign="+")]
        for row in rows
    ]  # fmt: skip
    largest = rows[0]["reference"] or "(default)"
    return _table("surrogates", heads, cells, f"overlap: share of the kept classes that {largest} keeps, too")


def _agreed(row: Row) -> str:
    tops = ", ".join(f"{item['overlap']:.2f} of the first {item['k']}" for item in row["top"])
    return f"{row['votes']} against brute force: Spearman {row['spearman']:.2f}; in common {tops}\n"


def _table(title: str, heads: list[str], rows: list[list[str]], caption: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, caption=caption)
    for place, head in enumerate(heads):
        made.add_column(head, justify="left" if place < 2 else "right")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _pm(mean: float | None, spread: float | None = None, *, sign: str = "") -> str:
    if mean is None:
        return "-"
    return format(mean, f"{sign}.2f") + (f" +- {spread:.2f}" if spread is not None else "")
