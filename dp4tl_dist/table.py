"""What a run found, as rows: one for each arm and target, over the seeds."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from dp4tl_dist.files import load_npz, read_json, write_json
from dp4tl_dist.log import on_terminal, say
from dp4tl_dist.marks import MARK, Marks, marked
from dp4tl_dist.stages import Graph, Trial


def collect(graph: Graph) -> list[dict[str, Any]]:
    """One row for each (arm, target) whose trials are all there: sizes, seconds, speed-up over dense, accuracies."""
    rows, marks = [], Marks(graph)
    for target in graph.config.targets:
        for arm in graph.config.arms:
            trials = [trial for trial in graph.trials if trial.arm == arm and trial.target == target]
            rows.append(row_of(graph, arm, target, trials, marks))
    dense = {row["target"]: row["total_s"] for row in rows if row["arm"] == "dense"}
    for row in rows:
        row["speed_up"] = dense[row["target"]] / row["total_s"] if row["target"] in dense else None
    return rows


def row_of(graph: Graph, arm: str, target: str, trials: list[Trial], marks: Marks) -> dict[str, Any]:
    """The means over the seeds. `pretrain_s` and `selection_s` are wall seconds of whole stages, imports included.

    `marks` tell of numbers from trainings before their end, and of results that were changed.
    """

    def seconds(stage: str) -> float:
        return float(read_json(graph.out / "stages" / f"{stage}.json")["seconds"])

    def accuracies(key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for mode in graph.config.transfer.modes:
            values = [100 * read_json(graph.stages[trial.transfers[mode]].output)[key] for trial in trials]
            std = statistics.stdev(values) if len(values) > 1 else None
            found[mode] = {"mean": statistics.fmean(values), "std": std, "values": values}
        return found

    pretrain = statistics.fmean(seconds(trial.pretrain) for trial in trials)
    selection = statistics.fmean(sum(seconds(stage) for stage in trial.selection) for trial in trials)
    return {
        "arm": arm,
        "target": target,
        "marks": sorted({line for trial in trials for line in marks.of(trial, trial.transfers.values())}),
        "seeds": [trial.seed for trial in trials],
        "samples": [num_samples(graph, trial) for trial in trials],
        "pretrain_s": pretrain,
        "selection_s": selection,
        "total_s": pretrain + selection,
        "accuracy": accuracies("top1"),
        **({"robust": accuracies("robust_top1")} if graph.config.transfer.robust else {}),
    }


def num_samples(graph: Graph, trial: Trial) -> int:
    """Source samples that the trial's model was pretrained on."""
    if trial.subset is not None:
        arrays, _ = load_npz(trial.subset, "subset")
        return int(np.asarray(arrays["indices"]).size)
    metas = sorted((graph.stages[trial.pretrain].output / "checkpoints").glob("step_*/meta.json"))
    return int(read_json(metas[-1])["num_samples"])


def write_table(rows: list[dict[str, Any]], out: Path) -> None:
    """Keep the rows as results.json and results.txt in the run folder, and print them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [(key, mode) for key in ("accuracy", "robust") for mode in rows[0].get(key, ())]
    table = Table(title=f"{out.resolve().name}: target accuracy and time to the pretrained model")
    table.add_column("target")
    table.add_column("arm")
    for header in ("source samples", "pretrain", "total*", "speed-up", *(_header(*item) for item in shown)):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [row["target"], marked(row["arm"], row.get("marks", ())), _samples(row["samples"]),
                 f"{row['pretrain_s']:.1f} s", f"{row['total_s']:.1f} s",
                 f"{row['speed_up']:.2f}x" if row["speed_up"] else "-",
                 *(_accuracy(row[key][mode]) for key, mode in shown)]  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    seeds = len(rows[0]["seeds"])
    table.caption = (
        f"* with the surrogate's training, voting and pruning; mean over {seeds} seed{'s' if seeds > 1 else ''}"
    )
    lines = list(dict.fromkeys(line for row in rows for line in row.get("marks", ())))
    table.caption += "".join(f"\n{MARK} {line}" for line in lines)
    write_json(out / "results.json", json.loads(json.dumps(rows)))
    with open(out / "results.txt", "w") as handle:
        Console(file=handle, width=110).print(table)
    Console(width=None if on_terminal() else 110).print(table)
    say(f"results: {out / 'results.txt'}, {out / 'results.json'}")


def _header(key: str, mode: str) -> str:
    return f"{mode} top-1 %" if key == "accuracy" else f"{mode} robust %"


def _samples(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{statistics.fmean(counts):.0f}"


def _accuracy(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.2f}" + (f" +- {cell['std']:.2f}" if cell["std"] is not None else "")
