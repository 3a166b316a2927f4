"""Learning rate and resolution as pure functions of the position in the run: nothing to save, nothing to restore."""

import math

from dp4tl_dist.config import OptimConfig


def learning_rate(train: OptimConfig, epoch: float) -> float:
    """The learning rate at a fractional `epoch`: `Job.position` of the step.

    triangular: straight up to `lr` at `peak_epoch`, then straight down to 0 at the end (FFCV's ImageNet recipe).
    cosine: linear warm-up until `peak_epoch`, then half a cosine down to 0.
    """
    if train.schedule == "constant":
        return train.lr
    if epoch < train.peak_epoch:
        return train.lr * max(epoch / train.peak_epoch, 1e-4)
    rest = (epoch - train.peak_epoch) / max(train.epochs - train.peak_epoch, 1e-12)
    if train.schedule == "triangular":
        return train.lr * max(0.0, 1.0 - rest)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))


def resolution(train: OptimConfig, epoch: float) -> int:
    """The side of the training crops at `epoch`, in pixels: a linear ramp in multiples of `resolution_step`."""
    if not train.start_resolution or epoch >= train.ramp_end:
        return train.resolution
    if epoch <= train.ramp_start:
        return train.start_resolution
    share = (epoch - train.ramp_start) / (train.ramp_end - train.ramp_start)
    exact = train.start_resolution + share * (train.resolution - train.start_resolution)
    return round(exact / train.resolution_step) * train.resolution_step
