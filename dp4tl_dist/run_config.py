"""The config of a whole run: what `dp4tl run` and the cluster launcher carry out."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dp4tl_dist.config import (
    CheckpointConfig,
    Count,
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    Share,
    Table,
    TaskConfig,
)

ARM = re.compile(r"(?P<method>[a-z-]+)@(?P<keep>[0-9.]+)")
METHODS = ("lm", "fm", "lm-reverse", "fm-reverse", "random", "random-samples")
SYNTHETIC = "synthetic:"
Setting = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class SourceConfig(Table):
    """The source dataset: image folders (DIR/<class>/<image>), betons, or "synthetic:source/SPLIT"."""

    train: str
    val: str = ""


class TargetConfig(Table):
    """A target dataset, in the same forms."""

    train: str
    test: str


class WriteConfig(Table):
    """How image folders become betons."""

    max_side: Annotated[int, Field(ge=0)] = 400
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    seed: Annotated[int, Field(ge=0)] = 0
    skip_bad: bool = False


class StageTrain(Table):
    """What a training stage sets; the data come from the graph."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    train: OptimConfig = OptimConfig()
    min_scale: Share = 0.08
    flip: bool = True
    page_aware: bool = False
    num_workers: Annotated[int, Field(ge=0)] = 0


class TransferStage(Table):
    """How arms are judged. `lp` and `ff` override the published recipes' `train` keys."""

    modes: tuple[Literal["lp", "ff"], ...] = ("lp",)
    cached: bool = False
    """Linear probes on features computed once."""
    val_share: Share = 0.1
    lp: dict[str, Setting] = {}
    ff: dict[str, Setting] = {}


class RunConfig(Table):
    """A whole run: one surrogate, several arms, several targets, several seeds."""

    source: SourceConfig
    targets: dict[str, TargetConfig]
    arms: tuple[str, ...] = ("dense", "lm@0.5", "random@0.5")
    """"dense", or METHOD@KEEP with a share of the classes to keep and a method of `METHODS`."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Each arm is pretrained and transferred once for every seed. The surrogate takes the first."""
    nproc: Count = 1
    """Ranks of each training, voting and transfer stage."""
    compact: bool = False
    """Copy each arm's samples into a file of its own, instead of reading the full one by index."""
    write: WriteConfig = WriteConfig()
    surrogate: StageTrain = StageTrain()
    pretrain: StageTrain = StageTrain()
    transfer: TransferStage = TransferStage()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            found = ARM.fullmatch(arm)
            keep = found and re.fullmatch(r"0?\.[0-9]+|1(\.0*)?|0\.[0-9]+", found["keep"])
            if arm != "dense" and not (found and found["method"] in METHODS and keep and float(found["keep"]) > 0):
                raise ValueError(
                    f'{arm!r} is not "dense" or METHOD@KEEP with one of {", ".join(METHODS)} and 0 < KEEP <= 1'
                )
        if not arms or len(set(arms)) != len(arms):
            raise ValueError("at least one arm, and none twice")
        return arms

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError("at least one seed, and none twice")
        return seeds

    @field_validator("targets")
    @classmethod
    def _plain_names(cls, targets: dict[str, TargetConfig]) -> dict[str, TargetConfig]:
        if not targets:
            raise ValueError("at least one target: add [targets.NAME] with train and test")
        for name in targets:
            if name == "source":
                raise ValueError("'source' cannot name a target: the source's files have that name")
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a target: use letters, digits, '_', '-' and '.'")
        return targets
