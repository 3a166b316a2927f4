"""One epoch over a beton: FFCV's prefetching thread and its page sources, made lighter and given proper ends."""

import contextlib
import queue
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.decode import EpochIterator, OSCacheContext, OSCacheManager, ProcessCacheManager

POLL_SECONDS = 0.5


class MappedFile(OSCacheManager):
    """FFCV's mapped file without its tables of every sample, which cost seconds and 0.6 GB on ImageNet; see Beton."""

    def __init__(self, beton: Beton) -> None:
        self.reader = SimpleNamespace(file_name=str(beton.path))
        self.ptrs = self.sizes = None
        self.context = OSCacheContext(self)


class PageCache(ProcessCacheManager):
    """FFCV's page cache, scheduled by the pages of each batch, found at once, in place of tables of every sample."""

    def __init__(self, beton: Beton) -> None:
        self.reader = SimpleNamespace(file_name=str(beton.path), page_size=beton.page_size)
        self.ptrs = self.sizes = None
        self.pages = beton.pages
        self.sample_to_pages = np.arange(self.pages.max() + 1)[:, None]  # FFCV asks for the pages of a page

    def schedule_epoch(self, batches: Sequence[NDArray[np.int64]]) -> Any:
        return super().schedule_epoch([np.unique(self.pages[batch]) for batch in batches])


class _Ragged:
    """Batches of any lengths for FFCV, which cuts its order into slices of `batch_size`."""

    def __init__(self, batches: Sequence[NDArray[np.int64]], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    def __getitem__(self, part: slice) -> NDArray[np.int64]:
        return self.batches[part.start // self.batch_size]


class _Left(Exception):
    """The consumer left the epoch early."""


class Steps(EpochIterator):
    """FFCV's thread that prepares batches, with ends: errors reach the consumer, and closing it ends every thread."""

    closed = True  # until FFCV's constructor has come so far that there is something to close

    def __init__(self, plan: SimpleNamespace, batches: Sequence[NDArray[np.int64]]) -> None:
        on_cuda = plan.device.type == "cuda"
        # The ring's buffers are made here and filled in the thread, which is not in the consumer's inference mode.
        with torch.inference_mode(False), torch.cuda.device(plan.device) if on_cuda else contextlib.nullcontext():
            super().__init__(plan, _Ragged(batches, plan.batch_size))

    def run(self) -> None:
        """The thread: batches in the ring's slots, then None; or the error that ended it."""
        reusable: list[Any] = [None] * len(self.cuda_streams)  # for each slot, the event that its last use is over
        try:
            if self.loader.device.type == "cuda":  # a new thread's is GPU 0, where it would make a context of its own
                torch.cuda.set_device(self.loader.device)
            for step, batch in enumerate(self.iter_ixes):
                slot = step % len(reusable)
                if self.cuda_streams[slot] is not None:
                    self.cuda_streams[slot].synchronize()  # the last copy out of this slot's pinned memory is done
                self.loader.check_file()
                (images,) = self.run_pipeline(step, batch, slot, reusable[slot])
                self.loader.check_file()
                self._hand_over(slot, images)
                if self.cuda_streams[slot] is not None:
                    # The queue had room: so the consumer has launched all work on the oldest slot.
                    oldest = (slot - self.loader.batches_ahead - 1) % len(reusable)
                    reusable[oldest] = self.current_stream.record_event()
            self._hand_over(0, None)
        except _Left:
            pass
        except BaseException as error:
            with contextlib.suppress(_Left):
                self._hand_over(0, error)

    def _hand_over(self, slot: int, item: Tensor | BaseException | None) -> None:
        while not self.terminate_event.is_set():
            with contextlib.suppress(queue.Full):
                return self.output_queue.put((slot, item), timeout=POLL_SECONDS)
        raise _Left

    def __next__(self) -> Tensor:
        while True:
            with contextlib.suppress(queue.Empty):
                slot, item = self.output_queue.get(timeout=POLL_SECONDS)
                break
            if not all(thread.is_alive() for thread in [self, *self._page_readers()]) and self.output_queue.empty():
                self.close()
                raise RuntimeError(f"a thread that reads {self.loader.memory_manager.reader.file_name} has died")
        if not isinstance(item, Tensor):
            self.close()
            raise StopIteration if item is None else item
        if self.cuda_streams[slot] is not None:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return item

    def _page_readers(self) -> list[Any]:
        executor = getattr(self.memory_context, "executor", None)  # the page cache's, once it is open
        return executor.threads if executor else []

    def close(self) -> None:
        """End the threads and wait for them. Safe to call again."""
        if self.closed:
            return
        self.closed = True
        self.terminate_event.set()
        readers = self._page_readers()
        if readers:
            executor = self.memory_context.executor
            for page in executor.schedule.page_to_slot:
                executor.loaded_queue.put(page)  # no waiting for pages any more: what comes out is not handed over
        if self.is_alive():
            self.join()
        if readers:
            with contextlib.suppress(queue.Empty):
                while True:
                    executor.queries.get_nowait()
            self.memory_context.__exit__(None, None, None)
            for thread in readers:
                thread.join()
