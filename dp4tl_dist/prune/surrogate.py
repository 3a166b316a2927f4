"""One streaming pass of a surrogate over a dataset, and the sums that votes are made of.

Ranks take ragged, disjoint runs of whole batches (`inference_batches`); nothing is padded, there is no collective
inside the loop, and only sums and one number an image are kept. A batch is the same on any number of ranks, its pass is
exact (`dp4tl_dist.exact`), and so is what becomes of its outputs (`prune.votes`): so are the sums.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.loader import Batch, BetonLoader, CentreView
from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.exact import Parts, rows_at_once
from dp4tl_dist.log import progress
from dp4tl_dist.models import logits_and_features, normalise
from dp4tl_dist.prune.clusters_file import NUM_NEAREST, nearest_of
from dp4tl_dist.prune.votes import (
    Tally,
    add_group_sums,
    centres_of,
    check_sums,
    exact_squares,
    from_units,
    largest,
)
from dp4tl_dist.world import World, all_max, all_sum, gather_rows

Result = TypeVar("Result")
CANDIDATES = 2**15
"""Samples, of all classes, whose features are kept until the means are known."""


@dataclass(frozen=True)
class Surrogate:
    """A trained network on its device, and how it looks at images."""

    model: nn.Module
    view: CentreView
    batch_size: int = 256
    num_workers: int = 1
    bf16: bool = False


@torch.inference_mode()
def stream(
    surrogate: Surrogate, loader: BetonLoader, batches: Sequence[NDArray[np.int64]]
) -> Generator[tuple[Batch, Tensor, Tensor], None, None]:
    """One (batch, logits float32 (n, classes), features float32 (n, dim)) for each array of positions, in order.

    The same bits for any number of threads; images that share a batch may change each other's last ones.
    """

    @torch.inference_mode()
    def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=surrogate.bf16):
            logits, features = logits_and_features(model, normalise(images))
        return logits.float(), features.float().flatten(1)

    on_cpu = loader.device.type == "cpu"
    size = rows_at_once(surrogate.view.resolution) if on_cpu else max(map(len, batches), default=1)
    epoch = loader.epoch(batches, surrogate.view)
    with contextlib.closing(epoch), Parts(surrogate.model.eval(), outputs, size=size) as run:
        for batch in epoch:
            logits, features = run(batch.images)
            yield batch, logits, features


def shard(
    surrogate: Surrogate, world: World, beton: Beton, *, label: str
) -> tuple[NDArray[np.int64], Iterator[tuple[Batch, Tensor, Tensor]]]:
    """This rank's positions in `beton` (n_of_rank,) and the stream over them."""
    everything = np.arange(beton.num_samples)
    batches = inference_batches(everything, batch_size=surrogate.batch_size, num_ranks=world.num_ranks, rank=world.rank)
    loader = BetonLoader(beton, device=world.device, num_workers=surrogate.num_workers, tells=world.is_main)
    positions = np.concatenate([everything[:0], *batches])

    def run() -> Iterator[tuple[Batch, Tensor, Tensor]]:
        with progress(label, shown=world.is_main) as advance:
            for done, item in enumerate(stream(surrogate, loader, batches), start=1):
                yield item
                advance(done, len(batches))

    return positions, run()


def shard_classes(
    surrogate: Surrogate, world: World, beton: Beton, *, label: str
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Whole classes, one after another: their positions in `beton` (n,) and features float32 (n, dim). Ranks take
    classes in turn, and batches stay within a class: what shares a batch does not depend on the number of ranks.
    """
    by_class = np.split(np.argsort(beton.labels, kind="stable"), np.cumsum(np.bincount(beton.labels))[:-1])
    mine = [members for members in by_class if len(members)][world.rank :: world.num_ranks]
    size = surrogate.batch_size
    batches = [members[i : i + size] for members in mine for i in range(0, len(members), size)]
    loader = BetonLoader(beton, device=world.device, num_workers=surrogate.num_workers, tells=world.is_main)
    items = stream(surrogate, loader, batches)
    with progress(label, shown=world.is_main) as advance, contextlib.closing(items):
        for done, members in enumerate(mine, start=1):
            # On their way out of the ring of buffers: an image's features are small.
            parts = [next(items)[2].cpu() for _ in range(0, len(members), size)]
            yield members, torch.cat(parts)
            advance(done, len(mine))


def cast_votes(
    surrogate: Surrogate,
    world: World,
    beton: Beton,
    judge: Callable[[Tensor, Tensor], Tally],
    *,
    num_groups: int,
    label: str = "vote",
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """All images of `beton` vote: votes (groups,), affinity (groups,), predictions (images,), the same on every rank.

    `judge` makes a Tally of a batch's logits and features. A surrogate that yields NaN is a UserError on every rank.
    """
    positions, items = shard(surrogate, world, beton, label=label)
    votes = torch.zeros(num_groups, dtype=torch.int64, device=world.device)
    affinity, top, predictions = votes.clone(), 0.0, [votes[:0]]
    for _, logits, features in items:
        tally = judge(logits, features)
        votes += tally.votes
        affinity += tally.affinity
        predictions.append(tally.predictions)
        top = max(top, tally.largest)
    top = float(all_max(world, np.array([top]))[0])
    check_sums(top, beton.num_samples, what=f"outputs for {beton.path} are")
    total = from_units(torch.from_numpy(all_sum(world, affinity.cpu().numpy())))
    found = gather_rows(world, positions, torch.cat(predictions).cpu().numpy(), beton.num_samples)
    return all_sum(world, votes.cpu().numpy()), total.numpy(), found


def class_centres(
    surrogate: Surrogate, world: World, beton: Beton, *, label: str = "class means"
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The mean feature of each class, float64 (classes, dim), NaN for an empty one; and the positions of the samples
    nearest to it, among the class's first ones, as in `Clusters`. The same on every rank.
    """
    positions, items = shard(surrogate, world, beton, label=label)
    counts = torch.zeros(beton.num_classes, dtype=torch.int64, device=world.device)
    candidates = first_of_classes(beton.labels, min(64, max(NUM_NEAREST, CANDIDATES // beton.num_classes)))
    kept: list[Tensor] = []
    sums, top, seen = None, 0.0, 0
    for batch, _, features in items:
        if sums is None:
            sums = torch.zeros(beton.num_classes, features.shape[1], dtype=torch.int64, device=world.device)
        add_group_sums(sums, counts, features, batch.labels)
        top = max(top, largest(features))
        mine = np.isin(positions[seen : seen + len(features)], candidates)
        kept.append(features[torch.from_numpy(mine).to(features.device)].cpu())
        seen += len(features)
    # A rank without a batch learns the features' length from the others.
    dim = int(all_max(world, np.array([0 if sums is None else sums.shape[1]]))[0])
    summed = np.zeros((beton.num_classes, dim), np.int64) if sums is None else sums.cpu().numpy()
    check_sums(float(all_max(world, np.array([top]))[0]), beton.num_samples, what=f"features of {beton.path} are")
    total = from_units(torch.from_numpy(all_sum(world, summed)))
    centres = centres_of(total.numpy(), all_sum(world, counts.cpu().numpy()))
    own = positions[np.isin(positions, candidates)]
    rows = torch.cat([torch.zeros(0, dim), *kept]).double()
    squares = exact_squares(rows - torch.from_numpy(centres[beton.labels[own]])).numpy()
    places = np.searchsorted(candidates, own)
    found = nearest_of(
        beton.labels[candidates], gather_rows(world, places, squares, len(candidates)), beton.num_classes
    )
    return centres, np.where(found < 0, -1, candidates[found])


def first_of_classes(labels: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Positions, ascending, of the first `count` samples of each class."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[rank < count])
