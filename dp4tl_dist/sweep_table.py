"""What a sweep found: tidy rows, one for each trial and mode, and from them means and pairs."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dp4tl_dist.arm_name import AUTO, RANDOM, parse_arm
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, read_json
from dp4tl_dist.log import warn
from dp4tl_dist.marks import Marks
from dp4tl_dist.stages import Graph, Trial
from dp4tl_dist.table import num_samples

Row = dict[str, Any]
EVERYWHERE = "all targets"


def tidy(graph: Graph) -> list[Row]:
    """One row for each trial and mode whose stages are all done: names, accuracy as shares of 1, sizes and seconds."""
    rows, marks = [], Marks(graph)
    for trial in graph.trials:
        for mode, transfer in trial.transfers.items():
            seconds = {name: stage_seconds(graph, name) for name in (trial.pretrain, transfer, *trial.selection)}
            if any(value is None for value in seconds.values()):
                continue
            result = read_json(graph.stages[transfer].output)
            selection = sum(seconds[name] or 0.0 for name in trial.selection)
            rows.append({
                **_names(trial), "target": trial.target, "seed": trial.seed, "mode": mode,
                **{key: result[key] for key in ("top1", "top5", "loss", "val_top1", "epoch")},
                "classes": _num_classes(trial), "samples": num_samples(graph, trial),
                "pretrain_s": seconds[trial.pretrain], "selection_s": selection,
                "total_s": (seconds[trial.pretrain] or 0.0) + selection, "transfer_s": seconds[transfer],
                "marks": "; ".join(marks.of(trial, [transfer])),
            })  # fmt: skip
    return rows


def _names(trial: Trial) -> Row:
    arm = parse_arm(trial.arm)
    if arm is None:
        return {"arm": trial.arm, "method": trial.arm, "keep": "1", "surrogate": "", "budget": "epochs"}
    budget = "steps" if arm.steps else "epochs"
    return {"arm": trial.arm, "method": arm.kind, "keep": arm.keep, "surrogate": arm.surrogate, "budget": budget}


def stage_seconds(graph: Graph, stage: str) -> float | None:
    """Wall seconds of a finished stage; a damaged record is of none."""
    path = graph.out / "stages" / f"{stage}.json"
    try:
        record = read_json(path) if path.exists() else {}
    except UserError as error:
        warn(f"{error}: {stage} counts as not done")
        return None
    seconds = record.get("seconds") if isinstance(record, dict) and record.get("status") == "done" else None
    return float(seconds) if isinstance(seconds, int | float) else None


def _num_classes(trial: Trial) -> int | None:
    """How many classes a subset keeps; None for dense, and for a choice of single samples."""
    return None if trial.subset is None else len(load_npz(trial.subset, "subset")[0]["groups"]) or None


# ---------------------------------------------------------------- summary


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean, sample standard deviation and difference to random at the same size, of each arm, target and mode.

    Differences are of pairs with the same seed and target, so that what both share cancels. With several targets the
    last rows average over them: each seed's mean over the targets counts once. Accuracy in percent.
    """
    found = []
    targets = list(dict.fromkeys(row["target"] for row in rows))
    arms = list(dict.fromkeys((row["arm"], row["mode"]) for row in rows))
    for target in targets if len(targets) == 1 else [*targets, EVERYWHERE]:
        for arm, mode in arms:
            own = [row for row in rows if (row["arm"], row["mode"]) == (arm, mode)]
            if target != EVERYWHERE:
                own = [row for row in own if row["target"] == target]
                values = {row["seed"]: [100 * row["top1"]] for row in own}
                pairs = {row["seed"]: [100 * (row["top1"] - other["top1"])] for row, other in paired(own, rows)}
            else:
                values = _whole_seeds([(row["seed"], 100 * row["top1"]) for row in own], len(targets))
                each = [(row["seed"], 100 * (row["top1"] - other["top1"])) for row, other in paired(own, rows)]
                pairs = _whole_seeds(each, len(targets))
            if values:
                found.append(_summary(target, mode, own, values, pairs))
    dense = {(row["target"], row["mode"]): row["total_s"] for row in found if row["arm"] == "dense"}
    for row in found:
        whole = dense.get((row["target"], row["mode"]))
        row["speed_up"] = whole / row["total_s"] if whole else None
    return found


def _whole_seeds(each: Iterable[tuple[int, float]], num_targets: int) -> dict[int, list[float]]:
    """The values of each seed that has one for every target."""
    values: dict[int, list[float]] = {}
    for seed, value in each:
        values.setdefault(seed, []).append(value)
    return {seed: found for seed, found in values.items() if len(found) == num_targets}


def _summary(
    target: str, mode: str, own: Sequence[Row], values: dict[int, list[float]], pairs: dict[int, list[float]]
) -> Row:
    top1 = [statistics.fmean(found) for found in values.values()]
    apart = [statistics.fmean(found) for found in pairs.values()]
    spread = statistics.stdev(apart) if len(apart) > 1 else None
    return {
        **{key: own[0][key] for key in ("arm", "method", "keep", "surrogate", "budget")},
        "target": target, "mode": mode,
        "n": len(top1), "mean": statistics.fmean(top1), "std": statistics.stdev(top1) if len(top1) > 1 else None,
        "pairs": len(apart), "to_random": statistics.fmean(apart) if apart else None, "to_random_std": spread,
        "to_random_se": None if spread is None else spread / math.sqrt(len(apart)),
        **{key: statistics.fmean(row[key] for row in own) for key in ("samples", "pretrain_s", "total_s")},
        "marks": list(dict.fromkeys(row["marks"] for row in own if row.get("marks"))),
    }  # fmt: skip


def paired(own: Sequence[Row], rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each of `own` with the random trial of its size, target, seed, mode and budget, where there is one."""
    pairs = [(row, peer(row, rows)) for row in own if row["method"] not in (*RANDOM, "dense")]
    return [(row, other) for row, other in pairs if other is not None]


def peer(row: Row, rows: Sequence[Row]) -> Row | None:
    """The random trial to hold `row` against: of the same share or, at auto, of as many classes.

    A choice of whole classes is held against random classes first, one of single samples against random samples.
    """
    whole = row["classes"] is not None and "+" not in row["method"]
    size = "classes" if row["keep"] == AUTO else "keep"
    alike = {
        other["method"]: other
        for other in rows
        if other["method"] in RANDOM
        and all(other[key] == row[key] for key in ("target", "seed", "mode", "budget", size))
    }
    order = list(RANDOM) if whole else [*list(RANDOM)[1:], *list(RANDOM)[:1]]
    return next((alike[method] for method in order if method in alike), None)
