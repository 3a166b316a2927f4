"""One image of any kind to the JPEG payload of a beton. Runs in worker processes: it imports numpy and Pillow only."""

import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dp4tl_dist.errors import UserError

Pixels: TypeAlias = NDArray[np.uint8] | Image.Image
Source: TypeAlias = Path | Pixels | Callable[[], Pixels]
"""Where an image comes from: a file, pixels, or something picklable that returns pixels when it is called."""

MAX_STORED_SIDE = 65_500
"""libjpeg's own limit, below that of the format's 16-bit sides."""


class Sample(NamedTuple):
    source: Source
    label: int


class Encoded(NamedTuple):
    payload: bytes
    height: int
    width: int


def prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_samples(sources: list[Source], *, max_side: int, quality: int) -> list[Encoded | str]:
    """For each source its JPEG, or in words why its file cannot be read."""
    return [_encode_or_reason(source, max_side=max_side, quality=quality) for source in sources]


def _encode_or_reason(source: Source, *, max_side: int, quality: int) -> Encoded | str:
    if not isinstance(source, Path):
        return encode(_pixels(source), max_side=max_side, quality=quality)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; pixels that cannot be had are errors
            with Image.open(source) as image:
                return encode(image, max_side=max_side, quality=quality)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind on damaged files; all mean the same here
        return " ".join(str(error).replace(str(source), "the file").split()) or type(error).__name__


def encode(image: Image.Image, *, max_side: int, quality: int) -> Encoded:
    """Shrink to `max_side` pixels (0: never), turn upright, convert to RGB and compress.

    Raises whatever Pillow does for an image that cannot be decoded whole.
    """
    if max_side:
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the wanted side leaves the resizing filter enough to work with.
        image.draft(None, (2 * max_side, 2 * max_side))
    image.load()
    image = to_rgb(ImageOps.exif_transpose(image))
    longest = max(image.size)
    if max_side and longest > max_side:
        width, height = (max(1, round(side * max_side / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    elif longest > MAX_STORED_SIDE:
        raise ValueError(f"a side of {longest} pixels is more than JPEG holds: use max_side")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Encoded(buffer.getvalue(), image.height, image.width)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit grey is scaled to 8 bits; transparency is dropped, as image classifiers' loaders do."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range that says what white is")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which makes nearly every 16-bit pixel white.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65_535)
        image = Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(source: Pixels | Callable[[], Pixels]) -> Image.Image:
    value = source() if callable(source) else source
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"pixels must be uint8 (height, width[, 1, 3 or 4]), not {array.dtype} of shape {array.shape}")
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array)
