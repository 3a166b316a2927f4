"""The tables that `dp4tl sweep` left in the run folder: means with paired differences, and what its surrogates did."""

from typing import Any

from dp4tl_dist.files import read_json
from dp4tl_dist.marks import marked
from dp4tl_dist.report.collect import Run, number
from dp4tl_dist.report.tables import Cell, Table

SUMMARY = (
    ("target", "target", ""), ("arm", "arm", ""), ("mode", "mode", ""), ("samples", "samples", ".0f"),
    ("total_s", "total, s", ".1f"), ("speed_up", "speed-up", ".2f"), ("mean", "top-1, %", ".2f"), ("std", "std", ".2f"),
    ("n", "seeds", "d"), ("to_random", "to random", "+.2f"), ("to_random_se", "std. error", ".2f"),
    ("pairs", "pairs", "d"),
)  # fmt: skip
SURROGATES = (
    ("surrogate", "surrogate", ""), ("method", "method", ""), ("keep", "keep", ""), ("target", "target", ""),
    ("arch", "arch", ""), ("epochs", "epochs", "d"), ("seconds", "cost, s", ".1f"),
    ("val_top1", "validation, %", ".2f"), ("overlap", "overlap", ".2f"), ("mode", "mode", ""),
    ("mean", "top-1, %", ".2f"), ("to_random", "to random", "+.2f"),
)  # fmt: skip
MARKED = ("arm", "surrogate")
Keys = tuple[tuple[str, str, str], ...]


def sweep_tables(run: Run) -> dict[str, Table]:
    """The summary and, where there are several surrogates, theirs; nothing where no sweep was run."""
    path = run.out / "sweep.json"
    content = run.attempt(read_json, path) if path.is_file() else None
    if not isinstance(content, dict):
        return {}
    several = len(run.config.surrogates) > 0
    made = {
        "summary": table("sweep", SUMMARY, content.get("summary")),
        "surrogates": table("sweep-surrogates", SURROGATES, content.get("surrogates") if several else None),
    }
    return {name: found for name, found in made.items() if found.rows}


def table(name: str, keys: Keys, rows: Any) -> Table:
    """A table of what fits: the file may be a stranger's, and what is of another type is left out."""
    kept = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    cells: list[tuple[Cell, ...]] = []
    for row in kept:
        named = row | {key: marked(row[key], row.get("marks") or []) for key in MARKED if isinstance(row.get(key), str)}
        cells.append(tuple(_cell(named.get(key), form) for key, _, form in keys))
    return Table(name, tuple((head, form) for _, head, form in keys), cells)


def _cell(value: Any, form: str) -> Cell:
    if not form and isinstance(value, str):
        return value
    value = number(value)
    if not form:
        return None if value is None else str(value)
    return value if form != "d" or isinstance(value, int) else None
