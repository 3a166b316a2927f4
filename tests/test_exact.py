"""What is promised to be exact does not depend on threads, on the alignment of memory, or on how Python was entered."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

PRODUCT = "a = torch.ones(64, 64); a @ a"


def products(source: str, **environ: str) -> str:
    """What MKL says of the matrix products of a fresh Python; empty where torch has no MKL."""
    env = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"} | {"MKL_VERBOSE": "1"} | environ
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if "GEMM" in line)


@pytest.mark.parametrize(
    "imports", (("dp4tl_dist", "torch"), ("torch", "dp4tl_dist"), ("dp4tl_dist.__main__", "torch"))
)
def test_every_way_in_has_mkl_round_alike_for_any_threads(imports: Sequence[str]) -> None:
    told = products(f"import {', '.join(imports)}; {PRODUCT}")
    assert told.count("CNR:AUTO,STRICT") == len(told.splitlines())


def test_a_mode_of_the_users_own_stays() -> None:
    told = products(f"import dp4tl_dist, torch; {PRODUCT}", MKL_CBWR="COMPATIBLE")
    assert told.count("CNR:COMPATIBLE") == len(told.splitlines())
