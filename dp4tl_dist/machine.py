"""What this machine offers a run: SLURM, GPUs, cores, memory and space. Stdlib only, as `doctor` needs it."""

import functools
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Literal["ok", "missing", "optional"]
    """missing: something required is absent or broken. optional: absent or scarce, and most work goes on without."""
    detail: str
    mend: str = ""
    """The command, or the step, that mends it; empty when nothing is to be done."""


def look(about_torch: Mapping[str, Any], *, mend_torch: str) -> list[Check]:
    """Check the machine; `about_torch` is what torch says of its build and the GPUs, empty when it does not import."""
    shm = Path("/dev/shm")
    return [
        _slurm(),
        _gpus(about_torch, mend_torch),
        _nccl(about_torch, mend_torch),
        _cores(),
        _memory(),
        space(
            "/dev/shm", shm, wanted_gib=1, mend="docker run --shm-size=8g; as root: mount -o remount,size=8g /dev/shm"
        ),
        space("disk here", Path.cwd(), wanted_gib=5, mend="free some space, or work in another folder"),
    ]


def _slurm() -> Check:
    commands = ("sbatch", "srun", "squeue", "scancel")
    lacking = [name for name in commands if shutil.which(name) is None]
    if lacking:
        mend = "log in to a submit node (or `module load slurm`)"
        return Check("SLURM", "optional", f"not on PATH: {', '.join(lacking)}", mend)
    return Check("SLURM", "ok", ", ".join(commands))


def _gpus(about: Mapping[str, Any], mend_torch: str) -> Check:
    gpus = about.get("gpus", [])
    if gpus:
        counts = {name: gpus.count(name) for name in gpus}
        return Check("GPUs", "ok", ", ".join(f"{count} x {name}" for name, count in counts.items()))
    if about.get("build") == "CPU only" and shutil.which("nvidia-smi"):
        return Check("GPUs", "optional", "there is a driver, and torch is a CPU-only build", mend_torch)
    mend = "see that nvidia-smi works and CUDA_VISIBLE_DEVICES is right" if shutil.which("nvidia-smi") else ""
    return Check("GPUs", "optional", "torch sees none: everything runs on the CPU", mend)


def _nccl(about: Mapping[str, Any], mend_torch: str) -> Check:
    if about.get("nccl"):
        return Check("NCCL", "ok", about["nccl"])
    return Check(
        "NCCL", "optional", "not in use without GPUs: ranks talk by gloo", mend_torch if about.get("gpus") else ""
    )


@functools.cache
def processor() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


INSTRUCTIONS = ("amx_tile", "avx512f", "avx2", "avx", "sse4_1", "sve2", "sve", "asimd")
"""Those that decide which kernels compute, and so how sums are rounded; the widest of a kind first."""


@functools.cache
def instructions() -> str:
    """The widest vector instructions that this processor has, as the system calls them; empty where it tells none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return next((name for name in INSTRUCTIONS if name in flags), "")


def hardware() -> dict[str, Any]:
    """What an artefact is made on: the processor, its widest instructions, the machine's cores, and the GPUs that this
    process has begun to use.

    Plain JSON types. The cores are the machine's own, so that ranks and pinned processes write the same bytes.
    """
    torch, gpus = sys.modules.get("torch"), list[str]()
    if torch is not None and torch.cuda.is_initialized():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": processor(), "instructions": instructions(), "cores": os.cpu_count(), "gpus": gpus}


def num_cores() -> int:
    """The cores that this process may use: by its affinity, and by the quota of its control groups."""
    return min(len(os.sched_getaffinity(0)), max(1, int(cpu_quota())))


@functools.cache
def cpu_quota(root: Path = Path("/")) -> float:
    """How many cores' time this process's control groups leave it, of version 1 or 2; a huge number without a quota."""
    quotas = [float(sys.maxsize)]
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The bytes that the control groups of this process may take, of version 1 or 2; None without a limit."""
    texts = [
        _read(folder / name) for folder in _groups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes")
    ]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups for a controller, and of the groups around it.

    In a container the path that the kernel tells is often the host's, and what is mounted is the container's own.
    """
    mounts = root / "sys" / "fs" / "cgroup"
    found = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" or controller in names.split(","):
            mount = mounts if number == "0" else mounts / controller
            inside = mount / path.lstrip("/")
            found += [folder for folder in (inside, *inside.parents) if folder.is_relative_to(mount)]
    return [*found, mounts, mounts / controller]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _cores() -> Check:
    return Check("cores", "ok", f"{num_cores()} for this process, {os.cpu_count()} in the machine")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    usable = min(total, memory_limit() or total)
    detail = f"{usable / GIB:.1f} GiB" + (f" of the machine's {total / GIB:.1f}" if usable < total else "")
    if usable < 4 * GIB:
        return Check("memory", "optional", detail, "4 GiB or more is comfortable: ask for more, or use fewer ranks")
    return Check("memory", "ok", detail)


def space(name: str, folder: Path, *, wanted_gib: float, mend: str) -> Check:
    """Free space in `folder`; less than `wanted_gib` is worth a word."""
    if not folder.is_dir():
        return Check(name, "optional", "not there", mend)
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free"
    if free < wanted_gib * GIB:
        return Check(name, "optional", f"{detail}: {wanted_gib:g} GiB or more is comfortable", mend)
    return Check(name, "ok", detail)
