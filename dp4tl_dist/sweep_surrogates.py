"""A sweep's study of its surrogates: what each cost, how far its choices are the largest one's, what followed."""

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.arm_name import parse_arm
from dp4tl_dist.files import load_npz, read_json
from dp4tl_dist.prune.influence import agreement, rank_influence
from dp4tl_dist.prune.select import combine, rank_groups
from dp4tl_dist.prune.votes_file import load_votes
from dp4tl_dist.stages import Graph, Trial
from dp4tl_dist.sweep_table import Row, paired, stage_seconds

STAGE = "surrogate"


def study_surrogates(graph: Graph, rows: Sequence[Row]) -> list[Row]:
    """For each surrogate, choice and target: its cost, how far its subset is that of the largest one, what followed.

    The largest has the most weights, and of those with as many the longest training. `overlap` is the share of the
    kept classes (or samples) that both keep; chance would give about the share that is kept.
    """
    trials = [(parse_arm(trial.arm), trial) for trial in graph.trials if trial.subset and trial.subset.exists()]
    voted = [(arm, trial, trial.selection[0]) for arm, trial in trials if arm and trial.selection[0].startswith(STAGE)]
    stages = {arm.surrogate: stage for arm, _, stage in voted}
    facts = {name: _facts(graph, stage) for name, stage in stages.items()}
    if not facts:
        return []
    largest = max(facts, key=lambda name: (facts[name]["weight_bytes"], facts[name]["samples_seen"]))
    kept = {(arm.surrogate, arm.kind, arm.keep, trial.target): _kept(trial) for arm, trial, _ in voted}
    found = []
    for (surrogate, method, keep, target), mine in kept.items():
        theirs = kept.get((largest, method, keep, target))
        same = None if theirs is None else len(np.intersect1d(mine, theirs)) / max(len(mine), len(theirs))
        for mode in graph.config.transfer.modes:
            own = [row for row in rows if (row["surrogate"], row["method"], row["keep"], row["target"], row["mode"])
                   == (surrogate, method, keep, target, mode) and row["budget"] == "epochs"]  # fmt: skip
            top1 = [100 * row["top1"] for row in own]
            apart = [100 * (row["top1"] - other["top1"]) for row, other in paired(own, rows)]
            found.append({
                "surrogate": surrogate, **facts[surrogate], "reference": largest, "method": method, "keep": keep,
                "target": target, "mode": mode, "kept": len(mine), "overlap": same,
                "marks": list(dict.fromkeys(row["marks"] for row in own if row["marks"])),
                "n": len(top1), "mean": statistics.fmean(top1) if top1 else None,
                "to_random": statistics.fmean(apart) if apart else None,
            })  # fmt: skip
    return found


def _facts(graph: Graph, stage: str) -> Row:
    """Cost and quality of a trained surrogate, from its newest checkpoint."""
    folder = sorted((graph.stages[stage].output / "checkpoints").glob("step_*/meta.json"))[-1].parent
    meta = read_json(folder / "meta.json")
    val = meta.get("val")
    return {
        "arch": meta["config"]["model"]["arch"], "epochs": meta["epoch"], "samples_seen": meta["samples_seen"],
        "weight_bytes": (folder / "weights.safetensors").stat().st_size, "seconds": stage_seconds(graph, stage),
        "val_top1": 100 * val["top1"] if val else None,
    }  # fmt: skip


def _kept(trial: Trial) -> NDArray[np.int64]:
    assert trial.subset is not None
    arrays, _ = load_npz(trial.subset, "subset")
    return arrays["groups"] if len(arrays["groups"]) else arrays["indices"]


def study_agreement(graph: Graph) -> list[Row]:
    """How far the ranking of each votes file agrees with brute force on the same target, where both are there."""
    found = []
    for target in graph.config.targets:
        path = graph.out / "influence" / f"influence-{target}.npz"
        if not path.exists():
            continue
        ranking = rank_influence(load_npz(path, "influence")[0]["influence"])
        train = str(graph.targets[target][0])
        stages = [stage for stage in graph.stages.values() if stage.argv[0] == "vote" and train in stage.argv]
        for votes in sorted(stage.output for stage in stages if stage.output.exists()):
            cast = load_votes(votes)
            mine = rank_groups(*combine(cast.votes, cast.affinity))
            if len(mine) == len(ranking):
                found.append({"target": target, "votes": votes.stem, **agreement(mine, ranking)})
    return found
