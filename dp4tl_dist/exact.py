"""Passes whose bits do not depend on the number of ranks, threads and cores, nor on what the process did before.

What rounds, rounds as a sum is divided: among threads, by the shapes of the operands, and in MKL by where memory
happens to start. So all that is promised to be exact is made of two kinds of steps alone:

- steps that do not round, or round each element by itself (whole numbers, `prune.votes.exact_distances`, comparisons):
  they may take any number of threads;
- all others, a network's passes above all, by ONE thread, on operands whose shapes and layout do not depend on the
  ranks (`data.order.inference_batches`, cut further by `Parts`). oneDNN and ATen then have nothing left to choose by,
  and MKL is told to disregard where memory starts (MKL_CBWR, in the package's `__init__`): the same instructions on
  the same numbers in the same order.

What is left is the kind of processor: other instructions add in another order. Training has no such promise: all
threads share each operation there, so its bits are those of a number of threads.
"""

import contextlib
import copy
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from dp4tl_dist.log import warn

PIXELS = 1 << 19
ROWS = 64


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block, or the function that it decorates, this thread computes alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def told_of_mkl() -> None:
    """Say, once, where MKL may round as memory happens to start: it was at work before `dp4tl_dist` came, or has
    MKL_CBWR=OFF. A torch without MKL, or with one that cannot be asked, has nothing to say."""
    branch, off = 1, 1  # MKL_CBWR_BRANCH, MKL_CBWR_BRANCH_OFF of mkl_cbwr_get
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    get = getattr(ctypes.CDLL(str(library)), "mkl_serv_cbwr_get", None) if library.exists() else None
    if get is not None and get(branch) == off:
        warn(
            "MKL_CBWR is off, so votes and scores may differ in their last bits from one run to the next: import "
            "dp4tl_dist before torch computes, or set MKL_CBWR=AUTO,STRICT"
        )


def rows_at_once(side: int) -> int:
    """How many images of that side make a part of a pass on the CPU: enough for its kernels to be fast, and so few that
    a batch feeds many threads. A function of the side alone."""
    return max(1, min(ROWS, PIXELS // side**2))


class Parts:
    """Runs a network over batches in parts of `size` rows; on the CPU as many at a time as torch has threads, each part
    by one thread. A batch's results depend on the batch and on `size`, and not on the number of threads.

    `function` gets the network and the part's rows of each tensor of the batch, and returns one tensor or several of as
    many rows. On the CPU it gets a twin, its thread's own, that shares the weights: it may hook it or swap its
    parameters, and enters inference mode and autocast by itself, as these are a thread's own as well.
    """

    def __init__(self, model: nn.Module, function: Callable[..., tuple[Tensor, ...]], *, size: int) -> None:
        self.model, self.function, self.size = model, function, size
        self._threads = torch.get_num_threads()
        self._own = threading.local()
        told_of_mkl()
        # Threads start with the first part, so none does where the model is on a GPU.
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="exact", initializer=self._begin)

    def __call__(self, *batch: Tensor) -> list[Tensor]:
        """What `function` returns, over all rows of the batch."""
        parts = zip(*(tensor.split(self.size) for tensor in batch), strict=True)
        if batch[0].device.type == "cpu":
            found = list(self._pool.map(self._run, parts))
        else:
            found = [self.function(self.model, *part) for part in parts]
        return [torch.cat(columns) for columns in zip(*found, strict=True)]

    def _begin(self) -> None:
        # torch and MKL keep this for each thread, so the caller's own number stays.
        torch.set_num_threads(1)
        shared = {id(value): value for value in (*self.model.parameters(), *self.model.buffers())}
        self._own.model = copy.deepcopy(self.model, shared)

    def _run(self, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.function(self._own.model, *part)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # for threads that are yet to start
