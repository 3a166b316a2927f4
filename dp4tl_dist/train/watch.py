"""What a run writes down as it goes, and the checks that end it: losses, metrics lines, the order log."""

import math
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from dp4tl_dist.data.loader import Batch
from dp4tl_dist.waiting import together
from dp4tl_dist.world import all_max, all_sum, on_main

if TYPE_CHECKING:
    from dp4tl_dist.train.loop import Fit


def mean_loss(fit: "Fit") -> float:
    """The mean loss over the ranks and the steps since the last log line; one that is not finite ends the run."""
    at, count = fit.at, len(fit.at.since_log)
    mine = torch.stack(at.since_log).double().mean().item() if count else 0.0
    loss = float(all_sum(fit.world, np.array([mine]))[0]) / fit.world.num_ranks
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{fit.job.label}: the loss became {loss} within steps {at.step - count}..{at.step - 1}: "
            f"lower train.lr; the last good checkpoint is kept in {fit.job.out / 'checkpoints'}"
        )
    return loss


def check_weights(fit: "Fit") -> None:
    """The last step may have spoilt the weights without a loss to show it yet; then the run ends, too."""
    spoilt = not all(value.isfinite().all() for value in fit.job.task.module.state_dict().values())
    if all_max(fit.world, np.array([int(spoilt)]))[0]:
        raise FloatingPointError(
            f"{fit.job.label}: the weights are not finite after step {fit.at.step - 1}: "
            f"lower train.lr; the last good checkpoint is kept in {fit.job.out / 'checkpoints'}"
        )


def log_step(fit: "Fit", epoch: int, *, lr: float, side: int, rate: float, waited: float) -> float:
    """Write a metrics line and start the next window of losses."""
    at, loss = fit.at, mean_loss(fit)
    at.since_log = []
    gather_losses(fit)
    if fit.metrics:
        fit.owner.check()
        fit.metrics.write(
            "step", step=at.step, epoch=epoch, loss=loss, lr=lr, resolution=side,
            images_per_s=round(rate, 1), data_wait=round(waited, 4), num_ranks=fit.world.num_ranks,
        )  # fmt: skip
    return loss


def open_losses(fit: "Fit") -> None:
    """Where every sample's loss is logged: take up what the run's former self has logged."""
    losses = fit.job.losses
    if losses:
        on_main(fit.world, lambda: losses.open(epoch=fit.at.step // fit.job.steps_per_epoch))


def gather_losses(fit: "Fit") -> None:
    """Bring the losses of the steps since the last call together; never across an epoch's end."""
    if fit.job.losses:
        fit.job.losses.gather(fit.world, (fit.at.step - 1) // fit.job.steps_per_epoch)


def finish_losses(fit: "Fit") -> None:
    """Write the losses file of a complete run."""
    if fit.job.losses:
        on_main(fit.world, fit.job.losses.finish)


def log_order(fit: "Fit", batch: Batch) -> None:
    if not fit.job.log.order:
        return
    mine = batch.identifiers.tolist()
    parts = [mine]
    if fit.world.num_ranks > 1:  # as objects: ranks may have a sample more or less
        parts = [[]] * fit.world.num_ranks
        with together():
            dist.all_gather_object(parts, mine)
    if fit.metrics:
        fit.owner.check()
        fit.metrics.order.add({"step": fit.at.step, "identifiers": list(chain.from_iterable(parts))})
