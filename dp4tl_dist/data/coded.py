"""The coded image of a file without its metadata, byte by byte as it was. Nothing is decoded to find it.

`decodes` then asks the decoder that will read it in training.
"""

import ctypes
import functools
import importlib.util
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dp4tl_dist.data.beton_format import MAX_PIXELS

JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
SOF0, DHT, EOI, SOS, DQT, DRI, APP0, APP14, APP15, COM = (
    0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE, 0xEF, 0xFE,
)  # fmt: skip
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
MAX_KEPT_BYTES = 8 << 20
"""What any page of a large beton has room for."""
# In a scan 0xFF stands before 0 (a stuffed byte), a restart marker, or another 0xFF (a fill byte): all else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Coded(NamedTuple):
    """A JPEG without APPn and COM segments but JFIF's and Adobe's, and without what follows its end."""

    payload: bytes
    height: int
    width: int
    plain: bool
    """Baseline (Huffman, 8 bits), in grey or YCbCr, and small enough for any page."""


def jpeg_without_metadata(data: bytes) -> Coded | None:
    """None where the segments of `data` (bytes of a JPEG file) are not in order, or end before the image does."""
    kept, frames, jfif, adobe = [data[:2]], [], False, b""
    try:
        for marker, segment in _segments(data):
            is_jfif = marker == APP0 and segment[4:9] == b"JFIF\0"
            is_adobe = marker == APP14 and segment[4:9] == b"Adobe"
            jfif, adobe = jfif or is_jfif, segment[4:] if is_adobe else adobe
            if marker in FRAMES:
                frames.append((marker, segment[4:]))
            if is_jfif or is_adobe or marker in FRAMES or marker in (DHT, DQT, DRI, SOS, EOI):
                kept.append(segment)
            elif marker != COM and not APP0 <= marker <= APP15:
                return None
        (kind, frame), *more = frames
        precision, height, width, components = struct.unpack(">BHHB", frame[:6])
    except (ValueError, struct.error):
        return None
    payload = b"".join(kept)
    grey_or_ycbcr = components == 1 or (components == 3 and _is_ycbcr(frame, jfif=jfif, adobe=adobe))
    plain = kind == SOF0 and not more and precision == 8 and grey_or_ycbcr and len(payload) <= MAX_KEPT_BYTES
    return Coded(payload, height, width, plain)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, segment) up to the end of the image; the data of a scan belong to its header. Raises ValueError where
    there is anything else."""
    position = 2
    while True:
        start = position
        while data[position : position + 1] == b"\xff":  # the marker's own, and fill bytes
            position += 1
        if position == start or position >= len(data):
            raise ValueError("no marker where one must be")
        marker, position = data[position], position + 1
        if marker == EOI:
            yield marker, b"\xff\xd9"
            return
        stop = position + int.from_bytes(data[position : position + 2], "big")
        if not position + 2 <= stop <= len(data):
            raise ValueError("a segment that is cut off")
        if marker == SOS:
            end = _END_OF_SCAN.search(data, stop)
            if end is None:
                raise ValueError("a scan that is cut off")
            stop = end.start()
        yield marker, b"\xff" + data[position - 1 : stop]
        position = stop


def _is_ycbcr(frame: bytes, *, jfif: bool, adobe: bytes) -> bool:
    """Whether every reader takes these three components for YCbCr."""
    if adobe:
        return adobe[11:12] == b"\x01"
    return jfif or frame[6:15:3] != b"RGB"


def png_without_metadata(data: bytes) -> bytes:
    """`data` (bytes of a PNG file) without its ancillary chunks but eXIf, up to where chunks can be told apart."""
    kept, position = [data[:8]], 8
    while position + 12 <= len(data):
        size, name = struct.unpack(">I4s", data[position : position + 8])
        if not name[0] & 32 or name == b"eXIf":  # critical chunks are in capitals
            kept.append(data[position : position + 12 + size])
        position += 12 + size
    return b"".join(kept)


def avif_without_exif(data: bytes) -> bytes:
    """`data` (bytes of an AVIF file) with its EXIF directory empty: a box of its own says how the image is turned."""
    return re.sub(rb"(II\*\0\x08\0\0\0|MM\0\*\0\0\0\x08)..", rb"\1\0\0", data, flags=re.DOTALL)


def decodes(coded: Coded) -> bool:
    """Whether FFCV's decoder reads all of it without complaint, in the size that its header says."""
    if not 0 < coded.height * coded.width <= MAX_PIXELS:
        return False
    pixels = ctypes.create_string_buffer(3 * coded.height * coded.width)
    sides = (coded.height, coded.width)
    return bool(_imdecode()(coded.payload, len(coded.payload), *sides, pixels, *sides, 0, 0, 1, 1, False, False) == 0)


@functools.cache
def _imdecode() -> Callable[..., Any]:
    """libffcv's decoder. Its package is not imported: that takes seconds, and a worker has no use for torch."""
    package = importlib.util.find_spec("ffcv")
    assert package is not None and package.origin is not None
    (library,) = Path(package.origin).parent.glob("_libffcv*")
    function = ctypes.CDLL(str(library)).imdecode
    # source, its bytes, its height and width, output, crop height and width, offsets, scale, crop?, mirror?
    function.argtypes = [
        ctypes.c_char_p, ctypes.c_uint64, *[ctypes.c_uint32] * 2, ctypes.c_void_p, *[ctypes.c_uint32] * 6,
        *[ctypes.c_bool] * 2,
    ]  # fmt: skip
    return function
