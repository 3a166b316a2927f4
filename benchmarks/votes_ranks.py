"""One rank that votes over its share of synthetic logits or features, as `dp4tl vote` does; see `harness.serve`."""

import argparse
import os
from collections.abc import Callable

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.prune.votes import (
    Tally,
    add_group_sums,
    centres_of,
    check_sums,
    fm_tally,
    from_units,
    largest,
    lm_tally,
)
from dp4tl_dist.world import World, all_max, all_sum, gather_rows, joined

BATCH_SIZE = 256


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512, help="features of an image")
    parser.add_argument("--lm-targets", type=int, default=50_000)
    parser.add_argument("--fm-targets", type=int, default=10_000)
    parser.add_argument("--source", type=int, default=200_000, help="source images, for the class means of FM")
    parser.add_argument("--threads", type=int, default=0, help="of each process (default: its share of the cores)")


def draw(rows: int, columns: int, *, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def labels_of(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))


class Rank:
    """What the streaming pass does after the network, on tensors that are there already."""

    def __init__(self, world: World, sizes: argparse.Namespace) -> None:
        self.world, self.sizes = world, sizes
        self.logits = draw(sizes.lm_targets, sizes.classes, seed=0)
        self.features = draw(sizes.fm_targets, sizes.dim, seed=1)
        self.source, self.labels = draw(sizes.source, sizes.dim, seed=2), labels_of(sizes.source, sizes.classes)
        self.centres = draw(sizes.classes, sizes.dim, seed=4).double()

    def run(self, what: str) -> None:
        if what == "lm":
            self.vote(self.logits, lm_tally)
        elif what == "fm":
            self.vote(self.features, lambda rows: fm_tally(rows, self.centres))
        else:
            self.means()

    def batches(self, num_rows: int) -> list[NDArray[np.int64]]:
        ranks, rank = self.world.num_ranks, self.world.rank
        return inference_batches(np.arange(num_rows), batch_size=BATCH_SIZE, num_ranks=ranks, rank=rank)

    def vote(self, rows: Tensor, judge: Callable[[Tensor], Tally]) -> None:
        votes = torch.zeros(self.sizes.classes, dtype=torch.int64)
        affinity, top, predictions = votes.clone(), 0.0, [votes[:0]]
        batches = self.batches(len(rows))
        for batch in batches:
            tally = judge(rows[batch[0] : batch[-1] + 1])
            votes += tally.votes
            affinity += tally.affinity
            predictions.append(tally.predictions)
            top = max(top, tally.largest)
        check_sums(float(all_max(self.world, np.array([top]))[0]), len(rows), what="outputs are")
        all_sum(self.world, affinity.numpy())
        all_sum(self.world, votes.numpy())
        places = np.concatenate([np.zeros(0, np.int64), *batches])
        gather_rows(self.world, places, torch.cat(predictions).numpy(), len(rows))

    def means(self) -> None:
        sums = torch.zeros(self.sizes.classes, self.sizes.dim, dtype=torch.int64)
        counts, top = torch.zeros(self.sizes.classes, dtype=torch.int64), 0.0
        for batch in self.batches(len(self.source)):
            rows = slice(batch[0], batch[-1] + 1)
            add_group_sums(sums, counts, self.source[rows], self.labels[rows])
            top = max(top, largest(self.source[rows]))
        check_sums(float(all_max(self.world, np.array([top]))[0]), len(self.source), what="features are")
        total = from_units(torch.from_numpy(all_sum(self.world, sums.numpy())))
        centres_of(total.numpy(), all_sum(self.world, counts.numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser)
    sizes = parser.parse_args()
    with joined("cpu", timeout_s=600) as world, torch.inference_mode():
        torch.set_num_threads(sizes.threads or torch.get_num_threads())
        harness.serve(Rank(world, sizes).run)
        os._exit(0)  # rank 0 may end first, and with it the others' rendezvous


if __name__ == "__main__":
    main()
