"""One loader in a process of its own, so that none runs with what another one has imported, compiled or set.

python loader_peers.py dp4tl|ffcv|torchvision --serve      epochs on demand (see `harness.serve`)
python loader_peers.py dp4tl|ffcv|torchvision --first      the first batch, then the end
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

Epoch = Callable[[int], Iterator[Any]]


def dp4tl(arguments: argparse.Namespace) -> Epoch:
    from dp4tl_dist.data.beton import open_beton
    from dp4tl_dist.data.loader import BetonLoader, TrainView
    from dp4tl_dist.data.order import epoch_order, rank_batches

    beton = open_beton(arguments.data)
    kept = np.arange(beton.num_samples) if arguments.indices is None else np.load(arguments.indices)
    loader = BetonLoader(beton, num_workers=arguments.threads)

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(kept, seed=0, epoch=number)
        batches = rank_batches(order, batch_size=arguments.batch_size, num_ranks=1, rank=0)
        return loader.epoch(list(batches), TrainView(arguments.resolution, seed=0, epoch=number))

    return epoch


def ffcv(arguments: argparse.Namespace) -> Epoch:
    """Stock FFCV, as its ImageNet example sets it up."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    side = (arguments.resolution, arguments.resolution)
    image = [RandomResizedCropRGBImageDecoder(side), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(arguments.data), arguments.batch_size, num_workers=arguments.threads, os_cache=True,
        order=OrderOption.RANDOM, seed=0, drop_last=True,
        indices=None if arguments.indices is None else np.load(arguments.indices),
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()], "identifier": None},
    )  # fmt: skip
    return lambda number: iter(loader)


def torchvision(arguments: argparse.Namespace) -> Epoch:
    from torch.utils.data import DataLoader, Dataset, Subset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    transform = Compose([RandomResizedCrop(arguments.resolution), RandomHorizontalFlip(), PILToTensor()])
    data: Dataset[Any] = ImageFolder(arguments.data, transform)
    if arguments.indices is not None:
        data = Subset(data, np.load(arguments.indices).tolist())
    loader = DataLoader(
        data, arguments.batch_size, shuffle=True, drop_last=True, num_workers=arguments.threads, persistent_workers=True
    )
    return lambda number: iter(loader)


PEERS = {"dp4tl": dp4tl, "ffcv": ffcv, "torchvision": torchvision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--indices", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--serve", action="store_true")
    mode.add_argument("--first", action="store_true")
    arguments = parser.parse_args()
    epoch = PEERS[arguments.peer](arguments)
    if arguments.first:
        next(epoch(0))
        os.write(1, b"first\n")
        os._exit(0)  # the loaders' own ends are not what is measured
    numbers = iter(range(1 << 30))

    def run(_: str) -> None:
        for _ in epoch(next(numbers)):
            pass

    harness.serve(run)


if __name__ == "__main__":
    main()
