"""The compiled kernel: payload bytes to a batch of pixels, cropped, resized and mirrored.

Images are resized bilinearly with antialiasing, as torchvision, Pillow and timm do: an output pixel is the mean of the
box's pixels under a triangle as wide as the shrinking asks for, and no narrower than two pixels of the box. Weights and
sums are integers: the same pixels on every processor. Pixels outside of the box have no part.

One file, for numba keeps machine code by the file of a function and does not look at the files of those that it calls.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dp4tl_dist.data.beton import RAW

LANES = 32  # bytes of a row that are mixed at a time
WEIGHT_BITS = 14  # of a weight of 1; more where weights are small, up to MAX_WEIGHT_BITS
MAX_WEIGHT_BITS = 22  # sums of 8-bit pixels times weights stay within int32
FRACTION_BITS = 7  # that rows keep between the two passes, which makes 15
SUM_BITS = 23  # of weights and fraction together: 255 << 23 is an int32

# By name, not by address, so that machine code can be kept on disk from run to run. `decode` gives it the name.
_imdecode = types.ExternalFunction(
    "dp4tl_imdecode",
    # source, its bytes, its height and width, output, crop height and width, offsets, scale, crop?, mirror?
    types.int32(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 6, *[types.int32] * 2),
)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk where numba finds a folder that it can write."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(nogil=True)(function)


# ---------------------------------------------------------------- vectors
# Loops over explicit vectors: what LLVM makes of scalar ones depends on its version and is several times slower.

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _shuffled(builder: Any, vector: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _splat(builder: Any, value: Any, count: int) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return _shuffled(builder, builder.insert_element(empty, value, _I32(0)), [0] * count)


def _two_rows(builder: Any, source: Any, stride: Any, weights: Any) -> Any:
    """Bytes of two rows, `stride` bytes apart, each times its weight: int32 x LANES."""
    two = builder.sext(_load(builder, weights, ir.VectorType(_I16, 2)), ir.VectorType(_I32, 2))
    rows = [_load(builder, address, ir.VectorType(_I8, LANES)) for address in (source, builder.add(source, stride))]
    wide = [builder.zext(row, ir.VectorType(_I32, LANES)) for row in rows]
    return builder.add(*[builder.mul(row, _shuffled(builder, two, [i] * LANES)) for i, row in enumerate(wide)])


def _two_pixels(builder: Any, source: Any, _: Any, weights: Any) -> Any:
    """Two RGB pixels of int16, each times its weight: int32 x 4, of which the last says nothing."""
    pixels = _shuffled(builder, _load(builder, source, ir.VectorType(_I16, 8)), [0, 3, 1, 4, 2, 5, 2, 5])
    two = builder.bitcast(_splat(builder, _load(builder, weights, _I32), 4), ir.VectorType(_I16, 8))
    terms = builder.mul(*[builder.sext(factor, ir.VectorType(_I32, 8)) for factor in (pixels, two)])
    return builder.add(_shuffled(builder, terms, [0, 2, 4, 6]), _shuffled(builder, terms, [1, 3, 5, 7]))


def _mixer(two: Callable[..., Any], step: int, lanes: int, element: Any) -> Any:
    """The function (source, stride, weights, pairs, half, shift, target) that writes (half + all terms) >> shift.

    The terms of a pair of weights int16 are `two`'s at source + pair x step x stride; lanes x element are written.
    """

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        source, stride, weights, pairs, half, shift, target = arguments
        total = cgutils.alloca_once_value(builder, _splat(builder, half, lanes))

        def add(pair: Any) -> None:
            place = builder.add(source, builder.mul(builder.mul(pair, _I64(step)), stride))
            terms = two(builder, place, stride, builder.add(weights, builder.mul(pair, _I64(4))))
            builder.store(builder.add(builder.load(total), terms), total)

        add(_I64(0))
        with builder.if_then(builder.icmp_signed(">", pairs, _I64(1))):
            add(_I64(1))
            with cgutils.for_range_slice(builder, _I64(2), pairs, _I64(1)) as (pair, _):
                add(pair)
        mixed = builder.ashr(builder.load(total), _splat(builder, shift, lanes))
        mixed = builder.trunc(mixed, ir.VectorType(element, lanes))
        builder.store(mixed, builder.inttoptr(target, mixed.type.as_pointer()), align=1)
        return context.get_dummy_value()

    def typed(_: Any, source: Any, stride: Any, weights: Any, pairs: Any, half: Any, shift: Any, target: Any) -> Any:
        return types.void(*[types.int64] * 4, *[types.int32] * 2, types.int64), generate

    return intrinsic(typed)


_mix_rows, _mix_pixels = _mixer(_two_rows, 2, LANES, _I16), _mixer(_two_pixels, 1, 4, _I8)


# ---------------------------------------------------------------- resizing


@_compiled
def _num_weights(size, wanted):  # type: ignore[no-untyped-def]
    """How many weights an output pixel has: an even number, at most one more than there are inputs."""
    count = min((2 * max(size, wanted) - 1) // wanted + 1, size)
    return count + count % 2


@_compiled
def _set_weights(size, starts, weights, mirrored):  # type: ignore[no-untyped-def]
    """The weights of size -> len(starts) pixels: output i is the sum over k of weights[i, k] * input[starts[i] + k];
    the other way round if mirrored.

    Returns the number of bits that a weight of 1 is shifted by. The weights of an output sum up to exactly that.
    """
    wanted, count = weights.shape
    width = 2 * max(size, wanted)  # of half of the triangle, in units of 1 / (2 wanted) input pixels
    bits = WEIGHT_BITS
    while bits < MAX_WEIGHT_BITS and (wanted << (bits - WEIGHT_BITS + 1)) <= size:
        bits += 1
    for i in range(wanted):
        centre = (2 * i + 1) * size
        first = max((centre - width - wanted) // (2 * wanted) + 1, 0)
        stop = min((centre + width - wanted - 1) // (2 * wanted) + 1, size)
        total = 0
        for j in range(first, stop):
            total += width - abs((2 * j + 1) * wanted - centre)
        place = wanted - 1 - i if mirrored else i
        starts[place] = max(min(first, size - count), 0)
        summed, before = 0, 0
        for k in range(count):
            j = starts[place] + k
            if first <= j < stop:
                summed += width - abs((2 * j + 1) * wanted - centre)
            now = ((summed << (bits + 1)) + total) // (2 * total)  # rounded sums: rounded weights would not sum up
            weights[place, k] = now - before
            before = now
    return bits


@_compiled
def resize(source, stride, height, width, output, mirrored):  # type: ignore[no-untyped-def]
    """Pixels at the address `source`, height x width x 3 bytes in rows `stride` bytes apart, to `output`, uint8
    (rows, columns, 3) and contiguous; mirrored after that.

    Memory at `source` must be readable for LANES bytes a row, and for `_num_weights(height, rows)` rows.
    """
    rows, columns = output.shape[0], output.shape[1]
    row_starts, row_weights = np.empty(rows, np.int64), np.empty((rows, _num_weights(height, rows)), np.int16)
    starts, weights = np.empty(columns, np.int64), np.empty((columns, _num_weights(width, columns)), np.int16)
    row_bits = _set_weights(height, row_starts, row_weights, False)
    bits = _set_weights(width, starts, weights, mirrored)
    fraction = min(FRACTION_BITS, SUM_BITS - bits)
    row_shift, row_half = np.int32(row_bits - fraction), np.int32(1 << (row_bits - fraction - 1))
    shift, half = np.int32(bits + fraction), np.int32(1 << (bits + fraction - 1))
    mixed = np.empty(3 * width + LANES + 8, np.int16)  # one row, with room for what is read beside a last pixel
    last = np.empty(3 * columns + 1, np.uint8)  # a row that may be followed by pixels of another image
    row_pairs, pairs = row_weights.shape[1] // 2, weights.shape[1] // 2
    # As int64: numba makes a float of the sum of an address, which is unsigned, and a signed number.
    line, place, beside = np.int64(mixed.ctypes.data), np.int64(output.ctypes.data), np.int64(last.ctypes.data)
    these, row_these = np.int64(weights.ctypes.data), np.int64(row_weights.ctypes.data)
    end = max(3 * width - LANES, 0)
    for row in range(rows):
        above = source + row_starts[row] * stride
        for x in range(0, end + LANES, LANES):
            x = min(x, end)
            _mix_rows(above + x, stride, row_these + 4 * row_pairs * row, row_pairs, row_half, row_shift, line + 2 * x)
        if row == rows - 1:
            place = beside
        for i in range(columns):
            _mix_pixels(line + 6 * starts[i], 12, these + 4 * pairs * i, pairs, half, shift, place + 3 * i)
        place += 3 * columns
    for column in range(columns):
        for channel in range(3):
            output[rows - 1, column, channel] = last[3 * column + channel]


@_compiled
def _is_jpeg_of_size(memory, start, stop, height, width):  # type: ignore[no-untyped-def]
    """Whether the frame header in memory[start:stop] says height x width. The decoder would leave others half drawn."""
    position = start + 2
    while position + 9 <= stop and memory[position] == 0xFF:
        marker = memory[position + 1]
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            found_height = np.int64(memory[position + 5]) * 256 + memory[position + 6]
            found_width = np.int64(memory[position + 7]) * 256 + memory[position + 8]
            return found_height == height and found_width == width
        if marker == 0xFF:  # a fill byte
            position += 1
        else:
            position += 2 + np.int64(memory[position + 2]) * 256 + memory[position + 3]
    return False


# Plain loops and addresses: array expressions would double the time that this takes to compile.
@_compiled
def decode_range(  # type: ignore[no-untyped-def]
    memory, offsets, sizes, modes, heights, widths, boxes, flips, output, status, start, stop
):
    """Fill output[start:stop] and status[start:stop]. See `decode.decode_batch`."""
    rows, columns = output.shape[1], output.shape[2]
    largest = 0
    for i in range(start, stop):
        largest = max(largest, 3 * (heights[i] + 1) * widths[i])
    buffer = np.empty(largest + LANES, dtype=np.uint8)  # with room for what `resize` may read
    for i in range(start, stop):
        height, width = heights[i], widths[i]
        top, left, bottom, right = boxes[i, 0], boxes[i, 1], boxes[i, 0] + boxes[i, 2], boxes[i, 1] + boxes[i, 3]
        if modes[i] == RAW:
            if sizes[i] != 3 * height * width:
                status[i] = 3
                continue
            source = np.int64(memory.ctypes.data) + offsets[i]
            if 3 * (right - left) < LANES or bottom - top < _num_weights(bottom - top, rows):
                for j in range(sizes[i]):  # there may be nothing readable beside the pixels
                    buffer[j] = memory[offsets[i] + j]
                source = np.int64(buffer.ctypes.data)
        else:
            if not _is_jpeg_of_size(memory, offsets[i], offsets[i] + sizes[i], height, width):
                status[i] = 1
                continue
            # Decoding to 1/8, 1/4 or 1/2 is cheap; twice the output's size leaves the filter enough to work with.
            scale = 8
            while scale > 1 and (boxes[i, 2] // scale < 2 * rows or boxes[i, 3] // scale < 2 * columns):
                scale //= 2
            data, source = np.int64(memory.ctypes.data) + offsets[i], np.int64(buffer.ctypes.data)
            if _imdecode(data, sizes[i], height, width, source, height, width, 0, 0, 1, scale, 0, 0) != 0:
                status[i] = 2
                continue
            height, width = (height + scale - 1) // scale, (width + scale - 1) // scale
            half = scale // 2
            top, bottom = (top + half) // scale, min((bottom + half) // scale, height)
            left, right = (left + half) // scale, min((right + half) // scale, width)
        corner = source + 3 * (top * width + left)
        resize(corner, 3 * width, bottom - top, right - left, output[i], flips[i])
        status[i] = 0
