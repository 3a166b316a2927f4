"""What a launcher makes of the verbs' options."""

import argparse

import pytest
from torch.distributed.run import get_args_parser

from dp4tl_dist.cli import build_parser


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
