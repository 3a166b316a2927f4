"""The config of one training run, and of its parts. `config_file` reads them; `run_config` has a whole run's."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from dp4tl_dist.config_file import (
    MAX_TOML_BYTES,
    PRESETS,
    Count,
    Model,
    NotNegative,
    Part,
    Positive,
    Seed,
    Share,
    Table,
    Workers,
    apply_overrides,
    find_config,
    load_config,
    read_toml,
    validate,
)
from dp4tl_dist.limits import MAX_WAIT_S
from dp4tl_dist.optim_config import OptimConfig

__all__ = [
    "MAX_TOML_BYTES", "PRESETS", "AdversarialConfig", "CheckpointConfig", "Count", "DataConfig", "EngineConfig",
    "LogConfig", "MocoConfig", "Model", "ModelConfig", "NotNegative", "OptimConfig", "Part", "Positive", "Seed",
    "Share", "Table", "TaskConfig", "TrainConfig", "Training", "Workers", "apply_overrides", "find_config",
    "load_config", "read_toml", "validate",
]  # fmt: skip


class DataConfig(Table):
    """Where the samples come from, and how they are cropped."""

    train: str = ""
    """The training beton."""
    val: str = ""
    """The validation beton; empty for none."""
    subset: str = ""
    """A subset file made for `train`; empty for all samples."""
    val_subset: str = ""
    """A subset file made for `val` (`dp4tl prune --apply-to`); empty for all samples."""
    steps_of: str = ""
    """A beton: train as many steps as `train.epochs` passes over all of it would take (sets `train.steps`)."""
    num_workers: Workers = 0
    """Decoding threads a rank; 0 shares the machine's cores evenly among its ranks."""
    os_cache: bool = True
    """Map the file and let the kernel cache it. False reads each page explicitly (files larger than memory)."""
    page_aware: bool = False
    """Draw samples from a moving window of shuffled pages; use it when the file does not fit in memory."""
    min_scale: Share = 0.08
    """Smallest share of the image's area that a random resized crop takes."""
    flip: bool = True
    """Mirror half of the training samples."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What an image that cannot be decoded does to the run. "skip": it is named, counted and left out of the loss."""


class ModelConfig(Table):
    """The network."""

    arch: str = "resnet18"
    """A name from `dp4tl_dist.models.ARCHITECTURES`, or `timm:NAME` when timm is installed."""
    init: str = ""
    """A checkpoint folder to start from; empty for a random start."""
    allow_incomplete: bool = False
    """Take an `init` from before its training's end, too."""


class AdversarialConfig(Table):
    """The L-infinity attack of adversarial training. Lengths are shares of the pixel range: 3/255 is 0.01176."""

    eps: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 3 / 255
    """Radius of the ball about each image."""
    steps: Count = 3
    step_size: NotNegative = 0.0
    """0: 2 eps / 3, and with fast = "fgsm" 1.25 eps."""
    random_start: bool = True
    fast: Literal["none", "fgsm"] = "none"
    """"fgsm": a single step, for two passes a batch instead of 1 + steps."""
    robust_val: bool = True
    """Validation reports accuracy under PGD-10 of the same radius, too."""


class MocoConfig(Table):
    """Momentum contrast, version 2."""

    queue: Count = 65_536
    """Keys of former batches that each query is held against; a multiple of the global batch."""
    temperature: Positive = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the key encoder: how much of it stays at each step."""
    dim: Count = 128
    """Length of queries and keys."""
    min_scale: Share = 0.2
    """Smallest share of the square that a view takes."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Strength of the changes of brightness, contrast and saturation; of the hue a quarter."""
    grayscale: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the views that lose their colours."""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the views that are blurred."""
    canvas: Annotated[float, Field(ge=1, le=4)] = 4 / 3
    """Side of the squares that views are cut from, in sides of a view."""
    bn_groups: Count = 1
    """Parts of a rank's shuffled keys that batch norm sees one at a time. Raise it on one rank, where there is no other
    rank to shuffle with."""
    neighbours: Count = 20
    """Of the kNN probe."""


class TaskConfig(Table):
    """What is learnt."""

    kind: Literal["supervised", "adversarial", "moco"] = "supervised"
    adversarial: AdversarialConfig = AdversarialConfig()
    moco: MocoConfig = MocoConfig()


def _suited(train: OptimConfig, info: ValidationInfo) -> OptimConfig:
    model = info.data.get("model")
    return train.suited(model.arch) if isinstance(model, ModelConfig) else train


Training = Annotated[OptimConfig, AfterValidator(_suited), Field(validate_default=True)]
"""How the weights of the table's `model`, a field before this one, move."""


class EngineConfig(Table):
    """What runs the step."""

    kind: Literal["ddp", "deepspeed"] = "ddp"
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed divides among the ranks: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block, and compute the rest again when gradients need it: slower, less memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: torch.compile on CUDA only."""
    channels_last: bool = True
    timeout_s: Annotated[float, Field(gt=0, le=MAX_WAIT_S, allow_inf_nan=False)] = 600.0
    """Seconds after which ranks that wait for a silent peer give up."""

    @model_validator(mode="after")
    def _consistent(self) -> "EngineConfig":
        if self.kind == "deepspeed" and self.compile == "on":
            raise ValueError('compile = "on" goes with kind = "ddp" only')
        return self


class LogConfig(Table):
    """What is written down, and how often."""

    every: Count = 50
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    order: bool = False
    """Also log each step's sample identifiers to order.jsonl (for drills; large)."""
    sample_losses: bool = False
    """Also log the loss of every training sample at every epoch, and the validation loss of each class, to
    sample_losses.npz: what `dp4tl score --method forgetting` and `cld` read."""


class CheckpointConfig(Table):
    """When the run is saved."""

    every_minutes: NotNegative = 15.0
    """Minutes between checkpoints inside an epoch; 0 for none."""
    epoch_end_s: NotNegative = 0.0
    """An epoch's end is saved where this many seconds have passed since the last checkpoint, where validation was never
    better, and at the run's end. 0 saves each."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk, beside the best one."""


class TrainConfig(Table):
    """One training run: surrogate and source model alike."""

    seed: Seed = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    train: Training = OptimConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
