"""A job's former life on a node that SLURM gave up: it neither keeps its successor out nor writes into its run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_factory import make_beton

from dp4tl_dist.errors import EXIT_FAILURE, UserError
from dp4tl_dist.files import folder_lock

NUM_STEPS = 160


def train(folder: Path, out: str, **environ: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "dp4tl_dist", "train", "--config", str(folder / "config.json"), "--out", out]
    return subprocess.Popen(line, cwd=folder, env={**os.environ, **environ}, stderr=subprocess.PIPE, text=True)


def life(restarts: int) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}


def content(folder: Path) -> dict[str, bytes]:
    """What a run's files say, without the times in them."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return {
        "owner": (folder / "owner.json").read_bytes(),
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "order": (folder / "order.jsonl").read_bytes(),
        last.name: (last / "weights.safetensors").read_bytes(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("successor_ends_first", [True, False])
def test_a_life_left_behind_writes_nothing_more(tmp_path: Path, successor_ends_first: bool) -> None:
    make_beton(tmp_path / "train.beton", num_classes=4, per_class=8)
    config = {
        "data": {"train": str(tmp_path / "train.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": NUM_STEPS // 8, "batch_size": 4, "peak_epoch": 1, "lr": 0.05, "resolution": 16},
        "engine": {"device": "cpu"},
        "log": {"every": 5, "tensorboard": False, "order": True},
        "checkpoint": {"every_minutes": 0.01, "epoch_end_s": 0.5},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(tmp_path, "calm").wait() == 0
    ghost = train(tmp_path, "run", **life(0))
    order = tmp_path / "run" / "order.jsonl"
    deadline = time.monotonic() + 100
    while not (order.exists() and order.read_text().count("\n") > 20 and list(tmp_path.glob("run/checkpoints/*"))):
        assert time.monotonic() < deadline and ghost.poll() is None
        time.sleep(0.02)
    ghost.send_signal(signal.SIGSTOP)  # its node is cut off: it lives, and holds the folder's lock
    try:
        successor = train(tmp_path, "run", **life(1))
        if successor_ends_first:
            assert successor.wait() == 0
            before = content(tmp_path / "run")
        else:
            while b'"restarts": 1' not in (tmp_path / "run" / "owner.json").read_bytes():
                assert time.monotonic() < deadline and successor.poll() is None
                time.sleep(0.02)
        ghost.send_signal(signal.SIGCONT)
        _, told = ghost.communicate(timeout=120)
        assert ghost.returncode == EXIT_FAILURE and "was taken over by job 7 (restart 1)" in told, told
        assert successor.wait() == 0
    finally:
        ghost.kill()
        successor.kill()
    if successor_ends_first:
        assert content(tmp_path / "run") == before
    calm, run = content(tmp_path / "calm"), content(tmp_path / "run")
    assert {key: run[key] for key in run.keys() - {"owner", "metrics"}} == {
        key: calm[key] for key in calm.keys() - {"owner", "metrics"}
    }


@pytest.mark.parametrize(("own", "refused"), [("7.1", False), ("7.0", True), ("8.1", True), ("", True)])
def test_only_a_later_life_of_the_same_job_passes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, refused: bool
) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from dp4tl_dist.files import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(line, env={**os.environ, **life(0)}, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "ready\n"
        if own:
            monkeypatch.setenv("SLURM_JOB_ID", own.partition(".")[0])
            monkeypatch.setenv("SLURM_RESTART_COUNT", own.partition(".")[2])
        if refused:
            with pytest.raises(UserError, match="in use"), folder_lock(tmp_path):
                pass
        else:
            with folder_lock(tmp_path):
                assert (tmp_path / ".lock").read_text() == "7.1"
    finally:
        holder.kill()
        holder.wait()
