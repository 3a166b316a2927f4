"""What a launcher makes of the verbs' options, and what a stage's log and scratch may lack."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from dp4tl_dist.cli import build_parser
from dp4tl_dist.errors import UserError
from dp4tl_dist.launcher import StageProcess


def options() -> list[tuple[str, str]]:
    """(verb, option) for every option of every verb."""
    verbs = next(item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return [
        (verb, name)
        for verb, parser in verbs.choices.items()
        if verb not in ("run", "sweep")  # which start the launcher themselves
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    ]


@pytest.mark.parametrize(("verb", "option"), options())
def test_torchrun_leaves_the_verbs_options_alone(verb: str, option: str) -> None:
    """Its parser looks for its own, abbreviated ones too, also behind the name of what it starts."""
    found = get_args_parser().parse_args(["--standalone", "-m", "dp4tl_dist", verb, option, "x"])
    assert found.training_script_args == [verb, option, "x"]


@pytest.mark.parametrize("log", ["full", "a folder", "in a file", "gone"])
def test_a_stage_needs_no_log(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Where the log cannot be written there is one warning; the stage's output and its error arrive all the same."""
    path = tmp_path / "logs" / "stage.log"
    path.parent.mkdir()
    if log == "full":
        path.symlink_to("/dev/full")
    elif log == "a folder":
        path.mkdir()
    elif log == "in a file":
        path = tmp_path / "file" / "stage.log"
        path.parent.write_text("")
    else:
        path.symlink_to(tmp_path / "no" / "where")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    StageProcess(["info", "--help"], nproc=1, log=path, label="stage").run()
    told = capsys.readouterr()
    assert told.out.count("    ") > 5 and "stage: done in" in told.out
    (line,) = told.err.splitlines()
    assert line.startswith(f"warning: the log {path} cannot be written (")
    with pytest.raises(UserError, match="stage: .*nothing is not there"):
        StageProcess(["info", "nothing"], nproc=2 if log == "full" else 1, log=path, label="stage").run()
    assert os.environ["TMPDIR"] == "/nowhere"
