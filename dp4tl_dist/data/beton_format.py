"""The FFCV v2 dataset file (.beton) as numpy dtypes, and the checks that a foreign or damaged file must fail.

    header | field table | metadata (one row a sample) | gap | pages of payloads | allocation table (to the end)

Pages start at multiples of `page_size` and no payload crosses a page.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("allocation", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

JPEG, RAW = 0, 1
TYPES = {1: np.dtype("<i8"), 2: IMAGE}
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 1 << 21, 1 << 31
MAX_CLASSES = 1 << 17
"""Bounds what a damaged label can make us allocate; the largest label sets in use have about 20,000 classes."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit, so that no written image is above it. It bounds what a payload of a few bytes that claims large
sides can make a decoding thread allocate: half a gigabyte."""


def metadata_dtype(fields: Iterable[int]) -> np.dtype[Any]:
    """One row of the metadata, for field types in file order."""
    return np.dtype([(f"f{i}", TYPES[kind]) for i, kind in enumerate(fields)], align=True)


def sidecar(path: Path) -> Path:
    """The JSON file beside a beton that holds its class names and meta."""
    return path.with_name(path.name + ".json")


def digest(*parts: Any) -> str:
    """The fingerprint of a file with these tables."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.tobytes())
    return digest.hexdigest()


def damaged(path: Path, what: str) -> NoReturn:
    raise UserError(f"{path} is damaged or not a beton ({what}): copy or write it again")


def read_array(handle: IO[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    return np.frombuffer(handle.read(count * dtype.itemsize), dtype, count)


def read_head(path: Path, handle: IO[bytes], size: int) -> tuple[Any, NDArray[Any]]:
    """Header and field table, with every count and offset checked against the file's size."""
    if size < HEADER.itemsize:
        damaged(path, f"{size} bytes")
    header = read_array(handle, HEADER, 1)[0]
    version, num_fields, page_size, num_samples, allocation = (int(value) for value in header)
    if version != VERSION:
        raise UserError(f"{path} is not a beton of version {VERSION} (it says {version}): write it with `dp4tl write`")
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        damaged(path, f"page size {page_size}")
    if num_fields not in (2, 3):
        raise UserError(f"{path} has {num_fields} fields: only image, label and an optional identifier are supported")
    if HEADER.itemsize + num_fields * FIELD.itemsize > size:
        damaged(path, "the field table is cut off")
    table = read_array(handle, FIELD, num_fields)
    kinds = table["type"].tolist()
    if any(kind not in TYPES for kind in kinds):
        raise UserError(f"{path} has fields of types {kinds}: only an image (2) and integers (1) are supported")
    if num_samples == 0:
        raise UserError(f"{path} has no samples: write it again from a folder with images")
    if handle.tell() + num_samples * metadata_dtype(kinds).itemsize > allocation:
        damaged(path, f"{num_samples} samples do not fit before its allocation table")
    if allocation + num_samples * ALLOCATION.itemsize != size:
        damaged(path, f"{size} bytes, and {num_samples} samples need {allocation + num_samples * ALLOCATION.itemsize}")
    return header, table


def find_roles(path: Path, table: NDArray[Any]) -> tuple[tuple[str, ...], str, str, str | None]:
    """Field names, and the metadata columns of image, label and (if there) identifier."""
    names = tuple(row.tobytes().split(b"\0")[0].decode("ascii", "replace") for row in table["name"])
    images = [f"f{i}" for i, kind in enumerate(table["type"]) if kind == 2]
    numbers = {name: f"f{i}" for i, (name, kind) in enumerate(zip(names, table["type"], strict=True)) if kind == 1}
    identifier = numbers.pop("identifier", None)
    if len(images) != 1 or len(numbers) != 1 or len(set(names)) != len(names):
        raise UserError(
            f"{path} has the fields {', '.join(map(repr, names))}: one image, one integer label and at most "
            "an integer called 'identifier' are supported"
        )
    return names, images[0], next(iter(numbers.values())), identifier


def payload_sizes(
    path: Path, columns: dict[str, NDArray[Any]], allocation: NDArray[Any], *, start: int, header: Any
) -> NDArray[np.uint64]:
    """Payload sizes uint64 (samples,), once every payload is proved to lie alone, inside one page, inside the file."""
    count, page_size, end = len(allocation), int(header["page_size"]), int(header["allocation"])
    order = np.argsort(allocation["sample"], kind="stable")
    if not np.array_equal(allocation["sample"][order], np.arange(count, dtype=np.uint64)):
        damaged(path, "its allocation table does not name every sample once")
    pointers, sizes = allocation["pointer"][order], allocation["size"][order]
    # Sizes are bounded before they are added, so that no sum wraps around.
    if sizes.min() == 0 or sizes.max() > page_size or pointers.min() < start or pointers.max() > end:
        damaged(path, "payloads lie outside its data region")
    ends = pointers + sizes
    if ends.max() > end or ((pointers // page_size) != ((ends - np.uint64(1)) // page_size)).any():
        damaged(path, "payloads cross a page or the end of its data region")
    by_place = np.argsort(pointers)
    if (ends[by_place][:-1] > pointers[by_place][1:]).any() or not np.array_equal(pointers, columns["pointer"]):
        damaged(path, "payloads overlap, or its two tables disagree")
    area = columns["height"].astype(np.uint64) * columns["width"]
    raw = columns["mode"] == RAW
    if columns["mode"].max() > RAW or area.min() == 0 or (raw & (sizes != area * np.uint64(3))).any():
        damaged(path, "image modes or sides that do not fit the payloads")
    if area.max() > MAX_PIXELS:
        damaged(path, f"an image of {area.max()} pixels, and the most is {MAX_PIXELS}")
    return sizes
