"""Pixels of any mode and depth to 8-bit RGB."""

import numpy as np
from PIL import Image, ImageCms

UNSIGNED = 1
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
"""TIFF's tags."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; transparency is dropped, as image classifiers' loaders do.

    Grey of more than 8 bits is scaled to them. 16 bits count by their depth. In 32 bits nothing says what white is, so
    the largest value does: 255 where none is above it, else 65,535, else all that the bits hold; for floating-point
    numbers 1, else 255. Raises ValueError for floating-point pixels outside 0 to 255, and for integers below 0.
    """
    if image.mode == "F":
        image = _from_floats(image)
    elif image.mode.startswith("I"):
        image = _from_integers(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(image)
    if (image.mode == "P" and "transparency" in image.info) or image.mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (0,))[0]
    whole_range = 2**31 - 1
    if bits == 32 and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values, whole_range = values.view(np.uint32), 2**32 - 1
    grey = values.astype(np.int64)
    white, low, high = 65_535, int(grey.min(initial=0)), int(grey.max(initial=0))
    if low < 0:
        raise ValueError(f"integer pixels from {low} to {grey.max()}: nothing says what black is, 0 would")
    if bits == 12 and image.mode != "I":
        white = 4_095
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two come from 16 bits
        white = 255 if high <= 255 else 65_535 if high <= 65_535 else whole_range
    return Image.fromarray(((np.minimum(grey, white) * 255 + white // 2) // white).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 255):  # a NaN is neither
        raise ValueError(
            f"floating-point pixels from {low:.4g} to {high:.4g}: nothing says what white is, 0 to 1 would"
        )
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8))
