"""The drill in its short form: three kills, and nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_three_kills(root: Path) -> None:
    line = [sys.executable, str(root / "benchmarks" / "drill.py"), "--kills", "3", "--seed", "5"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "3 kills, 3 recovered, 0 lost"
    assert "left behind: 0 processes, 0 files in /dev/shm" in done.stdout
