"""Votes, scores, clusters and cached features are the same bits on 1, 2 and 3 threads, by whatever kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dp4tl_dist.data.beton import Beton

KERNELS = {
    "the machine's own": {},
    "of 2006": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "of 2013": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2,STRICT"},
}


@pytest.mark.timeout(240)  # a process of its own, that does all there is three times
@pytest.mark.parametrize("kernels", KERNELS)
def test_one_two_and_three_threads_give_the_same_bits(
    kernels: str, surrogate: Path, source: Beton, target: Beton
) -> None:
    """What is no x86 processor knows none of the switches."""
    script = Path(__file__).parents[1] / "exact_passes.py"
    line = [sys.executable, script, surrogate, source.path, target.path]
    done = subprocess.run(
        line, env={**os.environ, **KERNELS[kernels]}, capture_output=True, text=True, timeout=200
    )  # fmt: skip
    assert not done.returncode, done.stderr
    one, two, three = (json.loads(row) for row in done.stdout.splitlines() if row.startswith("{"))
    assert one == two == three and len(one) == 11
