"""The drill of `dp4tl run` in its short form: a few faults, and nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_rounds(root: Path) -> None:
    line = [sys.executable, str(root / "benchmarks" / "drill_pipeline.py"), "--rounds", "2", "--seed", "3"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 rounds, 0 lost")
