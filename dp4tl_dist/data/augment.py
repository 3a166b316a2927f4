"""Crops and flips drawn from a counter, not from a generator with a state.

Each draw is a hash of (seed, epoch, view, identifier, draw number). So a sample's crop does not depend on the batch it
is in, on the rank or the thread that decodes it, nor on where a run was resumed.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_TRIES = 10  # crops drawn before the central fallback, as torchvision and FFCV do
DRAW_TOP, DRAW_LEFT, DRAW_FLIP = 2 * NUM_TRIES, 2 * NUM_TRIES + 1, 2 * NUM_TRIES + 2

_MASK = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment and multipliers
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def _mix(key: NDArray[np.uint64], value: ArrayLike) -> NDArray[np.uint64]:
    """One splitmix64 round over `key` and `value`: for a fixed key, a permutation of the 64-bit values."""
    word = (key ^ np.asarray(value, dtype=np.uint64)) + _STEP
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLY_1
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLY_2
    return word ^ (word >> np.uint64(31))


def stream_key(*, seed: int, epoch: int, view: int) -> NDArray[np.uint64]:
    """What the hashes of one view of one epoch start from, uint64 (1,)."""
    key = np.zeros(1, dtype=np.uint64)
    for value in (seed & _MASK, epoch, view):
        key = _mix(key, value)
    return key


def uniform(
    identifiers: NDArray[np.integer], draws: ArrayLike, *, seed: int, epoch: int, view: int = 0
) -> NDArray[np.float64]:
    """float64 (n, number of draws) in [0, 1) for int identifiers (n,); a function of the arguments alone."""
    keys = _mix(stream_key(seed=seed, epoch=epoch, view=view), np.asarray(identifiers).astype(np.uint64))
    words = _mix(keys[:, None], np.atleast_1d(np.asarray(draws)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def train_boxes(
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    identifiers: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    min_scale: float,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    view: int = 0,
) -> NDArray[np.int32]:
    """Random resized crops: int32 (n, 4), each (top, left, height, width) in pixels and inside its image.

    The crop's share of the image's area is uniform in [min_scale, 1] and its log aspect ratio (width / height) uniform
    between those of `ratio`; the first of ten draws that fits is taken, else the largest central crop within `ratio`.
    """
    height = np.asarray(heights).astype(np.int64)  # uint16 would overflow in the area
    width = np.asarray(widths).astype(np.int64)
    draws = uniform(identifiers, np.arange(DRAW_LEFT + 1), seed=seed, epoch=epoch, view=view)  # (n, 22)
    area = (height * width)[:, None] * (min_scale + (1.0 - min_scale) * draws[:, 0:DRAW_TOP:2])  # (n, tries)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[:, 1:DRAW_TOP:2])
    crop_widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    crop_heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (crop_widths > 0) & (crop_widths <= width[:, None]) & (crop_heights > 0) & (crop_heights <= height[:, None])
    rows, first, found = np.arange(len(height)), fits.argmax(axis=1), fits.any(axis=1)
    crop_height, crop_width = crop_heights[rows, first], crop_widths[rows, first]
    top = np.floor(draws[:, DRAW_TOP] * (height - crop_height + 1)).astype(np.int64)
    left = np.floor(draws[:, DRAW_LEFT] * (width - crop_width + 1)).astype(np.int64)

    full_height = np.minimum(height, np.maximum(np.rint(width / ratio[0]), 1)).astype(np.int64)
    full_width = np.minimum(width, np.maximum(np.rint(height * ratio[1]), 1)).astype(np.int64)
    drawn = np.stack([top, left, crop_height, crop_width], axis=1)
    return np.where(found[:, None], drawn, _central(height, width, full_height, full_width)).astype(np.int32)


def train_flips(identifiers: NDArray[np.integer], *, seed: int, epoch: int, view: int = 0) -> NDArray[np.bool_]:
    """bool (n,): which images to mirror, each with probability one half."""
    return uniform(identifiers, DRAW_FLIP, seed=seed, epoch=epoch, view=view)[:, 0] < 0.5


def square_boxes(
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    identifiers: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
) -> NDArray[np.int32]:
    """The largest squares, somewhere along the longer side: int32 (n, 4), each (top, left, side, side)."""
    height, width = np.asarray(heights).astype(np.int64), np.asarray(widths).astype(np.int64)
    side = np.minimum(height, width)
    draws = uniform(identifiers, [DRAW_TOP, DRAW_LEFT], seed=seed, epoch=epoch)
    top = np.floor(draws[:, 0] * (height - side + 1)).astype(np.int64)
    left = np.floor(draws[:, 1] * (width - side + 1)).astype(np.int64)
    return np.stack([top, left, side, side], axis=1).astype(np.int32)


def centre_boxes(heights: NDArray[np.integer], widths: NDArray[np.integer], *, ratio: float) -> NDArray[np.int32]:
    """Central squares: int32 (n, 4), each (top, left, side, side); side = `ratio` x the shorter side, rounded down."""
    height, width = np.asarray(heights).astype(np.int64), np.asarray(widths).astype(np.int64)
    side = np.maximum((ratio * np.minimum(height, width)).astype(np.int64), 1)
    return _central(height, width, side, side).astype(np.int32)


def _central(
    height: NDArray[np.int64], width: NDArray[np.int64], crop_height: NDArray[np.int64], crop_width: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Boxes (n, 4) of the given sizes in the middle of their images."""
    return np.stack([(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1)
