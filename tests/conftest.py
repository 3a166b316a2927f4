"""Fixtures and rules for all tests: a GPU test skips where there is no GPU, and no launcher's environment leaks in."""

import os
import shutil
from pathlib import Path

import pytest

import dp4tl_dist  # noqa: F401 - before torch, as every way into the project does: it sets MKL_CBWR

# As the command line does: threads that spin while they wait slow each other down. torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for item in items:
        on_cluster = item.get_closest_marker("cluster")
        if on_cluster and not (os.geteuid() == 0 and shutil.which("slurmctld")):
            item.add_marker(pytest.mark.skip(reason="needs root and slurmctld, which launch/test.sh installs"))
        # Where two processes share the tests: one SLURM for all that need one, and a file's set-up once.
        item.add_marker(pytest.mark.xdist_group("cluster" if on_cluster else str(item.path)))
    items.sort(key=lambda item: not item.get_closest_marker("cluster"))  # the longest group is begun first


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests start as single processes, also inside a SLURM job or under torchrun, and with no threads asked for."""
    out = (*LAUNCHERS, "OMP_NUM_THREADS")
    for name in [name for name in os.environ if name in out or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]
