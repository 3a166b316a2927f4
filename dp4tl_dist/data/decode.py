"""Payload bytes to pixels: the compiled kernel over a batch, with libffcv's decoder.

This is the door to FFCV (`loader.py` takes its parts from here). FFCV is imported with numba's JIT off: importing it
otherwise compiles helpers that nothing here uses, which takes seconds in every process.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numba.typed  # before the JIT goes off: its own functions must be compiled ones
import numpy as np
import torch
from numpy.typing import NDArray

from dp4tl_dist.data.kernel import decode_range
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

# For the kernel. The name is our own: other libraries may have such a symbol.
llvmlite.binding.add_symbol("dp4tl_imdecode", ctypes.cast(lib["imdecode"], ctypes.c_void_p).value)


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
    """Decode payload i, crop it to boxes[i], resize it (see `kernel`) into output[i] and mirror it if flips[i].

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
        decode_range(*arguments, start, stop)
        for i in wrong:
            status[i] = status[i] or 4

    for _ in pool.map(work, range(0, len(output), chunk)):
        pass  # raises what a thread raised
    return status
