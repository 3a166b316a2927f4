"""Learning rate and resolution as pure functions of the position in the run: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

from dp4tl_dist.config import OptimConfig


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run over `num_samples`: how many steps, in which epochs, and where each stands."""

    num_samples: int
    optim: OptimConfig
    whole: bool = False
    """No sample is left out of an epoch: `spread_batches` in place of `rank_batches`."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.optim.batch_size) if self.whole else (
            self.num_samples // self.optim.batch_size
        )  # fmt: skip

    @property
    def num_steps(self) -> int:
        return self.optim.steps or self.steps_per_epoch * self.optim.epochs

    @property
    def num_epochs(self) -> int:
        """Passes over the samples; the last one may be cut short where `optim.steps` says when to end."""
        return -(-self.num_steps // self.steps_per_epoch)

    def seen(self, step: int) -> int:
        """How many samples the steps before `step` took, all ranks together."""
        if not self.whole:
            return step * self.optim.batch_size
        epochs, steps = divmod(step, self.steps_per_epoch)
        size, more = divmod(self.num_samples, self.steps_per_epoch)
        return epochs * self.num_samples + steps * size + min(steps, more)

    def last_step(self, epoch: int) -> int:
        """The step count at which `epoch` ends."""
        return min((epoch + 1) * self.steps_per_epoch, self.num_steps)

    def position(self, step: int) -> float:
        """Where `step` stands in the schedule, in its epochs: from 0 to `optim.epochs` at the run's end."""
        return step * self.optim.epochs / self.num_steps

    def side(self, epoch: int) -> int:
        """The side of the training crops in a pass over the samples: that of its first step."""
        return resolution(self.optim, self.position(epoch * self.steps_per_epoch))


def learning_rate(train: OptimConfig, epoch: float) -> float:
    """The learning rate at a fractional `epoch`: `Plan.position` of the step.

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
