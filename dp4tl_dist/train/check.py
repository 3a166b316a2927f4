"""What can be known of a training or a transfer before it starts: both ask here, and so does the plan of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dp4tl_dist.config import OptimConfig, TrainConfig
from dp4tl_dist.errors import UserError
from dp4tl_dist.models import ARCHITECTURES, check_arch, check_shapes, outline
from dp4tl_dist.recipes import TransferConfig
from dp4tl_dist.schedule import Plan
from dp4tl_dist.train.engine import check_engine
from dp4tl_dist.train.job import check_batch
from dp4tl_dist.train.moco import check_moco
from dp4tl_dist.train.recompute import blocks_of

MANY_EPOCHS = 10_000
"""A ramp is looked at in as many epochs."""


def check_train(config: TrainConfig, optim: OptimConfig, *, samples: int, num_classes: int, num_ranks: int) -> None:
    """Raise UserError where `config` cannot train on so many samples, classes and ranks here.

    optim: the recipe with its steps, where `data.steps_of` sets them.
    """
    check_engine(config.engine)
    check_arch(config.model.arch, (optim.resolution, optim.start_resolution or optim.resolution, optim.val_resolution))
    share, moco = check_batch(Plan(samples, optim), num_ranks), config.task.moco
    at_once = share
    if config.task.kind == "moco":
        check_moco(moco, optim.batch_size, share)
        at_once = share // moco.bn_groups
        if config.log.sample_losses:
            raise UserError("log.sample_losses follows labels, and task.kind moco has none: leave it out")
    check_network(config.model.arch, num_classes, Plan(samples, optim), at_once)
    if config.engine.activation_checkpointing:
        blocks_of(outline(config.model.arch, num_classes))


def check_network(arch: str, num_classes: int, plan: Plan, share: int, *, training: bool = True) -> None:
    """Raise UserError unless the network takes a rank's `share` of a batch at each side of the ramp, and validation's.

    training: whether its batch norm sees the batch.
    """
    sides = sorted({plan.side(epoch) for epoch in range(min(plan.num_epochs, MANY_EPOCHS))})
    # Those that are known here take any side from the smallest on, or one alone.
    for side in {sides[0], sides[-1]} if arch in ARCHITECTURES else sides:
        check_shapes(arch, num_classes, side, share, training=training)
    check_shapes(arch, num_classes, plan.optim.val_resolution)


def check_classes(val: Path, val_classes: Sequence[str], train: Path, train_classes: Sequence[str]) -> None:
    """Raise UserError unless both datasets have the same classes in the same order."""
    if tuple(val_classes) != tuple(train_classes):
        raise UserError(f"{val} has other classes than {train}: write both from the same class folders")


def with_steps_of(samples: int, optim: OptimConfig) -> OptimConfig:
    """`optim` for as many steps as its epochs over so many samples take."""
    if optim.steps:
        raise UserError(f"train.steps {optim.steps} and data.steps_of both say how long to train: give one of them")
    steps = samples // optim.batch_size * optim.epochs
    if not steps:
        raise UserError(f"train.batch_size {optim.batch_size} is larger than data.steps_of: choose a smaller one")
    return optim.model_copy(update={"steps": steps})


def check_transfer(config: TransferConfig, arch: str, sizes: NDArray[np.int64], train: Path, num_ranks: int) -> None:
    """Raise UserError where a network cannot be transferred here to a target with classes of these sizes (classes,).

    config: as it is `suited` to the network.
    """
    check_engine(config.engine)
    plan = Plan(int(sizes.sum() - held_out(sizes, config.val_share, path=train).sum()), config.train, whole=True)
    share, optim = check_batch(plan, num_ranks), config.train
    sides = () if config.cached else (optim.resolution, optim.start_resolution or optim.resolution)
    check_arch(arch, (*sides, optim.val_resolution))
    if config.cached:
        check_shapes(arch, len(sizes), optim.val_resolution)
    else:
        check_network(arch, len(sizes), plan, share, training=config.recipe != "lp")
    if config.engine.activation_checkpointing:
        blocks_of(nn.Linear(1, 1) if config.cached else outline(arch, len(sizes)))


def held_out(sizes: NDArray[np.int64], share: float, *, path: Path) -> NDArray[np.int64]:
    """How many samples (classes,) are held out of classes of these sizes (classes,): the share, at least one of two,
    and never all. UserError where that is none at all; path: what it names."""
    counts = np.where(sizes > 1, np.clip(np.rint(share * sizes), 1, np.maximum(sizes - 1, 1)), 0).astype(np.int64)
    if not counts.any():
        raise UserError(f"{path} has no class with two samples: nothing can be held out to choose the epoch")
    return counts
