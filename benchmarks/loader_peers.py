"""One loader in a process of its own, so that none runs with what another one has imported, compiled or set.

python loader_peers.py PEER --serve      epochs on demand (see `harness.serve`); "wait" answers with the share of the
                                         last epoch that its consumer waited
python loader_peers.py PEER --first      the first batch, then the end
python loader_peers.py PEER --cold       an epoch, then JSON of its seconds and of the bytes that it read

With --step-ms the consumer spends that long on each batch, asleep as one is that waits for a GPU.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Seconds

Epoch = Callable[[int], Iterator[Any]]


def dp4tl(arguments: argparse.Namespace) -> Epoch:
    from dp4tl_dist.data.beton import open_beton
    from dp4tl_dist.data.loader import BetonLoader, TrainView
    from dp4tl_dist.data.order import epoch_order, rank_batches

    beton = open_beton(arguments.data)
    kept = np.arange(beton.num_samples) if arguments.indices is None else np.load(arguments.indices)
    pages = beton.pages[kept] if arguments.window else None
    loader = BetonLoader(beton, num_workers=arguments.threads, os_cache=not arguments.process_cache)

    def epoch(number: int) -> Iterator[Any]:
        order = epoch_order(kept, pages, seed=0, epoch=number, window=arguments.window or 1)
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
        str(arguments.data), arguments.batch_size, num_workers=arguments.threads, os_cache=not arguments.process_cache,
        order=OrderOption.QUASI_RANDOM if arguments.window else OrderOption.RANDOM, seed=0, drop_last=True,
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


def dali(arguments: argparse.Namespace) -> Epoch:
    """NVIDIA DALI on the CPU: fused decoding of the crop, as its ImageNet example sets it up."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    side, labels = arguments.resolution, sorted(path.name for path in arguments.data.iterdir())
    files = [(path, labels.index(path.parent.name)) for path in sorted(arguments.data.glob("*/*.jpg"))]
    if arguments.indices is not None:
        files = [files[i] for i in np.load(arguments.indices)]

    @pipeline_def(batch_size=arguments.batch_size, num_threads=arguments.threads, device_id=None, seed=0)
    def crops() -> Any:
        jpegs, targets = fn.readers.file(
            files=[str(path) for path, _ in files], labels=[label for _, label in files], name="reader",
            random_shuffle=True, initial_fill=1024,
        )  # fmt: skip
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[side, side], antialias=False)
        return fn.flip(images, horizontal=fn.random.coin_flip()), targets

    pipe = crops()
    pipe.build()
    loader = DALIGenericIterator(
        [pipe], ["image", "label"], reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    return lambda number: iter(loader)


def streaming(arguments: argparse.Namespace) -> Epoch:
    """MosaicML streaming: shards of the same JPEG bytes, decoded and cropped by torchvision in worker processes."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    transform = Compose([RandomResizedCrop(arguments.resolution), RandomHorizontalFlip(), PILToTensor()])

    class Shards(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            return transform(found["image"].convert("RGB")), found["label"]

    data = Shards(local=str(arguments.data), shuffle=True, batch_size=arguments.batch_size)
    loader = DataLoader(
        data, arguments.batch_size, drop_last=True, num_workers=arguments.threads, persistent_workers=True
    )
    return lambda number: iter(loader)


PEERS = {"dp4tl": dp4tl, "ffcv": ffcv, "torchvision": torchvision, "dali": dali, "streaming": streaming}


class Consumer:
    """Goes through epochs, and knows which share of one it waited for data."""

    def __init__(self, epoch: Epoch, step_s: float) -> None:
        self.epoch, self.step_s, self.number = epoch, step_s, 0
        self.share = 0.0

    def answer(self, what: str) -> Seconds | None:
        if what != "run":
            return Seconds(self.share)
        waited, batches, start = 0.0, self.epoch(self.number), time.perf_counter()
        self.number += 1
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            time.sleep(self.step_s)
        self.share = waited / (time.perf_counter() - start)
        return None


def cold(epoch: Epoch) -> dict[str, float]:
    """Seconds of an epoch, bytes that the kernel fetched from storage for it, and bytes asked for by read()."""
    before, start = bytes_read(), time.perf_counter()
    for _ in epoch(0):
        pass
    seconds, after = time.perf_counter() - start, bytes_read()
    return {"seconds": seconds, "disk": after["read_bytes"] - before["read_bytes"],
            "asked": after["rchar"] - before["rchar"]}  # fmt: skip


def bytes_read() -> dict[str, int]:
    """This process's counts, all threads together; zeros where the kernel does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return {"read_bytes": 0, "rchar": 0}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--indices", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--process-cache", action="store_true", help="FFCV's page cache instead of the kernel's")
    parser.add_argument("--window", type=int, default=0, help="pages that samples are drawn from; 0 for the whole file")
    parser.add_argument("--step-ms", type=float, default=0.0)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--serve", action="store_true")
    mode.add_argument("--first", action="store_true")
    mode.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    epoch = PEERS[arguments.peer](arguments)
    if arguments.first:
        next(epoch(0))
        os.write(1, b"first\n")
        os._exit(0)  # the loaders' own ends are not what is measured
    if arguments.cold:
        print(json.dumps(cold(epoch)), flush=True)
        os._exit(0)
    harness.serve(Consumer(epoch, arguments.step_ms / 1e3).answer)


if __name__ == "__main__":
    main()
