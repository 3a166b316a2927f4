"""The config of a whole run: what `dp4tl run` and the cluster launcher carry out."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dp4tl_dist.arm_name import AUTO, METHODS, STEPS, ArmName, fault, normalised, parse_arm
from dp4tl_dist.config import (
    CheckpointConfig,
    Count,
    EngineConfig,
    LogConfig,
    ModelConfig,
    NotNegative,
    OptimConfig,
    Part,
    Positive,
    Seed,
    Share,
    Table,
    TaskConfig,
    TrainConfig,
    Training,
    Workers,
    load_config,
)
from dp4tl_dist.config_file import CountOrNone, Ranks, following
from dp4tl_dist.influence_config import SmallModels
from dp4tl_dist.slurm_config import SlurmConfig

__all__ = ["AUTO", "METHODS", "STEPS", "ArmName", "RunConfig", "StageTrain", "TargetConfig", "parse_arm"]

SYNTHETIC = "synthetic:"
Setting = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
TAKEN = {"source": "the source's files", "joint": "the files of arms for all targets together"}
"""What cannot name a target, and why."""


class SourceConfig(Table):
    """The source dataset: image folders (DIR/<class>/<image>), betons, or "synthetic:source/SPLIT"."""

    train: str
    val: str = ""


class TargetConfig(Table):
    """A target dataset, in the same forms."""

    train: str
    test: str
    weight: Positive = 1.0
    """What its votes count in a joint arm."""

    @model_validator(mode="after")
    def _apart(self) -> "TargetConfig":
        if os.path.realpath(self.train) == os.path.realpath(self.test):
            raise ValueError(f"train and test are the same, {self.train}: a test on what was trained on tells nothing")
        return self


class WriteConfig(Table):
    """How image folders become betons."""

    max_side: CountOrNone = 400
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    seed: Seed = 0
    skip_bad: bool = False
    reencode: bool = False
    """Encode the JPEGs anew that could be kept as they are."""


class ClusterStage(Table):
    """The groups that fm arms vote for: clusters of the source, for sources without labels; else its classes."""

    count: CountOrNone = 0
    """How many; 0 for classes."""
    init: Literal["kmeans++", "sample"] = "kmeans++"
    iterations: Count = 100
    tolerance: NotNegative = 1e-4
    store_precision: Literal["float32", "float16"] = "float32"
    seed: Seed = 0


class StageTrain(Table):
    """What a training stage sets; the data come from the graph."""

    preset: str = ""
    """A preset or a training config that this table's other keys change. Read when the config is; then it is empty."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    train: Training = OptimConfig()
    min_scale: Share = 0.08
    flip: bool = True
    page_aware: bool = False
    num_workers: Workers = 0

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, content: Any) -> Any:
        name = content.get("preset") if isinstance(content, dict) else None
        return on_preset(name, content, cls) if isinstance(name, str) and name else content


def on_preset(name: str, content: dict[str, Any], table: type[Table]) -> dict[str, Any]:
    """`content` of a training stage on top of the training config called `name`."""
    base = load_config(TrainConfig, name).model_dump(mode="json", exclude_unset=True)
    base |= {key: value for key, value in base.pop("data", {}).items() if key in table.model_fields}
    for key in content["train"] if isinstance(content.get("train"), dict) else ():
        base = following(base, ["train", key])
    if foreign := sorted(base.keys() - table.model_fields.keys()):
        raise ValueError(
            f"the preset {name} sets {foreign[0]!r}, which is the whole run's: set it there, without preset"
        )
    return {**merged(base, content), "preset": ""}


def merged(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `content`, table by table."""
    both = {key: merged(base[key], value) for key, value in content.items()
            if isinstance(value, dict) and isinstance(base.get(key), dict)}  # fmt: skip
    return {**base, **content, **both}


class TransferStage(Table):
    """How arms are judged. `lp` and `ff` override the published recipes' `train` keys; `ff` also min_scale and flip."""

    modes: tuple[Literal["lp", "ff"], ...] = ("lp",)
    cached: bool = False
    """Linear probes on features computed once."""
    robust: bool = False
    """Also accuracy under attack (PGD-10, L-infinity, 3/255)."""
    val_share: Part = 0.1
    lp: dict[str, Setting] = {}
    ff: dict[str, Setting] = {}


class RunConfig(Table):
    """A whole run: one surrogate, several arms, several targets, several seeds."""

    source: SourceConfig
    targets: dict[str, TargetConfig]
    arms: tuple[str, ...] = ("dense", "lm@0.5", "random@0.5")
    """"dense", or METHOD[+WITHIN[:SHARE]]@KEEP[+SURROGATE][+steps]; see `dp4tl_dist.arm_name`. random@auto keeps as
    many classes as the first other arm at auto."""
    seeds: tuple[Seed, ...] = (0,)
    """Each arm is pretrained and transferred once for every seed. The surrogate takes the first."""
    nproc: Ranks = 1
    """Ranks of each training, voting and transfer stage."""
    compact: bool = False
    """Copy each arm's samples into a file of its own, instead of reading the full one by index."""
    combine: Literal["normalised", "max", "counts", "sum"] = "normalised"
    """How the votes of several targets count together in a joint arm; see `dp4tl prune --combine`."""
    write: WriteConfig = WriteConfig()
    surrogate: StageTrain = StageTrain()
    surrogates: dict[str, StageTrain] = {}
    """Further surrogates by name, for arms like lm@0.5+NAME."""
    clusters: ClusterStage = ClusterStage()
    influence: SmallModels = SmallModels()
    """The small models of the arms influence@KEEP."""
    pretrain: StageTrain = StageTrain()
    transfer: TransferStage = TransferStage()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    slurm: SlurmConfig = SlurmConfig()
    """What launch/submit.py asks a cluster for. It does not change what a stage makes."""

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if wrong := fault(arm):
                raise ValueError(wrong)
        if not arms:
            raise ValueError("at least one arm")
        first: dict[object, str] = {}
        for arm in arms:
            found = parse_arm(normalised(arm))
            meaning = found.same if found else arm
            if meaning in first:
                raise ValueError(f"{first[meaning]!r} and {arm!r} are one arm: name it once")
            first[meaning] = arm
        return tuple(normalised(arm) for arm in arms)

    @field_validator("surrogates")
    @classmethod
    def _plain_surrogates(cls, surrogates: dict[str, StageTrain]) -> dict[str, StageTrain]:
        for name in surrogates:
            if not NAME.fullmatch(name) or name == STEPS:
                raise ValueError(
                    f"{name!r} cannot name a surrogate: use letters, digits, '_', '-' and '.', not 'steps'"
                )
        return surrogates

    @model_validator(mode="after")
    def _arms_have_what_they_need(self) -> "RunConfig":
        for name in self.arms:
            arm = parse_arm(name)
            if arm and arm.surrogate and not arm.asks_surrogate:
                what = "chance" if arm.is_random else "brute force"
                raise ValueError(f"the arm {name!r} asks for a surrogate, and {what} needs none: leave it out")
            if arm and arm.surrogate and arm.surrogate not in self.surrogates:
                known = ", ".join(self.surrogates) or "none"
                raise ValueError(f"the arm {name!r} asks for a surrogate that [surrogates] lacks (it has {known})")
            if arm and arm.is_random and arm.keep == AUTO and self.leader(arm) is None:
                raise ValueError(f"the arm {name!r} is as large as another arm at auto: add one, like lm@auto")
        return self

    def leader(self, arm: ArmName) -> str | None:
        """The first arm that votes for its own size, by the same surrogate: a random arm at auto is as large."""
        for name in self.arms:
            other = parse_arm(name)
            if other and other.keep == AUTO and other.votes and other.surrogate == arm.surrogate:
                return name
        return None

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
            if name in TAKEN:
                raise ValueError(f"{name!r} cannot name a target: {TAKEN[name]} have that name")
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a target: use letters, digits, '_', '-' and '.'")
        return targets
