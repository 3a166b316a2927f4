"""What every artefact says of itself, and what is checked and carried on where another is made from it."""

import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dp4tl_dist import __version__
from dp4tl_dist.errors import UserError
from dp4tl_dist.machine import hardware
from dp4tl_dist.revisions import FORMATS
from dp4tl_dist.version import commit


def make_meta(
    kind: str,
    *,
    config: Any = None,
    seed: int | None = None,
    inputs: Mapping[str, str] | None = None,
    made_from: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What every artefact carries. `inputs` maps the name of each input to its fingerprint.

    made_from: the metas of the inputs. What is unfinished in one of them stays so in all that is made from it.
    """
    unfinished = list(dict.fromkeys(line for meta in made_from for line in unfinished_in(meta)))
    return {
        **({"unfinished": unfinished} if unfinished else {}),
        "kind": kind,
        **({"format": FORMATS[kind]} if kind in FORMATS else {}),
        "version": __version__,
        "commit": commit(),
        "command": shlex.join(["dp4tl", *sys.argv[1:]]),
        "config": config,
        "seed": seed,
        "inputs": dict(inputs or {}),
        "hardware": hardware(),
    }


def unfinished_in(meta: Mapping[str, Any]) -> list[str]:
    """What an artefact was made from that was not trained to its end, as its meta says it; [] for nothing."""
    lines = meta.get("unfinished")
    return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []


def check_fingerprint(what: str, expected: str | None, actual: str, *, expected_from: Path, actual_from: Path) -> None:
    """Refuse `actual_from` where `expected_from` was made for another file, naming both sides."""
    if expected != actual:
        raise UserError(
            f"{expected_from} was made for another {what} ({expected or 'unknown'}) than {actual_from} ({actual}): "
            f"make it again from {actual_from}, or pass the {what} it was made for"
        )
