"""launch/bundle.sh to setup.sh --offline: what a machine without a network gets, and that it is enough."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

TORCH = ("torch", "torchvision")
LIMIT = 60_000_000
OURS = (
    "dp4tl_dist", "ffcv", "llvmlite", "matplotlib", "numba", "pydantic", "pydantic_core", "rich", "safetensors",
    "submitit", "tensorboard",
)  # fmt: skip
PROBE = f"""
import sys, torch, torchvision, {", ".join(OURS)}, ffcv.libffcv, matplotlib.pyplot, torch.utils.tensorboard
for name, module in sys.modules.items():
    if "." not in name and getattr(module, "__file__", None):
        print(name, module.__file__)
"""
CONFIG = """
[data]
train = "a.beton"
[model]
arch = "resnet_tiny"
[engine]
device = "cpu"
[train]
epochs = 1
peak_epoch = 0.5
batch_size = 64
resolution = 32
val_resolution = 32
"""


def run(*argv: object, **options: Any) -> str:
    done = subprocess.run([str(item) for item in argv], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def required(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """`names` and all that they require, extras included, as far as it is for this system."""
    found = {}
    todo = [Requirement(name) for name in names]
    for item in todo:
        if str(item) not in found:
            found[str(item)] = package = importlib.metadata.distribution(item.name)
            for wanted in map(Requirement, package.requires or []):
                if wanted.marker is None or any(wanted.marker.evaluate({"extra": each}) for each in ("", *item.extras)):
                    todo.append(wanted)
    return found


def own_python(folder: Path) -> None:
    """Links in `folder` to torch and what it requires, as if the machine's Python had these and nothing else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(folder)!r})\n")  # for setuptools' .pth
    for package in required(TORCH).values():
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(package.locate_file(top))).resolve())


def without_network() -> list[str]:
    """A command that runs another one with no network, or nothing where that is not allowed."""
    for argv in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*argv, "true"], capture_output=True).returncode == 0:
            return argv
    return []


def test_a_name_that_is_not_pinned(root: Path, tmp_path: Path) -> None:
    argv = ["launch/bundle.sh", "--without", "torch,tensorbored", tmp_path / "bundle"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "bundle.sh: --without tensorbored: launch/requirements.txt pins no package of that name"
    ]


def test_a_folder_that_is_no_bundle_stays(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    done = subprocess.run(["launch/bundle.sh", tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "is no bundle" in done.stderr
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_made_copied_and_used_offline(root: Path, tmp_path: Path) -> None:
    if not (root / ".venv" / ".stamp").is_file():
        pytest.skip("launch/setup.sh has not made this checkout's .venv")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    made = tmp_path / "made 'there', ü"
    said = run(
        "launch/bundle.sh", "--python", python, "--without", ",".join(TORCH), made / "b", cwd=root, env=env
    ).splitlines()  # fmt: skip
    files = [path for path in made.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert size < LIMIT
    assert [path.name for path in made.iterdir()] == ["b"]
    assert re.search(r"/b: \d+ wheels, \d\d\.\d MB$", said[-1]), said

    bundle = shutil.copytree(made / "b", tmp_path / "copied & here")
    shutil.rmtree(made)
    checkout = tmp_path / "a checkout (offline)"
    for name in run("git", "ls-files", "-z", cwd=root).split("\0"):
        if name:
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, checkout / name)

    env |= {"PYTHON": sys.executable}
    offline = [*without_network(), "launch/setup.sh", "--offline", str(bundle)]
    if subprocess.run([sys._base_executable, "-c", "import torch"], capture_output=True, env=env).returncode:
        bare = subprocess.run(offline, cwd=checkout, env=env, capture_output=True, text=True)
        assert bare.returncode == 2, bare.stderr
        (line,) = bare.stderr.splitlines()
        assert "lacks what the bundle leaves out (torch,torchvision): " in line
        assert "torch>=2.11 (it has none)" in line

    own_python(tmp_path / "own")
    env["PYTHONPATH"] = str(tmp_path / "own")
    run(*offline, cwd=checkout, env=env)
    assert not (checkout / ".cache" / "setup" / "wheels").exists()

    venv = checkout / ".venv"
    del env["PYTHON"]
    work = tmp_path / "work"
    work.mkdir()
    there = {"cwd": work, "env": env}
    packages = (venv / "lib" / f"python{python}" / "site-packages").resolve()
    theirs = {path.name.partition(".")[0] for path in (tmp_path / "own").iterdir()}
    used = dict(line.split(" ", 1) for line in run(venv / "bin" / "python", "-c", PROBE, **there).splitlines())
    assert {name for name in OURS if packages not in Path(used[name]).parents} == set()
    assert {name for name, file in used.items() if Path(file).is_relative_to(root / ".venv")} <= theirs
    dp4tl = [*without_network(), venv / "bin" / "dp4tl"]
    run(*dp4tl, "write", "--synthetic", "target/test", "--out", "a.beton", **there)
    (work / "small.toml").write_text(CONFIG)
    run(*dp4tl, "train", "--config", "small.toml", "--out", "run", **there)
    assert list((work / "run" / "tensorboard").glob("events.*"))
    assert "run" in run(*dp4tl, "info", "run", **there)
    assert "nothing required is missing" in run(*dp4tl, "doctor", **there)
