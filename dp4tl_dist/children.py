"""How this process starts others that are to end with it, and are misled by nothing that lies about here."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from dp4tl_dist.machine import num_cores

PR_SET_PDEATHSIG = 1
# What tells a process its place among ranks: a stage is told its own, whatever this process was told.
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "DP4TL_STARTED", "DP4TL_LISTENING")
PLACE_PREFIXES = ("PET_", "TORCHELASTIC_", "SLURM_STEP_")
PLACES_HERE = ("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID")
# As -P of Python 3.11: a module in the current folder is not to be taken for Python's own.
SAFE_PATH = "import sys; sys.path[:] = [p for p in sys.path if p]; sys.argv[:] = sys.argv[1:]; "
RUN_MODULE = SAFE_PATH + "import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, so that a killed run leaves nothing behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def python(module: str, *argv: str) -> list[str]:
    """The command line that runs a module of this Python, whatever files the current folder holds."""
    how = ["-P", "-m"] if sys.version_info >= (3, 11) else ["-c", RUN_MODULE]
    return [sys.executable, *how, module, *argv]


def uses_srun() -> bool:
    return os.environ.get("DP4TL_LAUNCHER") == "srun"


def stage_environ(environ: Mapping[str, str], *, nproc: int) -> dict[str, str]:
    """`environ` for the processes of a stage: without this process's own place among ranks."""
    placed = PLACES if uses_srun() else PLACES + PLACES_HERE
    kept = {key: value for key, value in environ.items() if key not in placed and not key.startswith(PLACE_PREFIXES)}
    return {"OMP_NUM_THREADS": str(max(1, num_cores() // nproc)), **kept}


def prepare_child() -> None:
    """For a child, before it becomes what it runs: it ends with its parent, whose it is to pass Ctrl-C on."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
