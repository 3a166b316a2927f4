"""Tiny betons of the drawn dataset, made in milliseconds."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dp4tl_dist.data.beton import BetonWriter
from dp4tl_dist.data.synthetic import draw


def make_beton(
    path: Path, *, kind: str = "source", split: str = "train", num_classes: int = 4, per_class: int = 6
) -> Path:
    """A beton of the first classes of one part of the drawn dataset, shuffled; identifiers are 3 * position + 1."""
    items = [(label, index) for label in range(num_classes) for index in range(per_class)]
    order = np.random.default_rng(0).permutation(len(items))
    with BetonWriter(path, capacity=len(items)) as writer:
        for position, item in enumerate(order):
            label, index = items[item]
            pixels = draw(kind, split, label, index)  # type: ignore[call-overload, arg-type]
            payload = io.BytesIO()
            Image.fromarray(pixels).save(payload, "JPEG", quality=90)
            height, width = pixels.shape[:2]
            writer.add(payload.getvalue(), height=height, width=width, label=label, identifier=3 * position + 1)
        writer.finish([f"class {label}" for label in range(num_classes)], {})
    return path
