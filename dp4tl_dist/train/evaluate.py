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
from dp4tl_dist.train.engine import DDPEngine, averaged_buffers
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


@torch.inference_mode()
def evaluate(
    task: Task,
    engine: DDPEngine,
    world: World,
    split: Split,
    view: CentreView,
    *,
    batch_size: int = 256,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Score:
    """Accuracy and mean cross-entropy of the task's module over `split`, the same numbers on every rank.

    `observe` is shown each batch of this rank and its logits.
    """
    sums = np.zeros(4, np.float64)  # correct, correct in the first five, cross-entropy, samples
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
            sums += np.array([top[:, 0].sum().item(), top.sum().item(), loss.item(), count.item()])
    task.module.train(was_training)
    total = all_sum(world, sums)
    num_samples = int(total[3])
    if not num_samples:
        raise RuntimeError("no sample of the evaluation's file can be decoded: write the file again")
    top1, top5, loss = (total[:3] / num_samples).tolist()
    return Score(top1=top1, top5=top5, loss=loss, num_samples=num_samples)
