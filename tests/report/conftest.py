"""Finished runs and their pages, made once for the files here."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from fake_run import make_run

from dp4tl_dist.report.html import write_report


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, with its report.html."""
    out = tmp_path_factory.mktemp("report") / "run"
    make_run(out)
    write_report(out)
    return out


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two targets, judged under attack, with an arm by brute force; and its report.html."""
    out = tmp_path_factory.mktemp("rich") / "run"
    arms = ("dense", "lm@0.5", "fm@0.5", "lm@0.25", "fm@0.25", "influence@0.5", "random@0.5", "random@0.25")
    make_run(out, arms=arms, targets=("birds", "pets"), robust=True)
    write_report(out)
    return out


@pytest.fixture
def copy_of_rich(rich: Path, tmp_path: Path) -> Path:
    """To be changed."""
    return Path(shutil.copytree(rich, tmp_path / "run"))
