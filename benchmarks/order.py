"""How long the sample order of one epoch takes to make, at ImageNet's size.

Peers: torch's permutation and DistributedSampler; FFCV's RANDOM and QUASI_RANDOM orders, run by FFCV's own classes.
"""

import argparse
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import torch
from harness import Bench, Case
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DistributedSampler

from dp4tl_dist.data.order import epoch_order, rank_batches

SAMPLES_PER_PAGE = 230  # of 35 kB each, in pages of 8 MiB
WINDOW = 64
SEED, EPOCH = 0, 3


def distributed(indices: NDArray[np.int64], num_ranks: int) -> DistributedSampler[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(indices, num_ranks, 0, shuffle=True, seed=SEED)  # type: ignore[arg-type]
    sampler.set_epoch(EPOCH)
    return sampler


def ffcv_orders(indices: NDArray[np.int64], pages: NDArray[np.int64]) -> tuple[Any, Any]:
    """FFCV's RANDOM order, and a function that makes its QUASI_RANDOM one: both see a stand-in for a loader."""
    from ffcv.traversal_order import QuasiRandom, Random

    num_threads = torch.get_num_threads()
    samples_of_page = defaultdict(list)
    for index, page in zip(indices.tolist(), pages.tolist(), strict=True):
        samples_of_page[page].append(index)
    loader = SimpleNamespace(
        indices=indices, seed=SEED, distributed=False, batch_size=WINDOW // 2,  # its window is two batches' pages
        memory_manager=SimpleNamespace(page_to_samples=samples_of_page),
    )  # fmt: skip
    torch.set_num_threads(num_threads)  # FFCV sets it to one when it is imported
    return Random(loader), partial(QuasiRandom, loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024, help="global batch size")
    arguments = harness.parse(parser)
    bench = Bench("order", arguments)
    n, ranks, batch_size = arguments.samples, arguments.ranks, arguments.batch_size
    indices = np.arange(n)
    pages = indices // SAMPLES_PER_PAGE
    random, make_quasi = ffcv_orders(indices, pages) if "ffcv" not in arguments.without else (None, None)

    ours = partial(epoch_order, indices, seed=SEED, epoch=EPOCH)
    cases = [
        Case("dp4tl", ours, n, "raw bits and a sort: the same in every version of numpy"),
        Case("torch randperm", partial(torch.randperm, n), n),
    ]
    if random:
        cases.append(Case("ffcv RANDOM", partial(random.sample_order, EPOCH), n, "numpy's permutation"))
    bench.compare("epoch order, plain", cases, unit="samples")

    def ours_of_rank() -> NDArray[np.int64]:
        return rank_batches(ours(), batch_size=batch_size, num_ranks=ranks, rank=0)

    def torch_of_rank() -> list[list[int]]:
        return list(BatchSampler(distributed(indices, ranks), batch_size // ranks, drop_last=True))

    def ffcv_of_rank() -> NDArray[np.int64]:
        return indices[np.array(list(distributed(indices, ranks)))]

    cases = [
        Case("dp4tl", ours_of_rank, n, "order and all batches"),
        Case("torch", torch_of_rank, n, "DistributedSampler, BatchSampler"),
        Case("ffcv-like", ffcv_of_rank, n, "FFCV's line for distributed RANDOM, without batches"),
    ]
    bench.compare(f"one epoch's batches of one of {ranks} ranks", cases, unit="samples")

    order = ours()
    each = partial(rank_batches, order, batch_size=batch_size, num_ranks=ranks)
    every_rank = Case("dp4tl", lambda: [each(rank=rank).sum() for rank in range(ranks)], n, "sums read every index")
    bench.compare(f"batches of all {ranks} ranks from a given order", [every_rank], unit="samples")

    paged = partial(epoch_order, indices, pages, seed=SEED, epoch=EPOCH, window=WINDOW)
    cases = [Case("dp4tl", paged, n, "tables included")]
    if make_quasi:
        note = "the tables, which it makes once a loader, are not counted"
        cases.append(Case("ffcv QUASI_RANDOM", partial(make_quasi().sample_order, EPOCH), n, note))
        cases.append(Case("ffcv QUASI_RANDOM tables", make_quasi, n, "its part of a loader's start"))
    bench.compare(f"epoch order, from a window of {WINDOW} pages", cases, unit="samples")
    bench.finish()


if __name__ == "__main__":
    main()
