"""What is known of a run's files before they are made: classes and sizes of a dataset, a network, a subset's size."""

from dataclasses import dataclass, field
from pathlib import Path

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.plan_content import Content
from dp4tl_dist.plan_sizes import Kept, Sizes
from dp4tl_dist.sides import TrainedAt
from dp4tl_dist.stage import Stage
from dp4tl_dist.world import World, place


@dataclass(frozen=True)
class Dataset:
    """A beton that is there or will be written. `sizes` (classes,) are those before a compact copy chose `kept`."""

    classes: tuple[str, ...]
    sizes: Sizes
    kept: Kept
    content: Content = field(default_factory=Content)
    """What tells whether another dataset is a copy. Nobody asks that of a compact copy: it has none."""
    beton: Beton | None = None
    """The file, where it is there."""

    def labels_for(self, what: str) -> None:
        """Raise UserError where samples have no label, and `what` needs them."""
        if self.beton is not None:
            self.beton.labels_for(what)


@dataclass(frozen=True)
class Network:
    """A checkpoint that will be trained."""

    trained: TrainedAt
    classes: tuple[str, ...]
    has_head: bool
    validated: int
    """Epochs whose validation losses it logs."""


@dataclass(frozen=True)
class Look:
    """A stage, and what is known before it."""

    stage: Stage
    known: dict[Path, object]
    num_ranks: int
    here: bool
    """Whether it will run on this machine."""

    @property
    def options(self) -> dict[str, list[str]]:
        """What follows each option. No value of a stage begins with "-", but behind a "=" (see `stages`)."""
        found: dict[str, list[str]] = {}
        values: list[str] = []
        for part in self.stage.argv[1:]:
            if part.startswith("--"):
                name, sign, value = part[2:].partition("=")
                values = found.setdefault(name, [])
                values += [value] if sign else []
            else:
                values.append(part)
        return found

    def path(self, option: str) -> Path:
        return Path(self.options[option][0])

    def dataset(self, path: Path) -> Dataset:
        """What a beton holds; opened, unless a stage will write it."""
        found = self.known.get(path)
        if not isinstance(found, Dataset):
            beton = open_beton(path)
            sizes = beton.class_sizes
            found = Dataset(beton.classes, sizes, Kept(beton.num_samples, beton.num_samples), Content(beton), beton)
            self.known[path] = found
        return found

    def network(self, option: str) -> Network:
        found = self.known[self.path(option)]
        assert isinstance(found, Network), "a run trains what it uses"
        return found

    def kept(self, path: Path) -> Kept:
        found = self.known[path]
        assert isinstance(found, Kept)
        return found

    def check_devices(self, device: str) -> None:
        """Raise UserError where a rank would find no device."""
        for rank in range(self.num_ranks if self.here else 0):
            place(World(rank, self.num_ranks, rank, self.num_ranks), device)
