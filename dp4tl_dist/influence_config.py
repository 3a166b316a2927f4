"""The config of `dp4tl influence`, and the part of it that a whole run has as [influence]."""

from typing import Annotated

from pydantic import Field

from dp4tl_dist.config import EngineConfig, ModelConfig, OptimConfig, Part, Seed, Share, Table, Training, Workers
from dp4tl_dist.limits import MAX_MASKS

Setting = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str


class SmallModels(Table):
    """The small models that stand for large ones, and how they are judged."""

    masks: Annotated[int, Field(ge=4, le=MAX_MASKS)] = 200
    """How many models. More may be added later; the first ones stay."""
    model: ModelConfig = ModelConfig()
    train: Training = OptimConfig()
    min_scale: Share = 0.08
    num_workers: Workers = 0
    val_share: Part = 0.5
    """The part of the target's training set that judges the linear probe; the rest trains it."""
    lp: dict[str, Setting] = {}
    """Overrides of the linear probe's `train` keys."""


class InfluenceConfig(SmallModels):
    """Which source and target, and the small models."""

    source: str
    """The source's training beton."""
    target: str
    """The target's training beton. A part of it judges; the target's test set is not read."""
    seed: Seed = 0
    engine: EngineConfig = EngineConfig()
