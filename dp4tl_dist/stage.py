"""What a run is made of: stages (a command line with its files) and the trials that they serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Stage:
    """One step of a run: a `dp4tl` command line, the files it reads and the one it makes."""

    name: str
    argv: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    distributed: bool = False
    config: dict[str, Any] | None = None
    """Content of the file that argv's --config names; the runner writes it."""
    also: tuple[Path, ...] = ()
    """Further files that the stage makes."""


@dataclass(frozen=True)
class Trial:
    """One arm on one target with one seed: which stages made it."""

    arm: str
    target: str
    seed: int
    subset: Path | None
    selection: tuple[str, ...]
    """Stages whose time counts as selection: surrogate, vote, prune."""
    pretrain: str
    transfers: dict[Literal["lp", "ff"], str]
