"""The doctor finds what is broken, survives it, and names the command that mends it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dp4tl_dist import doctor, machine
from dp4tl_dist.doctor import Probe, diagnose, print_report, probe
from dp4tl_dist.machine import Check

NMS = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fake(name, source): a package that shadows the real one, here and in processes started from here."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    return make


def test_probe_tells_the_version(fake):
    fake("made_up", "__version__ = '3.2'\nprint('noise')")
    assert probe("made_up") == Probe(version="3.2", about={})


def test_probe_of_an_absent_module():
    assert probe("no_such_module_anywhere").error == "not installed"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (NMS, "torchvision::nms does not exist"),
        ("import os; os.abort()", "killed by signal 6"),
        ("import os; os._exit(0)", "ended with code 0"),
        ("import os; os._exit(9)", "ended with code 9"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_probe_survives_any_import(fake, source, expected):
    fake("made_up", source)
    assert expected in probe("made_up", timeout_s=1.0 if "sleep" in source else 60.0).error


def test_mismatched_torchvision_is_explained_and_the_rest_still_reported(tmp_path):
    """The whole command, with heavy packages faked: broken torchvision, FFCV without its libraries, no deepspeed."""
    torch = (
        "__version__ = '2.13.0+cpu'\n"
        "class version: cuda = None\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n    device_count = staticmethod(lambda: 0)\n"
        "class distributed:\n    is_available = is_gloo_available = staticmethod(lambda: True)\n"
    )
    fakes = {
        "torch": torch,
        "torchvision": NMS,
        "ffcv": "raise ImportError('libopencv_imgproc.so.406: cannot open shared object file')",
        "deepspeed": "raise ImportError('no deepspeed today')",
        **dict.fromkeys(("numba", "submitit", "timm"), "__version__ = '1'"),
    }
    for name, source in fakes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    package_root = str(Path(doctor.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "dp4tl_dist.doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package_root}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["missing", "torchvision"])
    assert "CPU-only torch" in lines[at] and "2.13.0+cpu, CPU only" in lines[at]
    assert "pip install --force-reinstall 'torch>=2.11' torchvision" in lines[at + 1]
    assert "libopencv_imgproc.so.406" in done.stdout and "libturbojpeg0-dev" in done.stdout
    assert any(line.split()[:2] == ["optional", "deepspeed"] for line in lines)
    assert lines[-1].startswith("missing: torchvision, ffcv, OpenCV, libturbojpeg")


def test_real_machine_lacks_nothing_required(monkeypatch):
    """The machine that runs the tests was set up for them."""
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT_S", 100.0)
    checks = diagnose()
    names = [check.name for check in checks]
    assert [check for check in checks if check.status == "missing"] == []
    assert {"python", "torch", "torchvision", "ffcv", "SLURM", "GPUs", "NCCL", "cores", "memory"} <= set(names)
    assert len(names) == len(set(names))


def test_old_torch_is_reported():
    check = doctor._torch(Probe(version="2.4.1+cu121", about={"build": "CUDA 12.1", "gloo": True}))
    assert (check.status, check.mend) == ("missing", "pip install -U 'torch>=2.11' torchvision")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("No module named 'distutils'", "pip install setuptools"),
        ("libGL.so.1: cannot open shared object file", "opencv-python-headless"),
        ("not installed", "pip install ffcv==1.0.2"),
    ],
)
def test_ffcv_remedies(error, remedy):
    check = doctor._ffcv(Probe(error=error))
    assert check.status == "missing" and error in check.detail and remedy in check.mend


def test_gpus_are_counted_by_name():
    about = {"build": "CUDA 13.0", "gpus": ["H200", "H200", "L4"], "nccl": "2.28.9"}
    by_name = {check.name: check for check in machine.look(about, mend_torch="mend")}
    assert by_name["GPUs"] == Check("GPUs", "ok", "2 x H200, 1 x L4")
    assert by_name["NCCL"].detail == "2.28.9"


def test_scarce_space_is_not_an_error(tmp_path):
    assert machine.space("disk", tmp_path, wanted_gib=1e9, mend="tidy up").status == "optional"
    assert machine.space("disk", tmp_path / "absent", wanted_gib=0, mend="x").detail == "not there"
    assert machine.space("disk", tmp_path, wanted_gib=0, mend="x").status == "ok"


def test_report_and_exit_code():
    lines: list[str] = []
    good, bad, spare = (
        Check("a", "ok", "1"),
        Check("b", "missing", "gone", "get b"),
        Check("c", "optional", "none", "get c"),
    )
    assert print_report([good, spare], write=lines.append) == 0
    assert print_report([good, bad, spare], write=lines.append) == 1
    assert any(line.strip() == "-> get b" for line in lines)
    assert lines[-1].startswith("missing: b;")
