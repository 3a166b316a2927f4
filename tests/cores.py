"""How many cores a test computes on."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """One thread computes, here and in processes started inside: on layers as small as a test's, more cost time."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
