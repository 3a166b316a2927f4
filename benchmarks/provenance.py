"""Where and with what something was measured."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "torchvision", "numpy", "ffcv", "numba", "pillow", "deepspeed", "nvidia-dali-cuda130",
    "mosaicml-streaming",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The processor and how much of it this process may use. `name` is fit for a file name."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        model = found[1] if found else model
    cores, found_gpus = len(os.sched_getaffinity(0)), gpus()
    parts = [model, f"{cores}c", *(f"{len(found_gpus)}x {name}" for name in dict.fromkeys(found_gpus))]
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-"),
        "cpu": model,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": found_gpus,
        "system": f"{platform.system()} {os.uname().release}",
    }


def gpus() -> list[str]:
    """The names of the machine's NVIDIA GPUs, as its driver tells them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        lines = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=60).splitlines()
        return [line.strip() for line in lines if line.strip()]
    return []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git() -> dict[str, Any]:
    """The commit of this checkout, and whether its files (records apart) differ from it."""
    command = ["git", "-C", str(ROOT)]
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output([*command, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*command, "status", "--porcelain", "--", ".", f":!{relative(RESULTS)}"])
        return {"commit": commit.strip(), "dirty": bool(changed)}
    return {"commit": None, "dirty": None}


def source_hash(script: Path) -> str:
    """Of the script and the modules beside it that it uses: records of equal hashes measured in the same way."""
    here = Path(__file__).parent
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    used = {Path(file).resolve() for file in loaded if file and Path(file).resolve().parent == here}
    used |= {script.resolve(), *here.glob(f"{script.stem}_*.py")}
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(used):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def relative(path: str | Path) -> str:
    return os.path.relpath(Path(path).resolve(), ROOT)
