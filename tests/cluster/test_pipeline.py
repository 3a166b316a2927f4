"""The demo's path on a real SLURM, by launch/submit.py and slurm/pipeline.sbatch: the same votes as on one machine."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
CONFIG = """
arms = ["lm@0.4"]
nproc = 6
[source]
train = "synthetic:source/train"
[targets.objects]
train = "synthetic:target/train"
test = "synthetic:target/test"
[write]
max_side = 0
[surrogate.model]
arch = "resnet_tiny"
[surrogate.train]
epochs = 2
batch_size = 66
peak_epoch = 1
lr = 0.2
resolution = 16
val_resolution = 16
[pretrain.model]
arch = "resnet_tiny"
[pretrain.train]
epochs = 1
batch_size = 66
peak_epoch = 1
lr = 0.2
resolution = 16
val_resolution = 16
[transfer]
cached = true
[transfer.lp]
epochs = 1
batch_size = 66
resolution = 16
val_resolution = 16
[engine]
device = "cpu"
timeout_s = 100
[log]
tensorboard = false
every = 5
[slurm]
nodes = 3
tasks = 2
cpus = 1
time = "0:30:00"
[slurm.stages.pretrain]
nodes = 2
tasks = 1
[slurm.stages.transfer]
nodes = 1
tasks = 1
"""
NUM_STAGES = 8  # 3 x write, surrogate, vote, prune, pretrain, transfer
SUBSET = "subsets/lm@0.4-objects.npz"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp('it\'s a "pipeline" ü')
    (place / "run.toml").write_text(CONFIG)
    return place


def submit(cluster: Any, place: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, ROOT / "launch" / "submit.py", "--config", "run.toml", "--out", "run", *argv]
    return cluster.call(*line, cwd=place)


def local(place: Path, *argv: str) -> None:
    line = [str(ROOT / "launch" / "torchrun.sh"), "-n", "6", *argv]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def test_submitted_on_three_nodes_and_preempted(cluster: Any, place: Path) -> None:
    run = place / "run"
    with ThreadPoolExecutor() as aside:
        submitted = aside.submit(submit, cluster, place, "--wait")
        # In the midst of the surrogate's training a job with higher priority takes one of its nodes.
        cluster.until(lambda: (run / ".surrogate.new/surrogate/metrics.jsonl").exists() or submitted.done())
        cluster.sbatch("--partition=urgent", "--nodelist=test1", "--exclusive", "--wrap=sleep 1", "--output=urgent.log",
                       cwd=place)  # fmt: skip
        done = submitted.result()
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads((run / "jobs.json").read_text())["surrogate"]["job"]
    log = (run / "jobs" / f"{job}_0_log.out").read_text()
    assert cluster.facts(job)["Restarts"] != "0" and "goes back to the queue (restart 1 of" in log, log
    assert re.search(r"resuming \S.* at step [1-9]", log), log
    assert json.loads((run / "results.json").read_text())[0]["arm"] == "lm@0.4" and (run / "report.html").exists()
    records = {path.stem: json.loads(path.read_text()) for path in (run / "stages").iterdir()}
    assert {name: record["nproc"] for name, record in records.items() if record["nproc"] > 1} == {
        "surrogate": 6, "vote-lm-objects": 6, "pretrain-lm@0.4-objects-s0": 2,
    }  # fmt: skip
    # The same on six ranks of one machine: weights, votes and subset.
    local(place, "train", "--config", "run/configs/surrogate.json", "--out", "local/surrogate")
    local(place, "vote", "--method", "lm", "--surrogate", "local/surrogate", "--target", "run/data/objects-train.beton",
          "--out", "local/votes.npz")  # fmt: skip
    line = [sys.executable, "-m", "dp4tl_dist", "prune", "--votes", "local/votes.npz", "--keep", "0.4",
            "--source", "run/data/source-train.beton", "--out", "local/subset.npz"]  # fmt: skip
    subprocess.run(line, cwd=place, check=True, timeout=100)
    assert content(run / "surrogate/checkpoints") == content(place / "local/surrogate/checkpoints")
    assert content(run / "votes/vote-lm-objects.npz") == content(place / "local/votes.npz")
    assert content(run / SUBSET) == content(place / "local/subset.npz")
    # Nothing is left to do, for whoever asks.
    assert "every stage is done" in submit(cluster, place).stdout
    again = [sys.executable, "-m", "dp4tl_dist", "run", "--config", "run.toml", "--out", "run", "--dry-run"]
    planned = subprocess.run(again, cwd=place, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(planned) == NUM_STAGES and all(line.split()[0] == "skip" for line in planned)


def content(path: Path) -> list[bytes]:
    """What may not differ: a run's last weights, or the arrays of votes or of a subset without their meta."""
    if path.is_dir():
        return [(sorted(path.iterdir())[-1] / "weights.safetensors").read_bytes()]
    import numpy as np

    with np.load(path) as arrays:
        return [arrays[name].tobytes() for name in sorted(arrays.files) if arrays[name].dtype.kind in "biuf"]


def test_a_failing_stage_stops_what_waits_for_it(cluster: Any, place: Path) -> None:
    change = ("--set", "pretrain.train.lr=1e30", "--set", "pretrain.train.peak_epoch=0")
    done = submit(cluster, place, "--wait", *change)
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if " failed: " in line or line.startswith("not run")]
    assert told[0].startswith("pretrain-lm@0.4-objects-s0 failed: "), done.stdout
    assert "the loss became" in told[0]
    assert "transfer-lp-lm@0.4-objects-s0" in told[1]
    assert cluster.run("squeue", "--noheader") == ""


def test_one_job_for_all_stages(cluster: Any, place: Path) -> None:
    job = cluster.sbatch(
        "--nodes=3", "--ntasks-per-node=2", "--time=30", "--output=whole.log", ROOT / "slurm" / "pipeline.sbatch",
        "--config", "run.toml", "--out", "whole", cwd=place,
    )  # fmt: skip
    cluster.until(lambda: cluster.ended(job), 700)
    assert cluster.facts(job)["JobState"] == "COMPLETED", (place / "whole.log").read_text()
    for name in ("surrogate/checkpoints", "votes/vote-lm-objects.npz", SUBSET):
        assert content(place / "whole" / name) == content(place / "run" / name)
