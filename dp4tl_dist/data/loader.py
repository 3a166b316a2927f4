"""Batches of pixels from a beton, in an order given from outside.

FFCV runs the epoch: its thread prepares batches in a ring of buffers and copies them to the device on streams of their
own. The order, the crops, the decoding and the handling of errors are ours.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.data import augment, decode
from dp4tl_dist.data.beton import Beton, fingerprint
from dp4tl_dist.data.crops import CropDecoder
from dp4tl_dist.data.order import check_indices
from dp4tl_dist.data.rows import load_rows, warn_unchecked
from dp4tl_dist.data.steps import MappedFile, PageCache, Steps
from dp4tl_dist.errors import UserError

BATCHES_AHEAD = 3
IGNORED = -100
"""The label of a sample that cannot be decoded, where such samples are skipped."""


class ChangedFileError(RuntimeError):
    """A beton is not the one any more that was opened."""


class Batch(NamedTuple):
    """One step's samples. The images live in buffers that are used again: clone what outlives the step."""

    images: Tensor
    """uint8 (batch, 3, height, width), channels last."""
    labels: Tensor
    """int64 (batch,)."""
    identifiers: Tensor
    """int64 (batch,): positions in the unpruned source."""


@dataclass(frozen=True)
class TrainView:
    """Random resized crops, mirrored half of the time; a function of (seed, epoch, identifier)."""

    resolution: int
    seed: int
    epoch: int
    min_scale: float = 0.08
    flip: bool = True

    def draw(self, beton: Beton, batch: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 (n, 4) and flips bool (n,) for the samples at those positions."""
        keys = beton.identifiers[batch]
        boxes = augment.train_boxes(
            beton.heights[batch], beton.widths[batch], keys, seed=self.seed, epoch=self.epoch, min_scale=self.min_scale
        )
        return boxes, self.flip & augment.train_flips(keys, seed=self.seed, epoch=self.epoch)


@dataclass(frozen=True)
class CentreView:
    """The central square, `ratio` x the shorter side; for validation and voting."""

    resolution: int
    ratio: float = 224 / 256

    def draw(self, beton: Beton, batch: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 (n, 4) and flips bool (n,), all False, for the samples at those positions."""
        boxes = augment.centre_boxes(beton.heights[batch], beton.widths[batch], ratio=self.ratio)
        return boxes, np.zeros(len(batch), dtype=np.bool_)


@dataclass(frozen=True)
class SquareView:
    """The largest square of each image, at a place that is a function of (seed, epoch, identifier): what several views
    are cut from on the device."""

    resolution: int
    seed: int
    epoch: int

    def draw(self, beton: Beton, batch: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Boxes int32 (n, 4) and flips bool (n,), all False, for the samples at those positions."""
        boxes = augment.square_boxes(
            beton.heights[batch], beton.widths[batch], beton.identifiers[batch], seed=self.seed, epoch=self.epoch
        )
        return boxes, np.zeros(len(batch), dtype=np.bool_)


View = TrainView | CentreView | SquareView


class BetonLoader:
    """Loads batches of one beton.

    device: where batches are to arrive, "cpu" or "cuda:I". num_workers: decoding threads. os_cache: map the file and
    leave caching to the operating system; else hold just the pages that the coming batches need, for files larger than
    memory and an order that draws from a window of pages. skip_bad: samples that cannot be decoded come as black images
    with the label IGNORED, each with a warning the first time, and are no error. tells: this rank says where the beton
    has no checksums to hold its samples against. Raises UserError for checksums of another beton.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        device: str = "cpu",
        num_workers: int = 1,
        os_cache: bool = True,
        skip_bad: bool = False,
        tells: bool = True,
    ) -> None:
        self.beton = beton
        self._rows = load_rows(beton)
        if self._rows is None and tells:
            warn_unchecked(beton.path)
        self._stamp = stamp(beton.path)
        self._skipped = np.zeros(beton.num_samples, np.bool_) if skip_bad else None
        self.device = torch.device(device)
        self.num_workers = num_workers
        self._pages = (MappedFile if os_cache else PageCache)(beton)
        # Threads that live as long as the loader: libffcv keeps a decoder for each thread that it ever saw.
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")

    def epoch(self, batches: Sequence[NDArray[np.int64]], view: View) -> Generator[Batch, None, None]:
        """One Batch for each array of positions, in that order; the arrays may have any lengths.

        Raises UserError at once for positions that repeat or are not in the file; from the step that meets it
        BadSampleError for a damaged sample and ChangedFileError for a file that was replaced or cut short.
        Closing the iterator ends its threads; leaving a `for` early drops and so closes it.
        """
        if not len(batches):
            return self._run([], view)
        positions = check_indices(np.concatenate(batches), self.beton.num_samples, what=str(self.beton.path))
        ends = np.cumsum([len(batch) for batch in batches])
        return self._run(np.split(positions, ends[:-1]), view)

    def _run(self, batches: list[NDArray[np.int64]], view: View) -> Generator[Batch, None, None]:
        if not batches:
            return
        steps = Steps(self._plan(max(map(len, batches)), view), batches)
        try:
            for batch, images in zip(batches, steps, strict=True):
                labels = self.beton.labels[batch]
                if self._skipped is not None:
                    labels = np.where(self._skipped[batch], IGNORED, labels)
                yield Batch(images, self._attach(labels), self._attach(self.beton.identifiers[batch]))
        finally:
            steps.close()

    def _check_file(self) -> None:
        """Raise ChangedFileError where the file is another one now, or shorter: its pages would be other images, or
        none, and reading a mapped file past its end kills the process. A file that is gone is still mapped."""
        now = stamp(self.beton.path)
        if now in (self._stamp, None):
            return
        try:
            same = fingerprint(self.beton.path) == self.beton.fingerprint
        except UserError:
            same = False
        if not same:
            raise ChangedFileError(f"{self.beton.path} was changed while it was read: put it back and run again")
        if self._rows is not None:
            self._rows.forget()  # the same tables, and perhaps other payloads
        self._stamp = now

    def _attach(self, values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _plan(self, batch_size: int, view: View) -> SimpleNamespace:
        """What FFCV's epoch takes from its loader: the stages, the sizes and the source of pages."""
        decoder = CropDecoder(
            self.beton, view, pool=self._pool, num_workers=self.num_workers, skipped=self._skipped, rows=self._rows
        )
        moves = [] if self.device.type == "cpu" else [decode.ToDevice(self.device, non_blocking=True)]
        stages = [decoder, decode.ToTensor(), *moves, decode.ToTorchImage(channels_last=True)]
        with _plain_stages():
            graph = decode.Graph(
                {"image": decode.PipelineSpec("image", stages[0], stages[1:])},
                {"image": decode.RGBImageField()}, {"image": 0}, {"f0": None}, None,
            )  # fmt: skip
            code = graph.codegen_all(graph.collect_requirements()[1])
        return SimpleNamespace(
            graph=graph, code=code, memory_manager=self._pages, reader=SimpleNamespace(metadata={"f0": None}),
            batch_size=batch_size, batches_ahead=BATCHES_AHEAD, traversal_order=None, device=self.device,
            check_file=self._check_file,
        )  # fmt: skip


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced: size, time and number; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextlib.contextmanager
def _plain_stages() -> Iterator[None]:
    """FFCV's stages as plain Python: compiling them costs seconds in each process, and their work is in our kernel."""
    enabled = decode.Compiler.is_enabled
    decode.Compiler.set_enabled(False)
    try:
        yield
    finally:
        decode.Compiler.set_enabled(enabled)
