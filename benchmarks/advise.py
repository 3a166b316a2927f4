"""Is the time that `advise --benchmark` predicts the time that a run takes?

The demo runs once, for its votes and the costs of its selection. Then, in turns, `advise --benchmark` predicts and a
pretraining stage is carried out again as `dp4tl run` does it, on as many ranks: on everything and on the kept part.
Predictions and measurements stand side by side, so that a busy machine slows both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Bench

from dp4tl_dist.launcher import command
from dp4tl_dist.report.collect import read_run
from dp4tl_dist.table import collect

ARM = "lm@0.4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, help="ranks of each stage (default: 2)")
    arguments = harness.parse(parser, runs=3, warmup=0)
    bench = Bench("advise", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        measure(bench, Path(scratch), arguments)
    bench.finish()


def measure(bench: Bench, folder: Path, arguments: argparse.Namespace) -> None:
    run, nproc = folder / "run", arguments.nproc
    told(["run", "--config", "demo", "--out", str(run), "--nproc", str(nproc), "--set", f'arms=["dense", "{ARM}"]'], 1)
    graph = read_run(run).graph
    row = next(row for row in collect(graph) if row["arm"] == ARM)
    ask = ["advise", "--votes", str(run / "votes" / "vote-lm-objects.npz"), "--source", str(graph.source), "--val",
           str(graph.source_val), "--config", "demo", "--benchmark", "--json"]  # fmt: skip
    predicted: dict[str, list[float]] = {"dense": [], ARM: []}
    measured: dict[str, list[float]] = {"dense": [], ARM: []}
    selection: list[float] = []
    for turn in range(arguments.runs):
        for arm, stage in (("dense", "pretrain-dense-s0"), (ARM, f"pretrain-{ARM}-objects-s0")):
            found = json.loads(told(ask, nproc))
            selection.append(sum(found["costs"][part] for part in ("surrogate_s", "vote_s", "prune_s")))
            predicted[arm].append(seconds_of(found, arm))
            argv = [*graph.stages[stage].argv[:-1], str(folder / f"{turn}-{arm}")]
            started = time.monotonic()
            told(argv, nproc)
            measured[arm].append(time.monotonic() - started)
    rows = [
        compared("pretraining on everything", predicted["dense"], measured["dense"]),
        compared(f"pretraining of {ARM}", predicted[ARM], measured[ARM]),
        compared("surrogate, vote and choice", selection, [row["selection_s"]]),
    ]
    whole = [median(predicted[ARM]) + median(selection)], [median(measured[ARM]) + row["selection_s"]]
    rows.append(compared(f"{ARM}, all of it", *whole))
    notes = [f"medians of {arguments.runs} in turns, {nproc} ranks; the selection was measured once"]
    bench.report(
        "seconds of the demo's stages", [{name: shown(value) for name, value in row.items()} for row in rows], notes
    )
    bench.keep("rows", rows)
    bench.keep("each", {"predicted": predicted, "measured": measured, "selection": selection})


def seconds_of(found: dict[str, Any], arm: str) -> float:
    """The predicted seconds of pretraining alone."""
    costs = found["costs"]
    if arm == "dense":
        return float(costs["pretrain_dense_s"])
    size = next(size for size in found["sizes"] if abs(size["keep"] - 0.4) < 1e-9)
    return float(size["hours"] * 3600 - costs["surrogate_s"] - costs["vote_s"] - costs["prune_s"])


def compared(what: str, predicted: list[float], measured: list[float]) -> dict[str, Any]:
    ours, true = median(predicted), median(measured)
    return {"what": what, "predicted_s": ours, "measured_s": true, "error": ours / true - 1}


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def told(argv: list[str], nproc: int) -> str:
    """What a verb on `nproc` ranks prints; one that fails ends the measurement."""
    cores = len(os.sched_getaffinity(0))
    environ = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // nproc))}  # as `dp4tl run` starts its stages
    done = subprocess.run(command(argv, nproc), capture_output=True, text=True, cwd=harness.ROOT, env=environ)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        harness.refuse(f"`dp4tl {argv[0]}` ended with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
