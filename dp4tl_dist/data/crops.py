"""FFCV's first stage: the samples of a batch, cropped, decoded and held against their checksums, or named as bad."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.decode import STATUS, AllocationQuery, Operation, decode_batch
from dp4tl_dist.data.rows import DIFFERS, Rows, describe_sample, read_names
from dp4tl_dist.errors import UserError
from dp4tl_dist.log import warn


class BadSampleError(RuntimeError):
    """A sample's payload cannot be decoded. The text names the file, the position, the identifier and the defect."""


class View(Protocol):
    """What to cut out of each image."""

    @property
    def resolution(self) -> int: ...

    def draw(self, beton: Beton, batch: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 (n, 4) and flips bool (n,) for the samples at the positions `batch`."""


class CropDecoder(Operation):
    """FFCV's first stage: positions in a beton to pixels uint8 (batch, resolution, resolution, 3).

    skipped: bool (samples,), where samples that cannot be decoded are marked and come out black. None: they are errors.
    rows: the checksums that samples are held against, if there are any.
    """

    def __init__(
        self,
        beton: Beton,
        view: View,
        *,
        pool: Executor,
        num_workers: int,
        skipped: NDArray[np.bool_] | None = None,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.beton, self.view, self.pool, self.num_workers, self.skipped = beton, view, pool, num_workers, skipped
        self.rows = rows

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape, dtype = (self.view.resolution, self.view.resolution, 3), np.dtype("u1")
        return replace(previous_state, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., NDArray[np.uint8]]:
        return self._decode

    def _decode(
        self, batch: NDArray[np.int64], output: NDArray[np.uint8], _: Any, storage: tuple[Any, ...]
    ) -> NDArray[np.uint8]:
        beton, memory = self.beton, storage[0]
        offsets = beton.pointers[batch].astype(np.int64)
        if memory.ndim == 2:  # the page cache's memory is (slots, page size), and storage[3] gives a page's slot
            page, offset = np.divmod(offsets, beton.page_size)
            offsets = storage[3][page].astype(np.int64) * beton.page_size + offset
        boxes, flips = self.view.draw(beton, batch)
        status = decode_batch(
            memory.reshape(-1), offsets, beton.sizes[batch].astype(np.int64), beton.modes[batch],
            beton.heights[batch].astype(np.int64), beton.widths[batch].astype(np.int64), boxes, flips, output,
            pool=self.pool, num_workers=self.num_workers, check=self._check_of(batch),
        )  # fmt: skip
        for row in np.flatnonzero(status):
            self._refuse(int(batch[row]), STATUS[int(status[row])])
            output[row] = 0
        return output

    def _check_of(self, batch: NDArray[np.int64]) -> Callable[[int, memoryview], bool] | None:
        """What proves the payloads of a batch, None where all have been."""
        rows = self.rows
        if rows is None or rows.proved[batch].all():
            return None
        return lambda i, payload: rows.proves(self.beton, int(batch[i]), payload)

    def _refuse(self, position: int, why: str) -> None:
        beton = self.beton
        fault = "is damaged" if why == DIFFERS else "cannot be decoded"
        try:
            names = read_names(beton)
        except UserError:  # the name is a help only; what is to be told is another fault
            names = None
        text = f"{beton.path}: the sample at {describe_sample(beton, position, names)} {fault}, as {why}: "
        if self.skipped is None:
            raise BadSampleError(
                text + 'write the file again, or leave such samples out with data.on_bad_sample = "skip"'
            )
        if not self.skipped[position]:
            warn(text + "it is left out of the loss")
        self.skipped[position] = True
