"""Training on a real SLURM through slurm/stage.sbatch: preempted, out of time, its node off or unplugged, a rank hung.

Each run ends as one that nothing happened to: no step repeated or lost, and the same weights bit by bit.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_factory import make_beton

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
NUM_STEPS = 900
CONFIG = """
seed = 3
[data]
train = "train.beton"
num_workers = 1
[model]
arch = "resnet_tiny"
[train]
epochs = 60
batch_size = 8
lr = 0.05
peak_epoch = 1
resolution = 16
[engine]
device = "cpu"
timeout_s = 40
[log]
every = 20
tensorboard = false
order = true
[checkpoint]
every_minutes = 0.05
epoch_end_s = 2
"""
TRAIN = ("train", "--config", "config.toml", "--out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cluster: Any) -> Path:
    """Data, a config, and a run of it on two nodes that nothing happened to."""
    place = tmp_path_factory.mktemp("faults")
    make_beton(place / "train.beton", num_classes=4, per_class=31)
    (place / "config.toml").write_text(CONFIG)
    began = time.monotonic()
    job = start(cluster, place, "calm", "test1,test2", "--time=30")
    cluster.until(lambda: cluster.ended(job))
    assert cluster.facts(job)["Restarts"] == "0", (place / "calm.log").read_text()
    (place / "seconds").write_text(str(time.monotonic() - began))
    assert [line["step"] for line in order(place / "calm")] == list(range(1, NUM_STEPS + 1))
    return place


def order(out: Path) -> list[dict[str, Any]]:
    path = out / "order.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def reached(out: Path, step: int) -> bool:
    lines = order(out)
    return bool(lines) and lines[-1]["step"] >= step


def start(cluster: Any, place: Path, out: str, nodes: str, *options: str, **environ: str) -> str:
    """A job of two ranks on two nodes."""
    return cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=1", f"--nodelist={nodes}", f"--output={out}.log", *options,
        ROOT / "slurm" / "stage.sbatch", *TRAIN, out, cwd=place, **environ,
    )  # fmt: skip


def assert_same(cluster: Any, place: Path, job: str, out: str) -> None:
    log = (place / f"{out}.log").read_text()
    assert cluster.facts(job)["JobState"] == "COMPLETED", log
    assert (place / out / "order.jsonl").read_text() == (place / "calm" / "order.jsonl").read_text()
    weights = [sorted((place / run / "checkpoints").iterdir())[-1] / "weights.safetensors" for run in (out, "calm")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list(place.glob(".dp4tl-*"))


def test_preempted(cluster: Any, place: Path) -> None:
    job = start(cluster, place, "preempted", "test1,test2", "--time=30")
    cluster.until(lambda: reached(place / "preempted", 100))
    cluster.sbatch(
        "--partition=urgent", "--nodelist=test1", "--exclusive", "--wrap=sleep 1", "--output=urgent.log", cwd=place
    )
    cluster.until(lambda: cluster.ended(job))
    assert_same(cluster, place, job, "preempted")
    log = (place / "preempted.log").read_text()
    assert cluster.facts(job)["Restarts"] == "1" == str(log.count("goes back to the queue")), log
    # The batch script of a life that was left behind does not requeue the job that goes on without it.
    line = [sys.executable, "-m", "dp4tl_dist.stage_job", "requeue", "--code", "137"]
    done = cluster.call(*line, SLURM_JOB_ID=job, SLURM_RESTART_COUNT="0")
    assert done.returncode == 137 and "is in a later life than this one" in done.stderr
    assert cluster.facts(job)["JobState"] == "COMPLETED"


def test_out_of_time(cluster: Any, place: Path) -> None:
    # Of half an hour the job leaves all unused but what most of a run takes on this machine now.
    spare = 1800 - 0.5 * float((place / "seconds").read_text())
    job = start(cluster, place, "limited", "test3,test4", "--time=30", DP4TL_STOP_BEFORE_S=str(spare))
    cluster.until(lambda: cluster.ended(job), 400)
    assert_same(cluster, place, job, "limited")
    log, restarts = (place / "limited.log").read_text(), cluster.facts(job)["Restarts"]
    assert int(restarts) >= 1 and log.count("goes back to the queue") == int(restarts), log
    assert "with everything saved" in log


def rank_of(job: str, rank: int) -> int:
    """The process of a job's rank, in whichever node's namespace it lives."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ, line = (path / "environ").read_bytes().split(b"\0"), (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended since
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= {*environ} and b"train" in line and b"dp4tl_dist" in line:
            return int(path.name)
    raise AssertionError(f"rank {rank} of job {job} is not there")


def test_a_node_goes_off_another_is_unplugged_and_a_rank_hangs(cluster: Any, place: Path) -> None:
    crashed = start(cluster, place, "crashed", "test1,test2", "--time=30")
    cut = start(cluster, place, "cut", "test3,test4", "--time=30")
    hung = start(cluster, place, "hung", "test1,test4", "--time=30")
    cluster.until(lambda: all(reached(place / name, 200) for name in ("crashed", "cut", "hung")))
    cluster.script("crash", "test2")
    cluster.script("cut", "test3")  # the one of rank 0 and the batch script
    os.kill(rank_of(hung, 1), signal.SIGSTOP)
    for job, node, mend in ((crashed, "test2", "boot"), (cut, "test3", "heal")):
        cluster.until(lambda job=job: cluster.facts(job)["Restarts"] != "0")
        cluster.script(mend, node)
    for job, name in ((crashed, "crashed"), (cut, "cut"), (hung, "hung")):
        cluster.until(lambda job=job: cluster.ended(job))
        assert_same(cluster, place, job, name)
    log = (place / "hung.log").read_text()
    assert "another rank ended, or does not answer" in log and "goes back to the queue (restart 1 of" in log, log


def test_restarts_have_a_limit(cluster: Any, place: Path) -> None:
    job = start(cluster, place, "once", "test1,test2", "--time=30", DP4TL_STOP_BEFORE_S="1800", DP4TL_MAX_RESTARTS="0")
    cluster.until(lambda: cluster.ended(job))
    facts, log = cluster.facts(job), (place / "once.log").read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "75:0"), log
    assert "max_restarts = 0 is reached" in log
