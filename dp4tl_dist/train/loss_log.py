"""The loss of every training sample at every epoch, logged as training sees it: by position, exactly once an epoch.

Rank 0 holds the rows that are not on the disk yet. Rows have fixed places in a working file, so that a run that goes on
from a checkpoint writes the same entries again; the whole becomes `sample_losses.npz` when the run ends.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.data.losses import NAME, SampleLosses, save_losses
from dp4tl_dist.errors import UserError
from dp4tl_dist.prune.votes import from_units, to_units
from dp4tl_dist.waiting import together
from dp4tl_dist.world import World, all_sum

WORKING = "sample_losses.rows"


class LossLog:
    """What one run logs. Every rank has one and calls `gather` and `end_validation` together with the others."""

    def __init__(self, out: Path, beton: Beton, *, epochs: int, meta: dict[str, Any]) -> None:
        self.path, self.working, self.epochs = out / NAME, out / WORKING, epochs
        self.meta = meta
        self.num_classes = beton.num_classes
        self._by_identifier = np.argsort(beton.identifiers, kind="stable")
        self._identifiers = beton.identifiers[self._by_identifier]
        samples = beton.num_samples
        self._row = np.dtype([("losses", "<f4", samples), ("correct", "?", samples), ("val", "<f4", self.num_classes)])
        self._waiting: dict[int, NDArray[Any]] = {}
        self._seen: list[Tensor] = []
        self._val = torch.zeros(2, self.num_classes, dtype=torch.int64)

    def open(self, *, epoch: int) -> None:
        """On rank 0, before the first step: take up the rows of the run's former self, of which `epoch` is the last."""
        if not self.working.exists():
            empty = self._empty()
            with open(self.working, "wb") as handle:
                for _ in range(self.epochs):
                    handle.write(empty.tobytes())
        if self.working.stat().st_size != self.epochs * self._row.itemsize:
            raise UserError(f"{self.working} is not of this run: use another --out, or --force to start afresh")
        if epoch < self.epochs:
            self._waiting[epoch] = np.fromfile(self.working, self._row, count=1, offset=epoch * self._row.itemsize)

    def _empty(self) -> NDArray[Any]:
        row = np.zeros(1, self._row)
        row["losses"] = row["val"] = np.nan
        return row

    def add(self, batch: Batch, logits: Tensor) -> None:
        """A training batch of this rank and its logits (n, classes), as the task sees them."""
        losses = functional.cross_entropy(logits.float(), batch.labels, ignore_index=IGNORED, reduction="none")
        losses = losses.masked_fill(batch.labels == IGNORED, torch.nan)
        correct = logits.argmax(dim=1) == batch.labels
        self._seen.append(torch.stack([batch.identifiers.double(), losses.double(), correct.double()]))

    def gather(self, world: World, epoch: int) -> None:
        """Bring what was added since the last call, all of it of `epoch`, to rank 0."""
        mine = torch.cat([torch.zeros(3, 0, dtype=torch.float64), *(part.cpu() for part in self._seen)], dim=1)
        self._seen = []
        parts = [mine]
        if world.num_ranks > 1:
            parts = [torch.empty_like(mine) for _ in range(world.num_ranks)]
            with together():
                dist.all_gather(parts, mine)  # ranks have even parts of every step
        if not world.is_main:
            return
        identifiers, losses, correct = torch.cat(parts, dim=1).numpy()
        positions = self._by_identifier[np.searchsorted(self._identifiers, identifiers.astype(np.int64))]
        row = self._waiting.setdefault(epoch, self._empty())
        row["losses"][0, positions] = losses
        row["correct"][0, positions] = correct > 0

    def add_validation(self, batch: Batch, logits: Tensor) -> None:
        """A validation batch of this rank, inside `evaluate`."""
        known = batch.labels != IGNORED
        labels = batch.labels[known].cpu()
        losses = functional.cross_entropy(logits[known], batch.labels[known], reduction="none").cpu()
        self._val[0].index_add_(0, labels, to_units(losses))
        self._val[1] += torch.bincount(labels, minlength=self.num_classes)

    def end_validation(self, world: World, epoch: int) -> None:
        """The class means of what was added, of all ranks, into the row of `epoch`."""
        sums, counts = all_sum(world, self._val.numpy())
        self._val = torch.zeros_like(self._val)
        if world.is_main:
            row = self._waiting.setdefault(epoch, self._empty())
            means = np.full(self.num_classes, np.nan)
            total = from_units(torch.from_numpy(sums)).numpy()
            row["val"][0] = np.divide(total, counts, out=means, where=counts > 0)

    def save(self) -> None:
        """On rank 0: everything so far, down to the disk; raises OSError. A checkpoint must not be ahead of it."""
        with open(self.working, "r+b") as handle:
            waiting = sorted(self._waiting.items())
            for epoch, row in waiting:
                handle.seek(epoch * self._row.itemsize)
                handle.write(row.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        for epoch, _ in waiting[:-1]:  # the last one still grows
            del self._waiting[epoch]

    def finish(self) -> None:
        """On rank 0, once the run is complete: the working file becomes `sample_losses.npz`."""
        if not self.working.exists():
            return
        rows = np.fromfile(self.working, self._row)
        save_losses(self.path, SampleLosses(rows["losses"], rows["correct"], rows["val"], self.meta))
        with contextlib.suppress(OSError):
            self.working.unlink()
