"""Payload bytes to pixels: one compiled kernel crops, resizes and mirrors a batch, by libffcv's decoder and resizer.

This is the door to FFCV (`loader.py` takes its parts from here). FFCV is imported with numba's JIT off: importing it
otherwise compiles helpers that nothing here uses, which takes seconds in every process.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numba.typed  # before the JIT goes off: its own functions must be compiled ones
import numpy as np
import torch
from numba import types
from numpy.typing import NDArray

from dp4tl_dist.data.beton import RAW
from dp4tl_dist.data.rows import DIFFERS


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """numba's JIT off, and torch's number of threads kept: FFCV sets it to one when it is imported."""
    jit_off, num_threads = numba.config.DISABLE_JIT, torch.get_num_threads()
    numba.config.DISABLE_JIT = True
    try:
        yield
    finally:
        numba.config.DISABLE_JIT = jit_off
        torch.set_num_threads(num_threads)


with _quiet_import():
    from ffcv.fields import RGBImageField
    from ffcv.libffcv import lib
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
    from ffcv.memory_managers.os_cache import OSCacheContext
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage

__all__ = [
    "AllocationQuery", "Compiler", "EpochIterator", "Graph", "OSCacheContext", "OSCacheManager", "Operation",
    "PipelineSpec", "ProcessCacheManager", "RGBImageField", "ToDevice", "ToTensor", "ToTorchImage", "decode_batch",
]  # fmt: skip

STATUS = {
    1: "its header is not that of a JPEG of the size that the metadata gives",
    2: "its JPEG data are damaged",
    3: "its raw pixels are not height x width x 3 bytes",
    4: DIFFERS,
}
CHUNK = 16  # images a thread takes at a time: small, for images differ in size, and large against a call's cost

# The kernel finds C functions by name, not by address, so that its machine code can be kept on disk from run to run.
# The names are our own, for many libraries have a `resize`.
for _name in ("imdecode", "resize"):
    llvmlite.binding.add_symbol(f"dp4tl_{_name}", ctypes.cast(lib[_name], ctypes.c_void_p).value)
_imdecode = types.ExternalFunction(
    "dp4tl_imdecode",
    # source, its bytes, its height and width, output, crop height and width, offsets, scale, crop?, mirror?
    types.int32(types.uintp, types.uint64, *[types.uint32] * 2, types.uintp, *[types.uint32] * 6, *[types.int32] * 2),
)
_resize = types.ExternalFunction("dp4tl_resize", types.void(*[types.int64] * 11))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk where numba finds a folder that it can write."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(nogil=True)(function)


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
def _decode_range(  # type: ignore[no-untyped-def]
    memory, offsets, sizes, modes, heights, widths, boxes, flips, output, status, start, stop
):
    """Fill output[start:stop] and status[start:stop]. See `decode_batch`."""
    rows, columns = output.shape[1], output.shape[2]
    largest = 0
    for i in range(start, stop):
        largest = max(largest, 3 * heights[i] * widths[i])
    buffer = np.empty(largest, dtype=np.uint8)
    for i in range(start, stop):
        height, width = heights[i], widths[i]
        top, left, bottom, right = boxes[i, 0], boxes[i, 1], boxes[i, 0] + boxes[i, 2], boxes[i, 1] + boxes[i, 3]
        source = memory.ctypes.data + offsets[i]
        if modes[i] == RAW:
            if sizes[i] != 3 * height * width:
                status[i] = 3
                continue
        else:
            if not _is_jpeg_of_size(memory, offsets[i], offsets[i] + sizes[i], height, width):
                status[i] = 1
                continue
            # Decoding straight to 1/8, 1/4 or 1/2 is cheap; other fractions cost more than a full decode.
            scale = 8
            while scale > 1 and (boxes[i, 2] // scale < rows or boxes[i, 3] // scale < columns):
                scale //= 2
            if _imdecode(source, sizes[i], height, width, buffer.ctypes.data, height, width, 0, 0, 1, scale, 0, 0) != 0:
                status[i] = 2
                continue
            source = buffer.ctypes.data
            height, width = (height + scale - 1) // scale, (width + scale - 1) // scale
            half = scale // 2
            top, bottom = (top + half) // scale, min((bottom + half) // scale, height)
            left, right = (left + half) // scale, min((right + half) // scale, width)
        target = output.ctypes.data + i * rows * columns * 3
        _resize(0, source, height, width, top, bottom, left, right, target, rows, columns)
        if flips[i]:
            for row in range(rows):
                for column in range(columns // 2):
                    for channel in range(3):
                        other = output[i, row, columns - 1 - column, channel]
                        output[i, row, columns - 1 - column, channel] = output[i, row, column, channel]
                        output[i, row, column, channel] = other
        status[i] = 0


def decode_batch(
    memory: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    modes: NDArray[np.uint8],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    output: NDArray[np.uint8],
    *,
    pool: Executor,
    num_workers: int,
    check: Callable[[int, memoryview], bool] | None = None,
) -> NDArray[np.int32]:
    """Decode payload i, crop it to boxes[i], resize it into output[i] and mirror it if flips[i].

    Payload i is memory[offsets[i]:][:sizes[i]], with memory uint8 (bytes,); modes are 0 (JPEG) or 1 (raw); boxes (n, 4)
    are (top, left, height, width) in pixels, inside the image; output (n, rows, columns, 3) is contiguous.
    Offsets, sizes and boxes must be valid: they are not checked again. check(i, payload i) says whether a payload that
    can be decoded is the right one; it is called by several threads.
    Returns status int32 (n,): 0, or a key of STATUS. The pixels do not depend on `num_workers`.
    """
    memory = np.asarray(memory).view()
    memory.flags.writeable = False  # one compiled version serves mapped files and page buffers
    status = np.zeros(len(output), dtype=np.int32)
    arguments = (memory, offsets, sizes, modes, heights, widths, boxes, flips, output, status)
    chunk = max(1, min(CHUNK, -(-len(output) // num_workers)))

    def payload(i: int) -> memoryview:
        return memory[offsets[i] : offsets[i] + sizes[i]].data

    def work(start: int) -> None:
        stop = min(start + chunk, len(output))
        wrong = [] if check is None else [i for i in range(start, stop) if not check(i, payload(i))]
        _decode_range(*arguments, start, stop)
        for i in wrong:
            status[i] = status[i] or 4

    for _ in pool.map(work, range(0, len(output), chunk)):
        pass  # raises what a thread raised
    return status
