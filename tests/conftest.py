"""Fixtures and rules for all tests: a GPU test skips where there is no GPU, and no launcher's environment leaks in."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dp4tl_dist  # noqa: F401 - before torch, as every way into the project does: it sets MKL_CBWR

# As the command line does: threads that spin while they wait slow each other down. torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    items.sort(key=lambda item: item.path.parent.name != "cluster")  # they wait for the most part: begun first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, each takes whole files, whose set-up is made once; one takes all that
    need the SLURM."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "cluster" if "cluster" in Path(path).parts else path

    return Files(config, log)


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
