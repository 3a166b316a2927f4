"""Real images for the benchmarks that need them: a beton, and the same JPEG bytes as a folder of files."""

import argparse
import zipfile
from pathlib import Path

import harness
import numpy as np
import provenance

from dp4tl_dist.data.beton import BetonWriter
from dp4tl_dist.data.encode import Encoded, Sample, encode_samples
from dp4tl_dist.data.order import epoch_order
from dp4tl_dist.data.write import folder_samples
from dp4tl_dist.errors import UserError

DEFAULT = provenance.ROOT.parent / "shared" / "data" / "imagenet_sample_250.zip"
MAX_SIDE, QUALITY = 400, 90


def add_arguments(parser: argparse.ArgumentParser, *, samples: int) -> None:
    parser.add_argument("--images", type=Path, help="a folder or .zip of <class>/<image> (default: ImageNet's sample)")
    parser.add_argument("--samples", type=int, default=samples, help="images in the beton: each is repeated as needed")


def find(images: Path | None, folder: Path) -> tuple[list[Sample], list[str]]:
    """Samples and class names of `images`, a zip being unpacked in `folder`. Ends with exit code 2 without images."""
    images = images or DEFAULT
    if not images.exists():
        harness.refuse(f"{images.name} is not there: pass --images DIR with DIR/<class>/<image>")
    if images.is_file():
        with zipfile.ZipFile(images) as archive:
            archive.extractall(folder)
        images = next(path for path in folder.iterdir() if path.is_dir())
    try:
        return folder_samples(images)
    except UserError as error:
        harness.refuse(str(error))


def repeat(samples: list[Sample], count: int) -> list[Sample]:
    """The first `count` of `samples` over and over."""
    return [samples[i % len(samples)] for i in range(count)]


def encode(samples: list[Sample]) -> list[Encoded]:
    """What `dp4tl write` would store of each. Files that cannot be read end the benchmark with exit code 2."""
    found: list[Encoded] = []
    for sample in samples:
        (result,) = encode_samples([sample.source], max_side=MAX_SIDE, quality=QUALITY)
        if isinstance(result, str):
            harness.refuse(f"{sample.source} cannot be read ({result}): take it out of the images")
        found.append(result)
    return found


def write(samples: list[Sample], classes: list[str], count: int, *, beton: Path, files: Path) -> None:
    """`count` samples, each image repeated as needed, shuffled in `beton` and as a file each in `files`/<class>/."""
    encoded = encode(samples[:count])
    with BetonWriter(beton, capacity=count) as writer:
        for i in epoch_order(np.arange(count), seed=0, epoch=0).tolist():
            (payload, height, width), label = encoded[i % len(encoded)], samples[i % len(samples)].label
            writer.add(payload, height=height, width=width, label=label, identifier=i)
            path = files / f"{label:04}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
        writer.finish(classes, {})
