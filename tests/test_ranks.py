"""Several ranks of one machine, by launch/torchrun.sh: where they listen, what does not mislead them, how they end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_factory import make_beton

from dp4tl_dist.errors import EXIT_FAILURE, EXIT_STOPPED
from dp4tl_dist.ranks import number_of_ranks

ROOT = Path(__file__).parents[1]
TORCHRUN = str(ROOT / "launch" / "torchrun.sh")
SHADOWS = ("random", "select", "token", "logging", "profile", "statistics", "json", "signal", "runpy")
MISLEADING = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "7", "PET_MASTER_ADDR": "203.0.113.1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "old", "RANK": "3", "WORLD_SIZE": "9", "LOCAL_RANK": "3", "GROUP_RANK": "1",
    "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1",
    "TMPDIR": "/nowhere/at/all", "HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere/cache",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton, a config of far more steps than any test waits for, and modules that are not Python's."""
    folder = tmp_path_factory.mktemp("ranks")
    make_beton(folder / "train.beton", num_classes=4, per_class=8)
    table = {
        "data": {"train": "train.beton", "num_workers": 1}, "model": {"arch": "resnet_tiny"},
        "train": {"epochs": 5000, "batch_size": 4, "resolution": 32, "val_resolution": 32},
        "engine": {"device": "cpu", "timeout_s": 60}, "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(table))
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder was run')\n")
    return folder


@contextlib.contextmanager
def training(folder: Path, out: str, *, nameless: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """`torchrun.sh -n 2 train` in a process group of its own, once it has trained a step."""
    line = [TORCHRUN, "-n", "2", "train", "--config", "config.json", "--out", out]
    if nameless:  # a machine whose name is nobody's
        line = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh", *line]
    process = subprocess.Popen(line, cwd=folder, env={**os.environ, **MISLEADING}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    try:
        metrics = folder / out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def tree(pid: int) -> list[int]:
    """A process with all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in tree(int(child)))]


def listening(pids: list[int]) -> list[str]:
    """The addresses (hexadecimal, as the kernel writes them) at which these processes listen."""
    links = [str(item.readlink()) for pid in pids for item in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {found[1] for link in links if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.parametrize("how", ["Ctrl-C", "a storm of SIGTERM"])
def test_ranks_meet_on_the_loopback_and_end_in_one_line(folder: Path, how: str) -> None:
    nameless = os.geteuid() == 0 and how == "Ctrl-C"
    with training(folder, how, nameless=nameless) as process:
        found = listening(tree(process.pid))
        assert found and set(found) == {"0100007F"}
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all of the foreground gets it
        for _ in range(40 if how != "Ctrl-C" else 0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.02)
        out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, err
    (line,) = err.splitlines()
    assert re.match(r"dp4tl: stopped: stopped at step \d+ with everything saved", line), err
    assert "of the current folder" not in out and (folder / how / "checkpoints").is_dir()


def test_a_killed_rank_is_named(folder: Path) -> None:
    with training(folder, "killed") as process:
        rank = next(pid for pid in tree(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(rank, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_FAILURE
    assert err.splitlines()[-1] == "dp4tl: error: rank 1 was ended by SIGKILL (is the machine out of memory?)", err


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1e3", "99999", "²"])
def test_numbers_of_ranks(text: str) -> None:
    with pytest.raises(ValueError):
        number_of_ranks(text)
    done = subprocess.run([TORCHRUN, "-n", text, "info", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert number_of_ranks("2") == 2 and number_of_ranks("auto") >= 1 and sys.executable
