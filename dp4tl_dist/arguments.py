"""What the verbs of `dp4tl` share in their options."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dp4tl_dist.errors import UserError
from dp4tl_dist.limits import MAX_SIDE, MAX_WORKERS, MOST


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see `{self.prog} --help`")


Verbs = Any


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type of argparse: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        found = int(text)  # ValueError: argparse tells of it
        if found < least or found > most:
            bound = f"less than {least}" if found < least else f"more than {most}"
            raise argparse.ArgumentTypeError(f"{text} is {bound}")
        return found

    parse.__name__ = "int"  # what argparse calls it where it is no number
    return parse


# Of small and negative numbers a verb has more to say.
number = whole(-MOST, MOST)
side = whole(-MOST, MAX_SIDE)
workers = whole(0, MAX_WORKERS)
seed = whole(0, 2**63 - 1)


def add_verb(verbs: Verbs, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
    parser: Parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_out(parser: Parser, what: str) -> None:
    parser.add_argument("--out", type=Path, required=True, help=what)
    parser.add_argument("--force", action="store_true", help="replace what is there")


def add_config(parser: Parser, *, required: bool) -> None:
    parser.add_argument("--config", required=required, help="a .toml file, or the name of a preset")
    parser.add_argument(
        "--set", action="append", default=[], metavar="table.key=value", help="override one key; may be repeated"
    )


def add_allow_incomplete(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--allow-incomplete", action="store_true",
        help=f"take {what} from before its training's end, too; what is made from it says so",
    )  # fmt: skip
