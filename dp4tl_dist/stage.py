"""What a run is made of: stages (a command line with its files) and the trials that they serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Stage:
    """One step of a run: a `dp4tl` command line, the files it reads and the one it makes.

    What is at `output` is complete. A stage is carried out beside it, in the folder `beside`, and what it made there is
    swapped in at the end.
    """

    name: str
    argv: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    distributed: bool = False
    config: dict[str, Any] | None = None
    """Content of the file that argv's --config names; the runner writes it."""
    also: tuple[Path, ...] = ()
    """Further files that the stage makes."""

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All that the stage makes."""
        return (self.output, *self.also)

    @property
    def beside(self) -> Path:
        """The folder that the unfinished stage works in. Its name is hidden: no stage can be called like it."""
        return self.output.with_name(f".{self.output.name}.new")

    def unfinished(self, path: Path) -> Path:
        """Where the unfinished stage has one of its outputs."""
        return self.beside / path.relative_to(self.output.parent)

    @property
    def working_argv(self) -> tuple[str, ...]:
        """The command line that is carried out: `argv`, with what it makes beside the place that it is for.

        Features are a cache, checked by whoever uses it: they stay where they are, and serve the next clusters too.
        """
        if "--out" not in self.argv:
            return self.argv
        at = self.argv.index("--out") + 1
        store = ("--store", str(self.output.with_suffix(".features"))) if self.argv[0] == "cluster" else ()
        return (*self.argv[:at], str(self.unfinished(self.output)), *self.argv[at + 1 :], *store)


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
