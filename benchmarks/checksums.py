"""What checking the samples' checksums costs a loader, in CPU seconds: a process's first pass, which checks, and later
ones, which know; the peer is the same loader on the same file without F.beton.rows."""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import harness
import images
import numpy as np
from harness import Bench, Case, Seconds

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import BetonLoader, TrainView
from dp4tl_dist.data.order import epoch_order, rank_batches
from dp4tl_dist.data.rows import rows_path


class Reader:
    """A loader over all of a beton."""

    def __init__(self, beton: Path, arguments: argparse.Namespace) -> None:
        self.path, self.arguments, self.number = beton, arguments, 0
        self.again()

    def again(self) -> None:
        """Read as a fresh process would."""
        self.beton = open_beton(self.path)
        self.loader = BetonLoader(self.beton, num_workers=1)

    def epoch(self) -> Seconds:
        order = epoch_order(np.arange(self.beton.num_samples), None, seed=0, epoch=0)  # the same crops in all runs
        batches = list(rank_batches(order, batch_size=self.arguments.batch_size, num_ranks=1, rank=0))
        start = time.process_time()
        for _ in self.loader.epoch(batches, TrainView(self.arguments.resolution, seed=0, epoch=0)):
            pass
        return Seconds(time.process_time() - start)

    def first(self) -> Seconds:
        self.again()
        return self.epoch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    images.add_arguments(parser, samples=1500)
    parser.add_argument("--resolution", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=100)
    arguments = harness.parse(parser, runs=15)
    bench = Bench("checksums", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples, classes = images.find(arguments.images, folder)
        checked, plain = folder / "checked.beton", folder / "plain.beton"
        for path in (checked, plain):
            images.write(samples, classes, arguments.samples, beton=path, files=folder / "files")
        rows_path(plain).unlink()
        readers = {"without": Reader(plain, arguments), "with": Reader(checked, arguments)}
        for title, run in (("first pass", Reader.first), ("later passes", Reader.epoch)):
            cases = [Case(f"{name} rows", partial(run, reader), arguments.samples) for name, reader in readers.items()]
            bench.compare(f"{title}, one thread, CPU seconds", cases, unit="images")
    bench.finish()


if __name__ == "__main__":
    main()
