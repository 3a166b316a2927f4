"""What a training run is given: the objective, the samples, the recipe, and where its results go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp4tl_dist.config import CheckpointConfig, DataConfig, EngineConfig, LogConfig, OptimConfig
from dp4tl_dist.data.loader import TrainView, View
from dp4tl_dist.errors import UserError
from dp4tl_dist.schedule import Plan
from dp4tl_dist.train.evaluate import Score, Split, evaluate
from dp4tl_dist.train.loss_log import LossLog
from dp4tl_dist.train.task import Task

Evaluate = Callable[..., Score]
"""As `evaluate`: (task, engine, world, split, view) -> Score."""


@dataclass(frozen=True)
class Job:
    """All that `fit` needs. `config` and `inputs` are what a resumed run must have in common with its former self."""

    out: Path
    task: Task
    train: Split
    val: Split | None
    classes: tuple[str, ...]
    config: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    optim: OptimConfig
    data: DataConfig
    engine: EngineConfig
    log: LogConfig
    checkpoint: CheckpointConfig
    views: Callable[[int, int], View] | None = None
    """(side, epoch) -> what to decode, where that is not a random crop."""
    evaluate: Evaluate = evaluate
    """What validation is."""
    label: str = "train"
    losses: LossLog | None = None
    """Logs the loss of every sample."""
    made_from: tuple[dict[str, Any], ...] = ()
    """The metas of what it is trained on and starts from."""
    whole: bool = False
    """Leave no sample out of an epoch: for targets, which are small."""

    @property
    def plan(self) -> Plan:
        return Plan(len(self.train.kept), self.optim, self.whole)

    def view(self, side: int, epoch: int) -> View:
        """What to decode for training in `epoch`, at crops of `side`."""
        if self.views:
            return self.views(side, epoch)
        return TrainView(side, self.seed, epoch, self.data.min_scale, self.data.flip)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def check(self, num_ranks: int) -> None:
        """Raise UserError where batch, samples and ranks do not fit together."""
        check_batch(self.plan, num_ranks)


def check_batch(plan: Plan, num_ranks: int) -> int:
    """The samples of the smallest micro-batch of a rank; UserError where batch, samples and ranks do not fit."""
    batch, samples, parts = plan.optim.batch_size, plan.num_samples, num_ranks * plan.optim.accumulate
    among = f"{num_ranks} ranks" + (f" x {plan.optim.accumulate} micro-batches" if plan.optim.accumulate > 1 else "")
    if plan.whole:
        least = samples // max(plan.steps_per_epoch, 1)
        if least < parts:
            raise UserError(
                f"train.batch_size {batch}: of {samples} training samples a step has as few as {least}, fewer than "
                f"{among}: use fewer of them" + (", or larger batches" if batch < samples else "")
            )
        return least // parts
    if batch % parts:
        raise UserError(f"train.batch_size {batch} is not divisible by {among}: choose a multiple")
    if batch > samples:
        raise UserError(f"train.batch_size {batch} is larger than the {samples} training samples: choose a smaller one")
    return batch // parts
