"""How many images a second a loader gives to training, and how long a fresh process waits for its first batch.

Peers: stock FFCV with its compiled pipeline on the same file; torchvision's ImageFolder with torch's DataLoader on the
same JPEG bytes as files. Random resized crops and flips to uint8 batches, everything in the page cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import harness
import images
import numpy as np
from harness import Bench, Case, Seconds, Workers

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.subset import Subset, save_subset
from dp4tl_dist.prune.select import random_choice

SCRIPT = Path(__file__).with_name("loader_peers.py")
NOTES = {
    "dp4tl": "decodes at 1/2, 1/4 or 1/8 where the crop is that much larger than the output",
    "ffcv": "decodes every image whole",
    "torchvision": "worker processes instead of threads; resizes with antialiasing",
}


class Data:
    """The full file, a random half of it by indices, and that half compacted; for torchvision the same as files."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        samples, classes = images.find(arguments.images, folder)
        self.full, self.files, self.small = folder / "full.beton", folder / "files", folder / "compacted.beton"
        self.indices, subset = folder / "half.npy", folder / "half.npz"
        images.write(samples, classes, arguments.samples, beton=self.full, files=self.files)
        self.counts = {"full": arguments.samples, "subset": arguments.samples // 2, "compacted": arguments.samples // 2}
        half = random_choice(arguments.samples, arguments.samples // 2, seed=0)
        np.save(self.indices, half)
        inputs = {"inputs": {"source": open_beton(self.full).fingerprint}}
        save_subset(subset, Subset(half, np.zeros(0, np.int64), 0.5, "random-samples", inputs))
        compact(self.full, subset, self.small)

    def command(self, peer: str, kind: str, threads: int, arguments: argparse.Namespace) -> list[str]:
        data = self.files if peer == "torchvision" else self.small if kind == "compacted" else self.full
        command = [str(SCRIPT), peer, "--data", str(data), "--threads", str(threads)]
        command += ["--batch-size", str(arguments.batch_size), "--resolution", str(arguments.resolution)]
        return command + (["--indices", str(self.indices)] if kind == "subset" else [])


def first_batch(command: list[str], cache: Path) -> Seconds:
    """Seconds from the start of a process to its first batch. `cache` is where numba keeps machine code."""
    start = time.perf_counter()
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    with subprocess.Popen([sys.executable, *command, "--first"], stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"first\n":
            raise RuntimeError(f"{command[1]} gave no batch: its error stands above")
        return Seconds(time.perf_counter() - start)


def compare_throughput(bench: Bench, data: Data, arguments: argparse.Namespace, kind: str, threads: int) -> None:
    peers = [peer for peer in NOTES if not (peer == "torchvision" and kind == "compacted")]
    images_of_epoch = data.counts[kind] // arguments.batch_size * arguments.batch_size
    with ExitStack() as stack:
        cases = []
        for peer in [peer for peer in peers if peer not in arguments.without]:
            command = [*data.command(peer, kind, threads, arguments), "--serve"]
            cases.append(Case(peer, stack.enter_context(Workers([command])), images_of_epoch, NOTES[peer]))
        threads_of = f"{threads} thread{'s' if threads > 1 else ''}"
        bench.compare(f"an epoch of the {kind} data at {arguments.resolution} px, {threads_of}", cases, unit="images")


def compare_first(bench: Bench, data: Data, arguments: argparse.Namespace, kind: str, folder: Path) -> None:
    fresh = iter(range(1 << 30))
    peers = [peer for peer in NOTES if not (peer == "torchvision" and kind == "compacted")]
    threads = max(arguments.threads)
    commands = {peer: data.command(peer, kind, threads, arguments) for peer in peers}
    cases = [Case(peer, partial(first_batch, commands[peer], folder / "cache")) for peer in peers]
    note = "without the machine code that numba keeps from run to run"
    first_ever = Case("dp4tl ever", lambda: first_batch(commands["dp4tl"], folder / f"new{next(fresh)}"), 1, note)
    title = f"the first batch of the {kind} data, from the start of a process, {threads} threads"
    bench.compare(title, [cases[0], *([first_ever] if kind == "full" else []), *cases[1:]], unit="starts")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("epoch", "first"), help="images a second over an epoch, or the first batch")
    images.add_arguments(parser, samples=2000)
    kinds = ("full", "subset", "compacted")
    parser.add_argument("--data", nargs="+", choices=kinds, default=["full"], help="what of the file (default: full)")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}), help="default: 1 and all cores")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--resolution", type=int, default=160)
    arguments = harness.parse(parser)
    bench = Bench(f"loader-{arguments.part}-{'-'.join(arguments.data)}", arguments)
    with tempfile.TemporaryDirectory() as name:
        data = Data(arguments, Path(name))
        for kind in arguments.data:
            if arguments.part == "first":
                compare_first(bench, data, arguments, kind, Path(name))
                continue
            for threads in arguments.threads:
                compare_throughput(bench, data, arguments, kind, threads)
    bench.finish()


if __name__ == "__main__":
    main()
