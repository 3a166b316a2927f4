"""How many images a second a loader gives to training, how long a fresh process waits for its first batch, and how much
an epoch reads when nothing is in memory.

Peers: stock FFCV with its compiled pipeline on the same file; on the same JPEG bytes torchvision's ImageFolder with
torch's DataLoader, and where they are installed NVIDIA DALI on the CPU and MosaicML streaming. Random resized crops and
flips to uint8 batches; all but `cold` with everything in the page cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import harness
import images
import numpy as np
from harness import Bench, Case, Seconds, Workers
from loader_cold import compare_cold

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.subset import Subset, save_subset
from dp4tl_dist.prune.select import count_for_share, random_choice

SCRIPT = Path(__file__).with_name("loader_peers.py")
NOTES = {
    "dp4tl": "decodes at 1/2, 1/4 or 1/8 where the crop is twice that much larger; resizes with antialiasing",
    "ffcv": "decodes every image whole; resizes by INTER_AREA, which repeats pixels when it enlarges",
    "torchvision": "worker processes instead of threads; resizes with antialiasing",
    "dali": "decodes only the crop, on the CPU",
    "streaming": "its shards, then the same as torchvision",
}
MODULES = {"dali": "nvidia.dali", "streaming": "streaming"}  # what may be missing
ONLY = {"torchvision": ("full", "subset"), "dali": ("full", "subset"), "streaming": ("full",)}
PROCESS_CACHE = ("dp4tl", "ffcv")


class Data:
    """The full file, a random half of it by indices, and that half compacted; for torchvision the same as files."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        samples, classes = images.find(arguments.images, folder)
        self.full, self.files, self.small = folder / "full.beton", folder / "files", folder / "compacted.beton"
        self.indices, subset = folder / "half.npy", folder / "half.npz"
        images.write(samples, classes, arguments.samples, beton=self.full, files=self.files)
        kept = count_for_share(arguments.samples, arguments.keep)
        self.counts = {"full": arguments.samples, "subset": kept, "compacted": kept}
        chosen, beton = random_choice(arguments.samples, kept, seed=0), open_beton(self.full)
        self.needed = int(beton.sizes[chosen].sum())
        np.save(self.indices, chosen)
        inputs = {"inputs": {"source": beton.fingerprint}}
        save_subset(subset, Subset(chosen, np.zeros(0, np.int64), 1 - arguments.keep, "random-samples", inputs))
        compact(self.full, subset, self.small)
        self.shards = folder / "shards"

    def shard(self, environ: dict[str, str]) -> None:
        """The full data in MosaicML's format."""
        script = Path(__file__).with_name("loader_shards.py")
        subprocess.run([sys.executable, str(script), str(self.files), str(self.shards)], env=environ, check=True)

    def file(self, peer: str, kind: str) -> Path:
        if peer == "streaming":
            return self.shards
        return self.files if peer in ONLY else self.small if kind == "compacted" else self.full

    def command(self, peer: str, kind: str, threads: int, arguments: argparse.Namespace) -> list[str]:
        data = self.file(peer, kind)
        command = [str(SCRIPT), peer, "--data", str(data), "--threads", str(threads)]
        command += ["--batch-size", str(arguments.batch_size), "--resolution", str(arguments.resolution)]
        command += ["--step-ms", str(arguments.step_ms)]
        return command + (["--indices", str(self.indices)] if kind == "subset" else [])


def first_batch(command: list[str], environ: dict[str, str], cache: Path) -> Seconds:
    """Seconds from the start of a process to its first batch. `cache` is where numba keeps machine code."""
    start = time.perf_counter()
    environ = {**environ, "NUMBA_CACHE_DIR": str(cache)}
    with subprocess.Popen([sys.executable, *command, "--first"], stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"first\n":
            raise RuntimeError(f"{command[1]} gave no batch: its error stands above")
        return Seconds(time.perf_counter() - start)


def peers_of(kind: str, arguments: argparse.Namespace) -> list[str]:
    return [peer for peer in NOTES if kind in ONLY.get(peer, (kind,)) and peer not in arguments.without]


def environ_of(peer: str, arguments: argparse.Namespace) -> dict[str, str]:
    """The environment of a peer's process: what --peers holds is seen by those alone that need it."""
    if peer not in MODULES or arguments.peers is None:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": str(arguments.peers.resolve())}


def leave_out_missing(bench: Bench, arguments: argparse.Namespace) -> None:
    for peer, module in MODULES.items():
        command = [sys.executable, "-c", f"import {module}"]
        done = subprocess.run(command, env=environ_of(peer, arguments), capture_output=True, text=True)
        if peer not in arguments.without and done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it does not import"])[-1]
            bench.skip(peer, f"{reason}: see benchmarks/README.md")
            arguments.without = [*arguments.without, peer]


def waiting(workers: Workers, _: float) -> Mapping[str, float | str]:
    """The last epoch's share of waiting for data."""
    return {"data wait": float(workers("wait"))}


def compare_throughput(bench: Bench, data: Data, arguments: argparse.Namespace, kind: str, threads: int) -> None:
    images_of_epoch = data.counts[kind] // arguments.batch_size * arguments.batch_size
    with ExitStack() as stack:
        cases = []
        for peer in peers_of(kind, arguments):
            for cache in arguments.cache if peer in PROCESS_CACHE else ("os",):
                more = ["--process-cache", "--window", str(arguments.window)] if cache == "process" else []
                command = [*data.command(peer, kind, threads, arguments), *more, "--serve"]
                workers = stack.enter_context(Workers([command], [environ_of(peer, arguments)]))
                name, note = (f"{peer} process-cache", "") if more else (peer, NOTES[peer])
                cases.append(Case(name, workers, images_of_epoch, note, facts=partial(waiting, workers)))
        of_threads = f"{threads} thread{'s' if threads > 1 else ''}"
        step = f", a step of {arguments.step_ms:g} ms" if arguments.step_ms else ""
        title = f"an epoch of the {kind} data at {arguments.resolution} px, {of_threads}{step}"
        bench.compare(title, cases, unit="images")


def compare_first(bench: Bench, data: Data, arguments: argparse.Namespace, kind: str, folder: Path) -> None:
    fresh = iter(range(1 << 30))
    threads = max(arguments.threads)
    environs = {peer: environ_of(peer, arguments) for peer in NOTES}

    def first(peer: str, cache: Path) -> Seconds:
        return first_batch(data.command(peer, kind, threads, arguments), environs[peer], cache)

    cases = [Case(peer, partial(first, peer, folder / "cache")) for peer in peers_of(kind, arguments)]
    note = "without the machine code that numba keeps from run to run"
    first_ever = Case("dp4tl ever", lambda: first("dp4tl", folder / f"new{next(fresh)}"), 1, note)
    title = f"the first batch of the {kind} data, from the start of a process, {threads} threads"
    bench.compare(title, [cases[0], *([first_ever] if kind == "full" else []), *cases[1:]], unit="starts")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parts = "images a second over an epoch, the first batch, or what an epoch reads from the disk"
    parser.add_argument("part", choices=("epoch", "first", "cold"), help=parts)
    images.add_arguments(parser, samples=2000)
    kinds = ("full", "subset", "compacted")
    parser.add_argument("--data", nargs="+", choices=kinds, default=["full"], help="what of the file (default: full)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the samples in the subset")
    parser.add_argument("--cache", nargs="+", choices=("os", "process"), default=["os"], help="the kernel's, or FFCV's")
    parser.add_argument("--window", type=int, default=4, help="pages that the process cache's samples are drawn from")
    ways = ("os", "process", "window")
    parser.add_argument("--ways", nargs="+", choices=ways, default=list(ways), help="how `cold` reads (default: all)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="what the consumer takes for a batch, asleep")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}), help="default: 1 and all cores")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--resolution", type=int, default=160)
    parser.add_argument("--peers", type=Path, help="a folder of `pip install --target` with DALI and streaming")
    parser.add_argument("--folder", type=Path, help="where to work, to measure another disk (default: a temporary one)")
    arguments = harness.parse(parser)
    step = f"-step{arguments.step_ms:g}ms" if arguments.step_ms else ""  # another question, another record
    bench = Bench(f"loader-{arguments.part}-{'-'.join(arguments.data)}{step}", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        data = Data(arguments, Path(name))
        if arguments.part == "cold":
            commands = {kind: data.command("dp4tl", kind, cores, arguments) for kind in ("subset", "compacted")}
            files = {kind: data.file("dp4tl", kind) for kind in commands}
            compare_cold(bench, arguments, commands, files, data.needed)
            return bench.finish()
        leave_out_missing(bench, arguments)
        if "streaming" not in arguments.without and "full" in arguments.data:
            data.shard(environ_of("streaming", arguments))
        for kind in arguments.data:
            if arguments.part == "first":
                compare_first(bench, data, arguments, kind, Path(name))
                continue
            for threads in arguments.threads:
                compare_throughput(bench, data, arguments, kind, threads)
    bench.finish()


if __name__ == "__main__":
    main()
