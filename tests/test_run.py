"""`dp4tl run` through the real command line: stages skipped and re-done, killed and continued, locked, tabled."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.timeout(600)
CONFIG = """
arms = ["dense", "lm@0.5", "random@0.5"]
[source]
train = "{root}/source"
[targets.small]
train = "{root}/target-train"
test = "{root}/target-test"
[surrogate]
min_scale = 0.5
[surrogate.model]
arch = "resnet_tiny"
[surrogate.train]
epochs = 2
batch_size = 8
resolution = 32
[pretrain.model]
arch = "resnet_tiny"
[pretrain.train]
epochs = 2
batch_size = 8
resolution = 32
[transfer]
cached = true
[transfer.lp]
epochs = 3
batch_size = 4
[engine]
device = "cpu"
[log]
tensorboard = false
order = true
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders and a config, and a run of it that was never disturbed."""
    root = tmp_path_factory.mktemp("a run")  # a space in every path
    for name, num_classes, count in (("source", 4, 8), ("target-train", 2, 8), ("target-test", 2, 4)):
        for label in range(num_classes):
            folder = root / name / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([label, i, count]).integers(0, 60, (36, 36, 3))
                Image.fromarray((noise + 40 * label).astype(np.uint8)).save(folder / f"{i}.png")
    (root / "run.toml").write_text(CONFIG.format(root=root))
    assert dp4tl(root, "run", "--config", root / "run.toml", "--out", root / "whole").returncode == 0
    return root


def start(root: Path, *argv: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dp4tl_dist", *(str(item) for item in argv)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=environ, start_new_session=True, **pipes)  # type: ignore


def dp4tl(root: Path, *argv: object) -> "subprocess.CompletedProcess[str]":
    process = start(root, *argv)
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def done_now(output: str) -> set[str]:
    """Names of the stages that a run carried out (not skipped)."""
    return set(re.findall(r"\] (\S+): done in", output))


def weights(run: Path) -> dict[str, bytes]:
    """The last weights of every training stage, as bytes."""
    found = {}
    for folder in (run / "surrogate", *sorted((run / "pretrain").iterdir())):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        found[folder.name] = (newest / "weights.safetensors").read_bytes()
    return found


def test_table_and_artefacts(root: Path) -> None:
    run = root / "whole"
    rows = json.loads((run / "results.json").read_text())
    assert [row["arm"] for row in rows] == ["dense", "lm@0.5", "random@0.5"]
    assert [row["samples"] for row in rows] == [[32], [16], [16]]
    for row in rows:
        assert 0 <= row["accuracy"]["lp"]["mean"] <= 100
        assert row["total_s"] == pytest.approx(row["pretrain_s"] + row["selection_s"])
    dense, lm, random = rows
    assert dense["selection_s"] == 0 < random["selection_s"] < lm["selection_s"]
    assert dense["speed_up"] == 1 and lm["speed_up"] == pytest.approx(dense["total_s"] / lm["total_s"])
    table = (run / "results.txt").read_text()
    assert all(arm in table for arm in ("dense", "lm@0.5", "random@0.5"))
    # The pruned models never saw a sample of a pruned class.
    with np.load(run / "subsets" / "lm@0.5-small.npz") as subset:
        kept = set(subset["indices"].tolist())
    lines = (run / "pretrain" / "lm@0.5-small-s0" / "order.jsonl").read_text().splitlines()
    seen = {identifier for line in lines for identifier in json.loads(line)["identifiers"]}
    assert seen == kept


def test_second_run_skips_everything_and_changes_redo_what_follows(root: Path) -> None:
    run = ("run", "--config", root / "run.toml", "--out", root / "whole")
    again = dp4tl(root, *run)
    assert again.returncode == 0 and done_now(again.stdout) == set(), again.stdout
    dry = dp4tl(root, *run, "--dry-run", "--set", "transfer.lp.epochs=4")
    planned = {line.split()[1] for line in dry.stdout.splitlines() if line.split()[0] == "replace"}
    changed = dp4tl(root, *run, "--set", "transfer.lp.epochs=4")
    transfers = {f"transfer-lp-{arm}-small-s0" for arm in ("dense", "lm@0.5", "random@0.5")}
    assert done_now(changed.stdout) == transfers == planned
    back = dp4tl(root, *run)
    assert done_now(back.stdout) == transfers
    # An output that is gone or was changed is made again; what follows is skipped, for the new one is equal bit by bit.
    (root / "whole" / "subsets" / "random@0.5-s0.npz").unlink()
    assert done_now(dp4tl(root, *run).stdout) == {"prune-random@0.5-s0"}
    # How often a run logs and on how many ranks it runs changes nothing.
    assert done_now(dp4tl(root, *run, "--set", "log.every=7", "--nproc", 2).stdout) == set()


def test_killed_at_any_moment_and_continued(root: Path) -> None:
    run = ("run", "--config", root / "run.toml", "--out", root / "killed")
    kills = 0
    for pause in (1.5, 4.0, 6.0):
        process = start(root, *run)
        time.sleep(pause)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert kills
    assert dp4tl(root, *run).returncode == 0
    assert weights(root / "killed") == weights(root / "whole")
    accuracies = [
        [row["accuracy"] for row in json.loads((root / name / "results.json").read_text())]
        for name in ("killed", "whole")
    ]
    assert accuracies[0] == accuracies[1]


def test_stop_signal_saves_and_exits_75(root: Path) -> None:
    run = ("run", "--config", root / "run.toml", "--out", root / "stopped", "--set", "surrogate.train.epochs=2000")
    process = start(root, *run)
    metrics = root / "stopped" / ".surrogate.new" / "surrogate" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = dp4tl(root, *run)
    assert second.returncode == 2 and "in use" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "run it again" in err
    plan = dp4tl(root, *run, "--dry-run").stdout
    assert re.search(r"resume +surrogate", plan)


def test_failing_stage_is_named(root: Path) -> None:
    run = ("run", "--config", root / "run.toml", "--out", root / "bad")
    failed = dp4tl(root, *run, "--set", "surrogate.train.lr=1e30", "--set", "surrogate.train.peak_epoch=0")
    assert failed.returncode == 1
    assert (
        failed.stderr.strip().splitlines()[-1].startswith("dp4tl: error: surrogate failed: surrogate: the loss became")
    )
    record = json.loads((root / "bad" / "stages" / "surrogate.json").read_text())
    assert record["status"] == "running" and record["error"].startswith("surrogate failed: surrogate: the loss became")
    assert dp4tl(root, "report", root / "bad").returncode == 0
    page = (root / "bad" / "report.html").read_text()
    assert ", 1 stopped" in page and "stopped: surrogate failed: surrogate: the loss became" in page
