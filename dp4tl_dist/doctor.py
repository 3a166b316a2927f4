"""What this machine has and lacks, each with the command that mends it.

Stdlib only: `python -m dp4tl_dist.doctor` works even where the command `dp4tl` cannot start.
"""

import ctypes.util
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dp4tl_dist import machine
from dp4tl_dist.machine import Check

IMPORT_TIMEOUT_S = 120.0
SETUP = "./launch/setup.sh in a checkout"
INDEX_TORCH = "pip install --force-reinstall 'torch>=2.11' torchvision  # both from the same index"
APT_LIBRARIES = "apt-get install libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++"
DNF_LIBRARIES = "dnf install opencv-devel turbojpeg-devel pkgconf-pkg-config gcc-c++"
CONDA_LIBRARIES = "conda install -c conda-forge opencv libjpeg-turbo pkg-config cxx-compiler"
REBUILD_FFCV = "pip install --force-reinstall --no-deps ffcv==1.0.2"
LIGHT_PACKAGES = ("numpy", "PIL", "pydantic", "rich", "safetensors", "setuptools", "tensorboard")

# A module of the current folder is not to be taken for one of Python's own.
ELSEWHERE = "import sys\nsys.path[:] = [path for path in sys.path if path]\n"
# What a probe prints beside the version, as Python source that sets `about`.
ABOUT = {
    "torch": """
cuda = torch.cuda.is_available()
about["build"] = "CUDA " + torch.version.cuda if torch.version.cuda else "CPU only"
about["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
about["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else ""
about["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
""",
    "torchvision": "import torchvision.ops\n",
    "ffcv": "import ffcv.loader, ffcv.writer\n",
}


@dataclass(frozen=True)
class Probe:
    """What came of importing a module in a process of its own."""

    version: str = ""
    error: str = ""
    """Empty when the import went well."""
    about: dict[str, Any] | None = None


def probe(module: str, *, timeout_s: float = IMPORT_TIMEOUT_S) -> Probe:
    """Import `module` in a process of its own: whatever the import does, a crash or a hang included, stays there."""
    if importlib.util.find_spec(module) is None:
        return Probe(error="not installed")
    marker = "doctor-answer:"
    source = (
        f"{ELSEWHERE}import json, {module}\nabout = {{}}\n{ABOUT.get(module, '')}\n"
        f"print('\\n{marker}' + json.dumps([str(getattr({module}, '__version__', '')), about]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"its import did not end within {timeout_s:.0f} s")
    answers = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    if done.returncode == 0 and answers:
        version, about = json.loads(answers[-1].removeprefix(marker))
        return Probe(version=version, about=about)
    if done.returncode < 0:
        return Probe(error=f"its import was killed by signal {-done.returncode}")
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
    return Probe(error=" ".join(last) or f"its import ended with code {done.returncode}")


def diagnose() -> list[Check]:
    """Look at everything, in the order of the report. Takes a few seconds: the heavy packages are really imported."""
    modules = ("torch", "torchvision", "ffcv", "numba", "deepspeed", "submitit", "timm")
    with ThreadPoolExecutor(max_workers=max(2, min(len(modules), machine.num_cores()))) as pool:
        probes = dict(zip(modules, pool.map(probe, modules), strict=True))
    torch = probes["torch"]
    return [
        _python(),
        _torch(torch),
        _torchvision(probes["torchvision"], torch),
        _ffcv(probes["ffcv"]),
        _libraries(probes["ffcv"]),
        _package("numba", probes["numba"], mend="pip install numba"),
        *_light_packages(),
        _package("submitit", probes["submitit"], mend="pip install submitit"),
        _package("deepspeed", probes["deepspeed"], mend="pip install 'dp4tl_dist[deepspeed]'", optional=True),
        _package("timm", probes["timm"], mend="pip install 'dp4tl_dist[timm]'", optional=True),
        *machine.look(torch.about or {}, mend_torch=INDEX_TORCH),
    ]


def print_report(checks: Sequence[Check], *, write: Callable[[str], object] = print) -> int:
    """Write one line a check, and the remedies below it. Return 0 when nothing required is missing, else 1."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        write(f"{check.status:<8}  {check.name:<{width}}  {check.detail}")
        if check.mend:
            write(f"{'':8}  {'':{width}}  -> {check.mend}")
    missing = [check.name for check in checks if check.status == "missing"]
    write(f"missing: {', '.join(missing)}; {SETUP} installs all of it" if missing else "nothing required is missing")
    return 1 if missing else 0


# ---------------------------------------------------------------- Python and its packages


def _python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check("python", "ok", detail)


def _torch(torch: Probe) -> Check:
    if torch.error:
        return Check("torch", "missing", torch.error, "pip install 'torch>=2.11' torchvision")
    detail = f"{torch.version}, {(torch.about or {})['build']} build"
    if _release(torch.version) < (2, 11):
        return Check(
            "torch", "missing", f"{detail}: 2.11 or newer is needed", "pip install -U 'torch>=2.11' torchvision"
        )
    if not (torch.about or {})["gloo"]:
        return Check("torch", "missing", f"{detail}, without gloo: several ranks cannot talk on a CPU", INDEX_TORCH)
    return Check("torch", "ok", detail)


def _torchvision(torchvision: Probe, torch: Probe) -> Check:
    if not torchvision.error:
        return Check("torchvision", "ok", torchvision.version)
    if "torchvision::" in torchvision.error:
        build = (torch.about or {}).get("build", "unknown")
        detail = (
            f"{torchvision.error}: its binary part was made for another build of torch than the one here "
            f"({torch.version}, {build}), as when a CPU-only torch meets the package index's torchvision"
        )
        return Check("torchvision", "missing", detail, INDEX_TORCH)
    return Check("torchvision", "missing", torchvision.error, "pip install torchvision")


def _ffcv(ffcv: Probe) -> Check:
    if not ffcv.error:
        return Check("ffcv", "ok", importlib.metadata.version("ffcv"))  # its __version__ is stale
    if "distutils" in ffcv.error:
        return Check("ffcv", "missing", f"{ffcv.error} (Python 3.12 and later lack it)", "pip install setuptools")
    if re.search(r"libGL\.so|libgthread|libglib", ffcv.error):
        mend = (
            "pip uninstall opencv-python; pip install opencv-python-headless  # or apt-get install libgl1 libglib2.0-0"
        )
        return Check("ffcv", "missing", ffcv.error, mend)
    return Check("ffcv", "missing", ffcv.error, f"pip install ffcv==1.0.2 (first the libraries below), or {SETUP}")


def _libraries(ffcv: Probe) -> Check:
    """OpenCV and libturbojpeg, as the linker finds them; where FFCV imports they are in use and that settles it."""
    name = "OpenCV, libturbojpeg"
    if not ffcv.error:
        return Check(name, "ok", "loaded by FFCV")
    lacking = re.findall(r"lib(?:opencv_\w+|turbojpeg)\.so[\w.]*", ffcv.error)
    lacking += [f"lib{item}" for item in ("opencv_imgproc", "turbojpeg") if not ctypes.util.find_library(item)]
    if not lacking:
        return Check(name, "ok", "found")
    mend = f"{APT_LIBRARIES} | {DNF_LIBRARIES} | {CONDA_LIBRARIES}; then {REBUILD_FFCV}"
    return Check(name, "missing", f"not found: {', '.join(dict.fromkeys(lacking))}", mend)


def _package(name: str, found: Probe, *, mend: str, optional: bool = False) -> Check:
    if not found.error:
        return Check(name, "ok", found.version or "imports")
    return Check(name, "optional" if optional else "missing", found.error, mend)


def _light_packages() -> list[Check]:
    lacking = [name for name in LIGHT_PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        detail = f"not installed: {', '.join(lacking)}"
        return [Check("other packages", "missing", detail, "pip install . in a checkout, or " + SETUP)]
    return [Check("other packages", "ok", ", ".join(LIGHT_PACKAGES))]


def _release(version: str) -> tuple[int, ...]:
    """2.11.0+cu130 -> (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


if __name__ == "__main__":
    sys.exit(print_report(diagnose()))
