"""Everything that selecting does on the CPU, at ImageNet's size, with made-up votes and features; seconds and memory.

Images and networks are left out: the beton's samples are a pixel each, and logits and features are drawn once. What is
left is what this project adds to the forward passes.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Bench, Case
from memory import PeakMemory
from numpy.typing import NDArray

from dp4tl_dist.advise import advise, costs_of, read_votes
from dp4tl_dist.config import OptimConfig
from dp4tl_dist.data.beton import RAW, BetonWriter, open_beton
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.order import epoch_order, rank_batches
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.prune import scores
from dp4tl_dist.prune import votes as voting
from dp4tl_dist.prune.kmeans import nearest_centres
from dp4tl_dist.prune.make import prune
from dp4tl_dist.prune.select import combine, rank_groups
from dp4tl_dist.prune.votes_file import Votes, load_votes, save_votes
from dp4tl_dist.train.cost import Speed

BATCH_SIZE = 256
RANKS = 8
SAMPLES_PER_PAGE = 230  # of 35 kB each, in pages of 8 MiB: here samples are pixels


class World:
    """The files and numbers that the stages work on, in a folder of their own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.sizes, self.folder = arguments, folder
        self.source, self.votes, self.subset = folder / "s.beton", folder / "votes.npz", folder / "subset.npz"
        generator = np.random.default_rng(0)
        self.labels: NDArray[np.int64] = generator.integers(arguments.classes, size=arguments.samples)
        self.predictions = generator.integers(arguments.classes, size=arguments.targets)
        draws = torch.Generator().manual_seed(0)
        self.logits = torch.randn(BATCH_SIZE, arguments.classes, generator=draws)
        self.features = torch.randn(BATCH_SIZE, arguments.dim, generator=draws)
        self.centres = torch.randn(arguments.classes, arguments.dim, generator=draws).double()

    def write(self) -> None:
        with BetonWriter(self.source, capacity=self.sizes.samples) as writer:
            for i, label in enumerate(self.labels.tolist()):
                writer.add(b"\0\0\0", height=1, width=1, label=label, identifier=i, mode=RAW)
            writer.finish(tuple(map(str, range(self.sizes.classes))), {})

    def batches(self, count: int) -> range:
        return range(-(-count // BATCH_SIZE))

    def lm(self) -> None:
        votes = torch.zeros(self.sizes.classes, dtype=torch.int64)
        for _ in self.batches(self.sizes.targets):
            votes += voting.lm_tally(self.logits).votes

    def centres_of_classes(self) -> None:
        sums = torch.zeros(self.sizes.classes, self.sizes.dim, dtype=torch.int64)
        counts, labels = torch.zeros(self.sizes.classes, dtype=torch.int64), torch.from_numpy(self.labels)
        for i in self.batches(self.sizes.samples):
            part = labels[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            voting.add_group_sums(sums, counts, self.features[: len(part)], part)
        voting.centres_of(voting.from_units(sums).numpy(), counts.numpy())

    def fm(self) -> None:
        for _ in self.batches(self.sizes.targets):
            voting.fm_tally(self.features, self.centres)

    def cluster(self) -> None:
        """A step of k-means: the nearest centre of each feature, and the exact sums of its members."""
        sums = torch.zeros(self.sizes.classes, self.sizes.dim, dtype=torch.int64)
        counts = torch.zeros(self.sizes.classes, dtype=torch.int64)
        for _ in self.batches(self.sizes.targets):
            nearest = nearest_centres(self.features.double(), self.centres)
            voting.add_group_sums(sums, counts, self.features, nearest)

    def score(self) -> None:
        labels = torch.arange(BATCH_SIZE) % self.sizes.classes
        for _ in self.batches(self.sizes.samples):
            scores.el2n(self.logits, self.features, labels)

    def cast(self) -> None:
        """The votes file, as `vote` leaves it."""
        classes = self.sizes.classes
        votes = np.bincount(self.predictions, minlength=classes)[None].astype(np.int64)
        meta: dict[str, Any] = {"inputs": {"source": open_beton(self.source).fingerprint}}
        names, sizes = tuple(map(str, range(classes))), np.array([len(self.predictions)])
        save_votes(self.votes, Votes(votes, votes / 2.0, self.predictions, sizes, "lm", names, meta))

    def rank(self) -> None:
        cast = load_votes(self.votes)
        rank_groups(*combine(cast.votes, cast.affinity))

    def prune(self) -> None:
        prune(source=self.source, out=self.subset, votes=self.votes, keep=self.sizes.keep, force=True)

    def advise(self) -> None:
        """Everything that `advise` says, but for a benchmark of this machine."""
        optim = OptimConfig()
        advice = read_votes([self.votes], self.source, combine="normalised", weights=None)
        advise(advice, costs_of(advice, optim, Speed.of_throughput(2000, optim), [], None))

    def random(self) -> None:
        prune(source=self.source, out=self.folder / "r.npz", random="samples", keep=self.sizes.keep, force=True)

    def load(self) -> NDArray[np.int64]:
        return load_subset(self.subset, beton=open_beton(self.source)).indices

    def order(self) -> None:
        """An epoch's order from a window of pages, and the batches of one of the ranks."""
        kept = self.load()
        order = epoch_order(kept, kept // SAMPLES_PER_PAGE, seed=0, epoch=1)
        rank_batches(order, batch_size=min(1024, len(kept) // RANKS * RANKS), num_ranks=RANKS, rank=0)

    def compact(self) -> None:
        compact(self.source, self.subset, self.folder / "p.beton", force=True)


def stages(world: World) -> dict[str, tuple[Callable[[], object], float, str]]:
    """Each stage's name with what runs, its number of items, and what a reader must know. In the order of a run."""
    n, targets, dim = world.sizes.samples, world.sizes.targets, world.sizes.dim
    return {
        "write": (world.write, n, "the header and tables of a beton, and a pixel for each image"),
        "open": (partial(open_beton, world.source), n, "reading and checking all tables"),
        "LM votes": (world.lm, targets, "from logits to exact sums"),
        "FM class means": (world.centres_of_classes, n, f"exact sums of {dim} features over the whole source"),
        "FM votes": (world.fm, targets, "distances that do not round, and exact sums"),
        "k-means step": (world.cluster, targets, f"of {world.sizes.classes} centres"),
        "EL2N scores": (world.score, n, "from logits"),
        "votes file": (world.cast, targets, ""),
        "rank": (world.rank, world.sizes.classes, "votes, then affinity, then id"),
        "prune by votes": (world.prune, n, "reads the beton and the votes, writes the subset"),
        "advise": (world.advise, n, "the curve, every size's samples, bytes and hours, the suggestion"),
        "prune at random": (world.random, n, "samples, not classes"),
        "load subset": (world.load, n, "with the check against its beton"),
        "order": (world.order, world.sizes.keep * n, "opening both files, an epoch in pages, and a rank's batches"),
        "compact": (world.compact, world.sizes.keep * n, "tables and pixels of the kept samples"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--targets", type=int, default=50_000, help="target images that vote")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512, help="features of an image")
    parser.add_argument("--keep", type=float, default=0.4)
    arguments = harness.parse(parser, runs=3, warmup=0)
    bench = Bench("selection_scale", arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        world, cases = World(arguments, Path(name)), []
        for stage, (run, items, note) in stages(world).items():
            peak = PeakMemory(run)
            cases.append(Case(stage, peak, items, note, facts=partial(_facts, peak)))
        title = f"selecting {arguments.keep:g} of {arguments.samples} images of {arguments.classes} classes"
        bench.compare(title, cases, unit="items", peers=False)
    bench.finish()


def _facts(peak: PeakMemory, _: float) -> Mapping[str, float | str]:
    return {"peak MiB": peak.mib, "of which new": peak.mib_new}


if __name__ == "__main__":
    main()
