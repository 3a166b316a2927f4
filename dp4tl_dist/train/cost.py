"""What a training run costs in seconds, from its plan and a machine's speed: arithmetic, no torch."""

from dataclasses import dataclass

from dp4tl_dist.config import OptimConfig
from dp4tl_dist.schedule import Plan

FORWARD = 1 / 3
"""What a forward pass costs of a training step: the backward pass takes about twice as long."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine carries out one recipe, all of its ranks together."""

    images_per_s: float
    """Training at the recipe's full resolution."""
    val_images_per_s: float
    epoch_s: float = 0.0
    """Seconds until an epoch's first batch is there."""
    save_s: float = 0.0
    startup_s: float = 0.0
    """Seconds from a stage's start until its first step, and at its end."""

    @classmethod
    def of_throughput(cls, images_per_s: float, optim: OptimConfig) -> "Speed":
        """A machine of which only the training throughput at full resolution is known."""
        pixels = (optim.resolution / optim.val_resolution) ** 2
        return cls(images_per_s, images_per_s * pixels / FORWARD)


def train_seconds(optim: OptimConfig, num_samples: int, speed: Speed, *, num_val: int = 0) -> float:
    """Wall seconds of a training stage on `num_samples` that validates on `num_val`; infinite where none fills a batch.

    A step's time is taken as proportional to its pixels while the resolution ramps.
    """
    plan = Plan(num_samples, optim)
    if not plan.steps_per_epoch:
        return float("inf")
    seconds, done = speed.startup_s, 0
    for epoch in range(plan.num_epochs):
        images = (plan.last_step(epoch) - done) * optim.batch_size
        seconds += speed.epoch_s + images * (plan.side(epoch) / optim.resolution) ** 2 / speed.images_per_s
        if (epoch + 1) % optim.val_every == 0 or epoch + 1 == plan.num_epochs:
            seconds += num_val / speed.val_images_per_s
        done = plan.last_step(epoch)
    return seconds + plan.num_epochs * speed.save_s
