"""One image of any kind to the JPEG payload of a beton. Runs in worker processes: no torch is imported.

What Pillow decodes is taken, whatever its metadata are like: orientation alone is read, and applied where it can be.
A JPEG that fits is kept as it is, without its metadata.
"""

import functools
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dp4tl_dist.data.coded import (
    JPEG_MAGIC,
    PNG_MAGIC,
    Coded,
    avif_without_exif,
    decodes,
    jpeg_without_metadata,
    png_without_metadata,
)
from dp4tl_dist.data.depth import to_rgb
from dp4tl_dist.errors import UserError

Pixels: TypeAlias = NDArray[np.uint8] | Image.Image
Source: TypeAlias = Path | Pixels | Callable[[], Pixels]
"""Where an image comes from: a file, pixels, or something picklable that returns pixels when it is called."""

MAX_STORED_SIDE = 65_500
"""libjpeg's own limit, below that of the format's 16-bit sides."""


NO_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow names and does not decode: other programs do, and images from outside start no programs."""
CERTAIN = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""Formats that a file's first bytes tell from anything else."""
FOREIGN = frozenset({
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".rw2", ".webp",
})  # fmt: skip
"""Images that Pillow, or this build of it, may have no decoder for: they are not passed over, but named."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes an image of EXIF's orientation upright."""


class Sample(NamedTuple):
    source: Source
    label: int


class Encoded(NamedTuple):
    payload: bytes
    height: int
    width: int


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PIXELS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in small letters and with their dots, of the formats that are read."""
    known = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def is_image(path: Path) -> bool:
    """Whether it is to be read as an image: by its suffix, or by its content where that says nothing."""
    if path.suffix.lower() in image_suffixes() | FOREIGN:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=CERTAIN):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception as error:
        return isinstance(error, OSError) and error.errno is not None  # it cannot be read, and will be named


def prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_samples(
    sources: list[Source], *, max_side: int, quality: int, reencode: bool = False
) -> list[Encoded | str]:
    """For each source its JPEG, or in words why its file cannot be read."""
    return [_encode_or_reason(source, max_side=max_side, quality=quality, reencode=reencode) for source in sources]


def _encode_or_reason(source: Source, *, max_side: int, quality: int, reencode: bool) -> Encoded | str:
    if not isinstance(source, Path):
        return encode(_pixels(source), max_side=max_side, quality=quality)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; pixels that cannot be had are errors
            return encode_file(source, max_side=max_side, quality=quality, reencode=reencode)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind on damaged files; all mean the same here
        if isinstance(error, UnidentifiedImageError):
            return "not an image of a known format"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return " ".join(str(error).split()) or type(error).__name__


def encode_file(path: Path, *, max_side: int, quality: int, reencode: bool = False) -> Encoded:
    """Keep a JPEG that fits, unless `reencode`; `encode` everything else. Raises whatever Pillow does."""
    if path.suffix.lower() in FOREIGN - image_suffixes():
        raise ValueError(f"Pillow reads no {path.suffix.lower()} files: convert it")
    with open(path, "rb") as handle:
        start = handle.read(12)
        handle.seek(0)
        if start.startswith(JPEG_MAGIC):
            return _encode_jpeg(handle.read(), max_side=max_side, quality=quality, reencode=reencode)
        try:
            with _open(handle) as image:
                return encode(image, max_side=max_side, quality=quality)
        except Exception:  # oversized texts, wrong checksums and tags that cannot be written again among them
            strip = png_without_metadata if start.startswith(PNG_MAGIC) else avif_without_exif
            if not start.startswith(PNG_MAGIC) and start[4:8] != b"ftyp":
                raise
        handle.seek(0)
        with _open(io.BytesIO(strip(handle.read()))) as image:
            return encode(image, max_side=max_side, quality=quality)


def _encode_jpeg(data: bytes, *, max_side: int, quality: int, reencode: bool) -> Encoded:
    coded = jpeg_without_metadata(data)
    with _open(io.BytesIO(data), bare=coded.payload if coded else None) as image:
        if coded and not reencode and _fits(coded, image, max_side) and decodes(coded):
            return Encoded(coded.payload, coded.height, coded.width)
        return encode(image, max_side=max_side, quality=quality)


def _open(file: IO[bytes], *, bare: bytes | None = None) -> Image.Image:
    """Pillow's image, of any format that it decodes itself; of the `bare` file where the metadata are in the way."""
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError:
        raise
    except Exception:
        if bare is None:
            raise
        return Image.open(io.BytesIO(bare), formats=_formats())


def _fits(coded: Coded, image: Image.Image, max_side: int) -> bool:
    small = max(coded.height, coded.width) <= (max_side or MAX_STORED_SIDE)
    return coded.plain and small and _orientation(image) not in TURNS


def _orientation(image: Image.Image) -> int:
    """EXIF's (or XMP's) orientation; 1, upright, where it says nothing that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's reader of metadata raises nearly every kind on odd ones
        return 1


def encode(image: Image.Image, *, max_side: int, quality: int) -> Encoded:
    """Shrink to `max_side` pixels (0: never), turn upright, convert to RGB and compress.

    Raises whatever Pillow does for an image that cannot be decoded whole.
    """
    if max_side:
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the wanted side leaves the resizing filter enough to work with.
        image.draft(None, (2 * max_side, 2 * max_side))
    image.load()
    orientation = _orientation(image)  # now: TIFFs are upright once they are loaded
    image = to_rgb(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    longest = max(image.size)
    if max_side and longest > max_side:
        width, height = (max(1, round(side * max_side / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    elif longest > MAX_STORED_SIDE:
        raise ValueError(f"a side of {longest} pixels is more than JPEG holds: use max_side")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, comment=b"", exif=b"", xmp=b"")  # Pillow would pass some on
    return Encoded(buffer.getvalue(), image.height, image.width)


def _pixels(source: Pixels | Callable[[], Pixels]) -> Image.Image:
    value = source() if callable(source) else source
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"pixels must be uint8 (height, width[, 1, 3 or 4]), not {array.dtype} of shape {array.shape}")
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array)
