"""Antialiased bilinear resizing: exactly what a slow form of it gives, and what torchvision and Pillow give."""

import ctypes
import functools
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from dp4tl_dist.data import kernel
from dp4tl_dist.data.beton import RAW
from dp4tl_dist.data.decode import decode_batch

Box = tuple[int, int, int, int]  # top, left, height, width
POOL = ThreadPoolExecutor(2)


def resized(
    images: list[NDArray[np.uint8]], boxes: list[Box], rows: int, columns: int, flips: list[bool], num_workers: int = 1
) -> NDArray[np.uint8]:
    """Raw images through the kernel; right behind the last one is memory that nobody may read."""
    size, page = sum(image.size for image in images), mmap.PAGESIZE
    reserved = -(-size // page) * page
    region = mmap.mmap(-1, reserved + page)
    whole = np.frombuffer(region, np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + reserved), page, mmap.PROT_READ * 0) == 0
    memory = whole[reserved - size : reserved]
    memory[:] = np.concatenate([image.reshape(-1) for image in images])
    sizes = np.array([image.size for image in images])
    output = np.full((len(images) + 1, rows, columns, 3), 7, np.uint8)
    status = decode_batch(
        memory, np.cumsum(sizes) - sizes, sizes, np.full(len(images), RAW, np.uint8),
        np.array([len(image) for image in images]), np.array([image.shape[1] for image in images]),
        np.array(boxes, np.int32), np.array(flips), output[:-1], pool=POOL, num_workers=num_workers,
    )  # fmt: skip
    assert not status.any() and (output[-1] == 7).all()
    return output[:-1]


@functools.cache
def weights_of(size: int, wanted: int) -> tuple[NDArray[np.int64], int]:
    """The integer weights (wanted, size) and the bits of a weight of 1, by the definition."""
    support, bits = max(Fraction(size, wanted), Fraction(1)), 14
    while bits < 22 and size >= wanted * 2 ** (bits - 13):
        bits += 1
    table = np.zeros((wanted, size), np.int64)
    for i in range(wanted):
        centre = (i + Fraction(1, 2)) * size / wanted
        triangle = [max(0, 1 - abs(j + Fraction(1, 2) - centre) / support) for j in range(size)]
        total, summed, before = sum(triangle), Fraction(0), 0
        for j in range(size):
            summed += triangle[j]
            now = int(summed / total * 2**bits + Fraction(1, 2))
            table[i, j], before = now - before, now
    return table, bits


def slow(box: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    (vertical, row_bits), (horizontal, bits) = weights_of(box.shape[0], rows), weights_of(box.shape[1], columns)
    fraction = min(7, 23 - bits)
    shift = row_bits - fraction
    mixed = (np.einsum("rh,hwc->rwc", vertical, box.astype(np.int64)) + (1 << (shift - 1))) >> shift
    shift = bits + fraction
    return ((np.einsum("cw,rwd->rcd", horizontal, mixed) + (1 << (shift - 1))) >> shift).astype(np.uint8)


def cases(count: int, *, largest: int, seed: int) -> Iterator[tuple[NDArray[np.uint8], Box, int, int]]:
    """Noise, or black and white alone, with a box in it and the size that it gets: from 1 to `largest` a side."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width, rows, columns = np.floor(2 ** rng.uniform(0, np.log2(largest + 1), 4)).astype(int).tolist()
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        top, left = rng.integers(0, height), rng.integers(0, width)
        box = (int(top), int(left), int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        whole = (0, 0, height, width)
        yield (image > 127).astype(np.uint8) * 255 if i % 3 == 0 else image, whole if i % 2 else box, rows, columns


def cut(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image[box[0] : box[0] + box[2], box[1] : box[1] + box[3]])


def test_equal_to_the_slow_form() -> None:
    for i, (image, box, rows, columns) in enumerate(cases(100, largest=24, seed=1)):
        expected = slow(cut(image, box), rows, columns)
        found = resized([image, image], [box, box], rows, columns, [False, True], num_workers=1 + i % 2)
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], expected[:, ::-1])


def test_within_one_level_of_torchvision_and_pillow() -> None:
    for image, box, rows, columns in cases(250, largest=500, seed=2):
        (found,) = resized([image], [box], rows, columns, [False])
        crop = cut(image, box)
        tensor = torch.from_numpy(crop).permute(2, 0, 1)
        theirs = functional.resize(tensor, [rows, columns], antialias=True).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - theirs).max() <= 1
        pillows = np.asarray(Image.fromarray(crop).resize((columns, rows), Image.Resampling.BILINEAR))
        assert np.abs(found.astype(int) - pillows).max() <= 1


@pytest.mark.parametrize(
    ("size", "wanted"), [((1, 1), (50, 37)), ((3000, 40), (2, 8)), ((5, 4000), (9, 1)), ((2500, 2500), (16, 1))]
)
def test_extreme_sizes(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    (found,) = resized([image], [(0, 0, *size)], *wanted, [False])
    pillows = np.asarray(Image.fromarray(image).resize(wanted[::-1], Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - pillows).max() <= 1


def test_weights_sum_up_exactly_and_fit_16_bits() -> None:
    rng = np.random.default_rng(4)
    pairs = [(size, wanted) for size in range(1, 40) for wanted in range(1, 40)]
    pairs += [tuple(np.floor(2 ** rng.uniform(0, 16, 2)).astype(int).clip(1, 65535).tolist()) for _ in range(60)]
    for size, wanted in [*pairs, (65535, 1), (65535, 2), (1, 65535)]:
        count = kernel._num_weights(size, wanted)
        starts, weights = np.zeros(wanted, np.int64), np.zeros((wanted, count), np.int16)
        bits = kernel._set_weights(size, starts, weights, False)
        assert weights.min() >= 0 and (weights.sum(axis=1, dtype=np.int64) == 1 << bits).all() and bits <= 22
        assert count % 2 == 0 and starts.min() >= 0 and (starts + count).max() <= size + size % 2


def test_flat_images_stay_as_they_are_and_ramps_have_no_steps() -> None:
    for level in (0, 1, 128, 255):
        image = np.full((23, 31, 3), level, np.uint8)
        assert (resized([image], [(1, 2, 20, 27)], 50, 9, [False]) == level).all()
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 32, 3)).copy()
    (found,) = resized([ramp], [(0, 0, 32, 32)], 224, 224, [False])
    steps = np.diff(found[0, :, 0].astype(int))
    assert set(steps[4:-4].tolist()) == {1, 2}  # 8 levels over 7 pixels: repeated pixels would give 0 and 8
    assert (found == found[0]).all()


def test_pixels_outside_of_a_box_have_no_part() -> None:
    rng = np.random.default_rng(5)
    for image, box, rows, columns in cases(40, largest=90, seed=6):
        other = rng.integers(0, 256, image.shape, dtype=np.uint8)
        other[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = cut(image, box)
        one, two = resized([image, other], [box, box], rows, columns, [False, False])
        np.testing.assert_array_equal(one, two)
