"""Betons: seeds of every kind, mutations that know the tables and JPEG, and decoding between pages of no access."""

import ctypes
import io
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from fuzz_mutate import mutate_bytes, mutate_json, packed
from numpy.typing import NDArray
from PIL import Image

from dp4tl_dist.data.beton import JPEG, RAW, Beton, BetonWriter, open_beton
from dp4tl_dist.data.beton_format import ALLOCATION, FIELD, HEADER, metadata_dtype
from dp4tl_dist.data.crops import BadSampleError
from dp4tl_dist.data.decode import decode_batch
from dp4tl_dist.data.loader import BetonLoader, CentreView, TrainView

Files = dict[str, bytes]
NAME = "x.beton"
CLASSES = ["ant", "bee", "cat"]
SIDE = 16
MOST = 12
"""Samples that are decoded of one file; the seeds have fewer."""
LOADER_EVERY = 16
"""One file in so many also goes through the loader itself, with its threads and its two ways to read pages."""

# ---------------------------------------------------------------- seeds


def payload(index: int, height: int, width: int) -> tuple[bytes, int]:
    """One image and its mode: baseline, optimised, progressive, grey, without subsampling, CMYK-free, or raw."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 7 + index, columns * 5, (rows * columns) ^ index], -1).astype(np.uint8)
    if index % 6 == 5:
        return pixels.tobytes(), RAW
    options = (
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"optimize": True, "quality": 30},
        {"restart_marker_blocks": 1},
    )
    target = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert("L") if index % 7 == 6 else image).save(target, "JPEG", **options[index % 6])
    return target.getvalue(), JPEG


def seeds(folder: Path) -> list[Files]:
    """Files of the real writer: with a sidecar, without one, of one sample, and with an image in the last place."""
    found = []
    for count, first in ((8, 0), (1, 0), (3, 4)):
        path = folder / NAME
        with BetonWriter(path, capacity=count) as writer:
            for i in range(first, first + count):
                height, width = 17 + 9 * i, 23 + 5 * i
                content, mode = payload(i, height, width)
                writer.add(content, height=height, width=width, label=i % 3, identifier=100 + i, mode=mode)
            writer.finish(CLASSES, {"seed": 0, "kind": "dataset"})
        whole = {NAME: path.read_bytes(), f"{NAME}.json": path.with_name(f"{NAME}.json").read_bytes()}
        found += [{NAME: whole[NAME]}, {NAME: whole[NAME]}, whole]
    return found


# ---------------------------------------------------------------- mutations


@lru_cache(maxsize=16)
def layout(content: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """(offset, bytes) of every integer of the tables, of every payload, and of the two pointers to each payload."""
    header = np.frombuffer(content, HEADER, 1)[0]
    count, tail = int(header["num_samples"]), int(header["allocation"])
    kind = metadata_dtype([2, 1, 1])
    numbers = [(0, 2), (2, 2), (4, 4), (8, 8), (16, 8)]
    numbers += [(HEADER.itemsize + i * FIELD.itemsize, 1) for i in range(3)]
    start = HEADER.itemsize + 3 * FIELD.itemsize
    inside = [(0, 1), (1, 2), (3, 2), (5, 8)]
    assert kind.fields is not None
    columns = [*inside, *((kind.fields[name][1], 8) for name in ("f1", "f2"))]
    rows = range(start, start + count * kind.itemsize, kind.itemsize)
    numbers += [(row + offset, width) for row in rows for offset, width in columns]
    numbers += [(tail + i * 8, 8) for i in range(3 * count)]
    entries = np.frombuffer(content, ALLOCATION, count, tail)
    spans = [(int(entry["pointer"]), int(entry["size"])) for entry in entries]
    pointers = [(row + 5, tail + i * ALLOCATION.itemsize + 8) for i, row in enumerate(rows)]
    return numbers, spans, pointers


def mutate(rng: Random, files: Files, others: list[Files]) -> Files:
    """Another beton, or another sidecar beside it."""
    sidecar = f"{NAME}.json"
    if sidecar in files:
        return {**files, sidecar: mutate_json(rng, files[sidecar], [other[NAME][:5000] for other in others])}
    seed = files[NAME]
    content = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, content, seed)
    if rng.random() < 0.06:
        spliced = [other[NAME] for other in others]
        return {NAME: mutate_bytes(rng, bytes(content), spliced)}
    return {NAME: bytes(content)}


def _number(rng: Random, content: bytearray, seed: bytes) -> None:
    at, width = rng.choice(layout(seed)[0])
    if rng.random() < 0.5:
        content[at : at + width] = packed(rng, width)
    else:  # near what it was, or what a neighbour says
        value = int.from_bytes(content[at : at + width], "little") + rng.choice((-1, 1, 8, -8, 4096, len(seed)))
        content[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def _pointer(rng: Random, content: bytearray, seed: bytes) -> None:
    """Both tables say another place."""
    numbers, spans, pointers = layout(seed)
    start, size = rng.choice(spans)
    inside, near_end = start + rng.randrange(size), numbers[-1][0] + 8 - rng.randrange(2 * size)
    place = rng.choice((inside, near_end, 0, 3200, len(seed), 1 << 21, rng.getrandbits(64)))
    for at in rng.choice(pointers):
        content[at : at + 8] = struct.pack("<Q", place % 2**64)


def _size(rng: Random, content: bytearray, seed: bytes) -> None:
    _, spans, pointers = layout(seed)
    i = rng.randrange(len(spans))
    size = rng.choice((1, 2, 3, 4, 9, rng.randint(1, spans[i][1]), spans[i][1] - 1, spans[i][1] + 1, spans[i][1] + 24))
    at = pointers[i][1] + 8
    content[at : at + 8] = struct.pack("<Q", max(0, size))


def _sides(rng: Random, content: bytearray, seed: bytes) -> None:
    """Metadata and the JPEG's own header agree on other sides."""
    _, spans, pointers = layout(seed)
    i = rng.randrange(len(spans))
    height, width = (rng.choice((0, 1, 2, 7, 8, 9, 64, 1000, 16000, 65535)) for _ in range(2))
    row = pointers[i][0] - 5
    content[row + 1 : row + 5] = struct.pack("<HH", width, height)
    start, size = spans[i]
    for mark in (b"\xff\xc0", b"\xff\xc2"):
        at = content.find(mark, start, start + size)
        if at > 0:
            content[at + 5 : at + 9] = struct.pack(">HH", height, width)


def _mode(rng: Random, content: bytearray, seed: bytes) -> None:
    """A JPEG called raw or the other way round, with sides that may fit."""
    _, spans, pointers = layout(seed)
    i = rng.randrange(len(spans))
    row = pointers[i][0] - 5
    content[row] ^= 1
    size = spans[i][1] - spans[i][1] % 3
    content[row + 1 : row + 5] = struct.pack("<HH", size // 3, 1)
    content[pointers[i][1] + 8 : pointers[i][1] + 16] = struct.pack("<Q", size)


RUNS = (b"\x00", b"\xff", b"\xff\xd9", b"\xff\xc0", b"\xff\xff", b"\xff\x00", b"\xff\xd0", b"\xff\xda")


def _payload(rng: Random, content: bytearray, seed: bytes) -> None:
    """Damage inside one payload: anywhere, or right after a marker."""
    start, size = rng.choice(layout(seed)[1])
    marks = [at for at in range(start, start + size - 4) if content[at] == 0xFF and content[at + 1] not in (0, 0xFF)]
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.choice(marks) + rng.randrange(12) if marks and rng.random() < 0.6 else start + rng.randrange(size)
        run = rng.choice((*RUNS, *map(rng.randbytes, (1, 4, 60))))
        run = run[: max(0, start + size - at)]
        content[at : at + len(run)] = run


def _exchange(rng: Random, content: bytearray, seed: bytes) -> None:
    """The payload of one image where another stands."""
    spans = layout(seed)[1]
    (start, size), (other, length) = rng.choice(spans), rng.choice(spans)
    piece = content[other : other + min(length, size)]
    content[start : start + len(piece)] = piece


def _fewer(rng: Random, content: bytearray, seed: bytes) -> None:
    """Fewer samples than there were, in a file of the right length."""
    count, tail = struct.unpack_from("<QQ", seed, 8)
    left = rng.randint(0, count)
    content[8:16] = struct.pack("<Q", left)
    del content[tail + left * ALLOCATION.itemsize :]


MUTATIONS = (
    _number,
    _number,
    _number,
    _pointer,
    _size,
    _size,
    _sides,
    _mode,
    _payload,
    _payload,
    _payload,
    _exchange,
    _fewer,
)

# ---------------------------------------------------------------- guarded memory


class Guarded:
    """Slots of memory with a page of no access on both sides: a read or write past either end is a SIGSEGV."""

    PROT_NONE = 0

    def __init__(self, slots: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.slots, self.size = slots, -(-size // page) * page
        self.stride = self.size + page
        self.map = mmap.mmap(-1, page + slots * self.stride)
        self.memory = np.frombuffer(self.map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for slot in range(slots + 1):
            address = ctypes.c_void_p(self.memory.ctypes.data + slot * self.stride)
            assert libc.mprotect(address, page, self.PROT_NONE) == 0

    def place(self, slot: int, size: int, *, at_end: bool) -> int:
        """The offset in `memory` of `size` bytes that touch one of the slot's guards."""
        start = mmap.PAGESIZE + slot * self.stride
        return start + self.size - size if at_end else start


@lru_cache(maxsize=1)
def arena(process: int) -> tuple[Guarded, Guarded, ThreadPoolExecutor]:
    """Made once in each process (threads do not survive a fork): payloads, outputs, and the thread that decodes."""
    return Guarded(MOST, 3 << 20), Guarded(1, MOST * SIDE * SIDE * 3), ThreadPoolExecutor(1)


def decoded(beton: Beton, view: TrainView | CentreView, *, at_end: bool) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Pixels and status of the first samples, each payload alone between guards."""
    sources, targets, pool = arena(os.getpid())
    fits = np.flatnonzero(beton.sizes <= sources.size)[:MOST]
    offsets = np.array(
        [sources.place(slot, int(beton.sizes[i]), at_end=at_end) for slot, i in enumerate(fits)], np.int64
    )
    for offset, i in zip(offsets, fits, strict=True):
        content = beton.payload(int(i))
        sources.memory[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
    boxes, flips = view.draw(replace(beton, pointers=offsets.astype(np.uint64)), fits)
    size = len(fits) * SIDE * SIDE * 3
    start = targets.place(0, size, at_end=at_end)
    output = targets.memory[start : start + size].reshape(len(fits), SIDE, SIDE, 3)
    output[:] = 0 if at_end else 255
    perturb(0x5A if at_end else 0xA5)
    heights, widths = beton.heights[fits].astype(np.int64), beton.widths[fits].astype(np.int64)
    status = decode_batch(
        sources.memory, offsets, beton.sizes[fits].astype(np.int64), beton.modes[fits], heights, widths, boxes, flips,
        output, pool=pool, num_workers=1,
    )  # fmt: skip
    perturb(0)
    return output.copy(), status


def perturb(byte: int) -> None:
    """Have malloc fill what it gives with another byte, so that pixels that nobody wrote differ from call to call."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-6, byte)  # M_PERTURB


# ---------------------------------------------------------------- reading


def read(folder: Path) -> Iterator[None]:
    """Open, check what the tables promise, decode. Yields between its parts, so that each has its own time limit."""
    path = folder / NAME
    size = path.stat().st_size
    beton = open_beton(path)
    columns = (beton.labels, beton.identifiers, beton.heights, beton.widths, beton.modes, beton.pointers, beton.sizes)
    assert {len(column) for column in columns} == {beton.num_samples} and beton.num_samples > 0
    assert beton.labels.min() >= 0 and beton.labels.max() < beton.num_classes
    assert all(int(p) + int(s) <= size for p, s in zip(beton.pointers, beton.sizes, strict=True))
    assert len(np.unique(beton.identifiers)) == beton.num_samples and beton.identifiers.min() >= 0
    assert all(len(beton.payload(i)) == beton.sizes[i] for i in range(min(MOST, beton.num_samples)))
    yield
    bad = False
    for view in (CentreView(SIDE), TrainView(SIDE, seed=1, epoch=2)):
        passes = []
        for at_end in (True, False):
            passes.append(decoded(beton, view, at_end=at_end))
            yield
        (first, status), (second, again) = passes
        assert np.array_equal(status, again), f"status {status} and then {again}"
        good = status == 0
        bad |= not good.all()
        assert np.array_equal(first[good], second[good]), "pixels that were not in the file"
    if int.from_bytes(beton.fingerprint[:2].encode(), "big") % LOADER_EVERY == 0:
        for os_cache in (True, False):
            loader = BetonLoader(beton, os_cache=os_cache)
            for batch in loader.epoch([np.arange(min(MOST, beton.num_samples))], CentreView(SIDE)):
                assert batch.images.shape[1:] == (3, SIDE, SIDE)
            yield
    if bad:
        raise BadSampleError("payloads that cannot be decoded")
