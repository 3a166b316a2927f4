"""What somebody at the login node does: holds jobs, looks on, edits the code, cancels, submits again."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
CONFIG = """
arms = ["random@0.5"]
[source]
train = "synthetic:source/train"
[targets.objects]
train = "synthetic:target/train"
test = "synthetic:target/test"
[engine]
device = "cpu"
[slurm]
cpus = 1
time = "30"
extras = {hold = true}
"""
FIRST, SECOND = "write-objects-test", "write-objects-train"


class OnTerminal:
    """A command that believes it is looked at."""

    def __init__(self, line: list[str], **options: Any) -> None:
        self.text = ""
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, **options)
        os.close(theirs)
        self.reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self.reader.start()

    def _read(self, handle: int) -> None:
        with open(handle, "rb", buffering=0) as pipe:
            try:
                while data := pipe.read(4096):
                    self.text += data.decode(errors="replace")
            except OSError:  # how a terminal says that its other side has gone
                return

    def end(self) -> tuple[int, str]:
        code = self.process.wait(100)
        self.reader.join(10)
        return code, self.text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code, to be edited."""
    for name in ("dp4tl_dist", "launch", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "code"


def test_held_edited_and_cancelled(cluster: Any, checkout: Path, tmp_path: Path) -> None:
    environ = {**cluster.environ, "PYTHONPATH": str(checkout), "TERM": "xterm", "COLUMNS": "100"}
    line = [sys.executable, str(checkout / "launch" / "submit.py"), "--config", "run.toml", "--out", "run"]
    edited = checkout / "dp4tl_dist" / "stage_job.py"
    original = edited.read_text()

    # A snapshot: the jobs run what was there, whatever happens to the checkout.
    watched = OnTerminal([*line, "--snapshot", "--wait"], cwd=tmp_path, env=environ)
    cluster.until(lambda: "report" in jobs(tmp_path), 60)
    edited.write_text("raise SystemExit('edited')\n")
    cluster.run("scontrol", "release", jobs(tmp_path)[FIRST])
    cluster.until(lambda: cluster.ended(jobs(tmp_path)[FIRST]), 100)
    assert status(tmp_path, FIRST) == "done", log(tmp_path, FIRST)
    assert "the code has changed" not in log(tmp_path, FIRST) and len(list((tmp_path / "run/code").iterdir())) == 1
    cluster.until(lambda: re.search(rf"{FIRST}\W+\d+\W+done", plain(watched.text)), 20)

    # Another config may not go into the same folder while jobs of this one wait; nor does a second call submit twice.
    edited.write_text(original)
    other = cluster.call(*line, "--set", "seeds=[1]", cwd=tmp_path, PYTHONPATH=str(checkout))
    assert other.returncode == 2 and "has jobs of another config in the queue" in other.stderr
    before = jobs(tmp_path)
    assert cluster.run(*line, cwd=tmp_path, PYTHONPATH=str(checkout)).count("in the queue already") == len(before) - 1
    assert jobs(tmp_path) == before

    # Cancelled: the queue is empty, and who looks on is told what was not done.
    told = cluster.run(*line[:2], "--out", "run", "--cancel", cwd=tmp_path, PYTHONPATH=str(checkout))
    assert told.startswith("cancelled: ") and told.count(",") == len(before) - 2
    assert cluster.run("squeue", "--noheader") == ""
    code, text = watched.end()
    assert code == 1 and "not run: " in plain(text) and FIRST not in plain(text).rpartition("not run: ")[2]
    assert "nothing was in the queue" in cluster.run(*line[:2], "--out", "run", "--cancel", cwd=tmp_path)

    # Without a snapshot an edit is warned about; what is done is not submitted again.
    assert FIRST not in cluster.run(*line, cwd=tmp_path, PYTHONPATH=str(checkout))
    edited.write_text(f"{original}\n# edited\n")
    cluster.run("scontrol", "release", jobs(tmp_path)[SECOND])
    cluster.until(lambda: cluster.ended(jobs(tmp_path)[SECOND]), 100)
    assert status(tmp_path, SECOND) == "done" and "the code has changed since the submission" in log(tmp_path, SECOND)
    assert len(cluster.run(*line[:2], "--out", "run", "--cancel", cwd=tmp_path).split(",")) == len(before) - 2


def plain(text: str) -> str:
    """What a terminal would show, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def jobs(place: Path) -> dict[str, str]:
    path = place / "run" / "jobs.json"
    return {name: entry["job"] for name, entry in json.loads(path.read_text()).items()} if path.exists() else {}


def status(place: Path, stage: str) -> str:
    return str(json.loads((place / "run" / "stages" / f"{stage}.json").read_text())["status"])


def log(place: Path, stage: str) -> str:
    return (place / "run" / "jobs" / f"{jobs(place)[stage]}_0_log.out").read_text()
