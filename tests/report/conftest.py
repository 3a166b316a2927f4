"""A finished run and its page, made once for the files here."""

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
