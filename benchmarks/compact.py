"""Compacting half of a beton against writing the same half again from its images.

Peers: `write_samples`, which decodes, shrinks and encodes with all cores; and a plain copy of the compacted file, which
is as fast as it could be. Every output is on disk (fsync) when a run ends.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import harness
import images
import numpy as np
from harness import Bench, Case

from dp4tl_dist.atomic import atomic_file
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.subset import Subset, save_subset
from dp4tl_dist.data.write import WriteOptions, write_samples
from dp4tl_dist.prune.select import random_choice


def copy(source: Path, out: Path) -> None:
    with atomic_file(out) as temporary:
        shutil.copyfile(source, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    images.add_arguments(parser, samples=2000)
    parser.add_argument("--folder", type=Path, help="where to work, to measure another disk (default: a temporary one)")
    arguments = harness.parse(parser)
    bench = Bench("compact", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        samples, classes = images.find(arguments.images, folder)
        source, subset, out = folder / "source.beton", folder / "half.npz", folder / "half.beton"
        images.write(samples, classes, arguments.samples, beton=source, files=folder / "files")
        beton = open_beton(source)
        half = random_choice(arguments.samples, arguments.samples // 2, seed=0)
        inputs = {"inputs": {"source": beton.fingerprint}}
        save_subset(subset, Subset(half, np.zeros(0, np.int64), 0.5, "random-samples", inputs))
        compact(source, subset, out)
        # Identifiers are places among the repeated samples: these are the very images that were compacted.
        chosen = [images.repeat(samples, arguments.samples)[i] for i in beton.identifiers[half].tolist()]
        options = WriteOptions(max_side=images.MAX_SIDE, quality=images.QUALITY, force=True)
        megabytes = int(beton.sizes[half].sum()) / 1e6

        cores = len(os.sched_getaffinity(0))
        cases = [
            Case("compact", lambda: compact(source, subset, folder / "compacted.beton", force=True), megabytes),
            Case(
                "write", lambda: write_samples(chosen, classes, folder / "written.beton", options=options), megabytes,
                f"from image files in the page cache, {cores} core{'s' if cores > 1 else ''}",
            ),
            Case("copy", lambda: copy(out, folder / "copied.beton"), megabytes, "a file of the same bytes: the limit"),
        ]  # fmt: skip
        title = f"{len(half)} images, {megabytes:.0f} MB of payloads, to a beton of their own"
        bench.compare(title, cases, unit="MB", aim="writing takes 10 times as long as compacting, or more")
    bench.finish()


if __name__ == "__main__":
    main()
