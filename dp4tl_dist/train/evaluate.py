"""Exact distributed evaluation: ragged shards, integer counts, the unwrapped module. No sample counts twice."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dp4tl_dist.data.loader import IGNORED, Batch, CentreView
from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.train.buffers import averaged_buffers
from dp4tl_dist.train.engine import Engine
from dp4tl_dist.train.source import Source
from dp4tl_dist.train.task import Task
from dp4tl_dist.world import World, all_sum


@dataclass(frozen=True)
class Split:
    """Samples to draw: a source and the positions in it that count."""

    source: Source
    kept: NDArray[np.int64]
    pages: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Score:
    """What an evaluation found. Shares of 1, not percent, of the samples that could be decoded."""

    top1: float
    top5: float
    loss: float
    num_samples: int
    robust_top1: float | None = None
    """The share that is still right under an attack; None where none was made."""

    def __str__(self) -> str:
        robust = "" if self.robust_top1 is None else f", robust {100 * self.robust_top1:.2f} %"
        return f"{100 * self.top1:.2f} %{robust}"

    def values(self) -> dict[str, float]:
        """The accuracies and the loss, by name."""
        named = {"top1": self.top1, "top5": self.top5, "loss": self.loss, "robust_top1": self.robust_top1}
        return {name: value for name, value in named.items() if value is not None}


@torch.inference_mode()
def evaluate(
    task: Task,
    engine: Engine,
    world: World,
    split: Split,
    view: CentreView,
    *,
    batch_size: int = 256,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Score:
    """Accuracy and mean cross-entropy of the task's module over `split`, the same numbers on every rank.

    `observe` is shown each batch of this rank and its logits. A task with an attack (`task.robust`) has its accuracy
    under attack measured, too.
    """
    sums = np.zeros(5, np.float64)  # correct, in the first five, cross-entropy, correct under attack, samples
    batches = inference_batches(split.kept, batch_size=batch_size, num_ranks=world.num_ranks, rank=world.rank)
    was_training = task.module.training
    task.module.eval()
    with averaged_buffers(task.module, world):
        for batch in split.source.epoch(batches, view):
            with engine.autocast():
                logits = task.predict(batch).float()
            if observe is not None:
                observe(batch, logits)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
            loss = functional.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum")
            count = (batch.labels != IGNORED).sum()
            held = robust_hits(task, engine, batch)
            sums += np.array([top[:, 0].sum().item(), top.sum().item(), loss.item(), held, count.item()])
    task.module.train(was_training)
    total = all_sum(world, sums)
    num_samples = int(total[4])
    if not num_samples:
        raise RuntimeError("no sample of the evaluation's file can be decoded: write the file again")
    top1, top5, loss, robust = (total[:4] / num_samples).tolist()
    return Score(top1, top5, loss, num_samples, robust_top1=robust if task.robust else None)


def robust_hits(task: Task, engine: Engine, batch: Batch) -> int:
    """How many of `batch` are classified rightly under the task's attack; 0 without one."""
    if task.robust is None:
        return 0
    # Not the autocast of the clean pass: it remembers the weights that it cast, and those know no gradients.
    with engine.autocast():
        attacked = task.robust(task.module, batch)
    with engine.autocast():
        hits = task.predict(batch._replace(images=attacked)).argmax(dim=1) == batch.labels
    return int(hits.sum())
