"""Configs: TOML read into frozen, documented, strictly validated models. An unknown key is an error."""

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dp4tl_dist.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_BYTES = 1 << 20
PRESETS = Path(__file__).parent / "presets"

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Table(BaseModel):
    """Base of every config table: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
    num_workers: Annotated[int, Field(ge=0)] = 0
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


class OptimConfig(Table):
    """How the weights move."""

    epochs: Count = 16
    batch_size: Count = 1024
    """The *global* batch: the sum over all ranks."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 5e-5
    schedule: Literal["triangular", "cosine", "constant"] = "triangular"
    peak_epoch: NotNegative = 2.0
    """Epochs of linear warm-up before the peak (triangular and cosine)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate: Count = 1
    """Micro-batches that one optimizer step sums over. The global batch counts them all."""
    clip_norm: NotNegative = 0.0
    """Largest gradient norm; 0 does not clip."""
    resolution: Count = 192
    """Side of the training crops in pixels, at the end of the ramp."""
    start_resolution: Annotated[int, Field(ge=0)] = 0
    """Side before the ramp; 0 means no ramp."""
    ramp_start: NotNegative = 0.0
    """Epoch at which the resolution starts to grow."""
    ramp_end: NotNegative = 0.0
    """Epoch from which the resolution is full."""
    resolution_step: Count = 32
    """Resolutions are multiples of this."""
    val_resolution: Count = 256
    """Side of the centre crop for validation and voting."""
    val_ratio: Share = 224 / 256
    """Side of the centre crop as a share of the image's shorter side."""
    val_every: Count = 1
    """Validate after every so many epochs, and after the last."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.peak_epoch > self.epochs:
            raise ValueError(f"peak_epoch {self.peak_epoch} is past the last epoch {self.epochs}")
        if self.start_resolution and self.ramp_end < self.ramp_start:
            raise ValueError(f"ramp_end {self.ramp_end} is before ramp_start {self.ramp_start}")
        return self


class EngineConfig(Table):
    """What runs the step."""

    kind: Literal["ddp"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: torch.compile on CUDA only."""
    channels_last: bool = True
    timeout_s: Positive = 600.0
    """Seconds after which ranks that wait for a silent peer give up."""


class LogConfig(Table):
    """What is written down, and how often."""

    every: Count = 50
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = True
    order: bool = False
    """Also log each step's sample identifiers to order.jsonl (for drills; large)."""


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

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


Model = TypeVar("Model", bound=Table)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file (or the resolved .json of an earlier run) as a dict; anything else is a UserError with the line."""
    try:
        if path.stat().st_size > MAX_TOML_BYTES:
            raise OSError(errno.EFBIG, "it is too large for a config")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        repr(content)  # a hexadecimal number of thousands of digits can be read, but neither shown nor written down
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror}): check --config") from error
    except (ValueError, RecursionError) as error:  # syntax, letters, numbers of thousands of digits, nesting
        raise UserError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a table of keys and values: is it a config?")
    return content


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or the name of a preset that ships with the package."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    preset = PRESETS / f"{name}.toml"
    if not preset.exists():
        known = ", ".join(sorted(item.stem for item in PRESETS.glob("*.toml")))
        raise UserError(f"no config file and no preset is called {name!r}: pass a .toml file or one of {known}")
    return preset


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`content` with each `a.b=value` set. Values are TOML; what is not valid TOML is taken as a string."""
    result: dict[str, Any] = dict(content)
    for override in overrides:
        dotted, sign, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not sign or not all(keys):
            raise UserError(f"--set {override!r} is not of the form table.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
            repr(value)  # as in `read_toml`
        except (ValueError, RecursionError):
            value = text.strip()
        here = result
        for key in keys[:-1]:
            inner = here.get(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"--set {override!r}: {key!r} is a value, not a table")
            here[key] = dict(inner)
            here = here[key]
        here[keys[-1]] = value
    return result


def validate(model: type[Model], content: dict[str, Any], *, source: str) -> Model:
    """`content` as a `model`, or a UserError that names the key, the reason and, for a typo, the known keys."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole config"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(model, first["loc"][:-1]))
            raise UserError(f"{source}: unknown key {where!r}{more}: known here are {known}") from error
        shown = f", not {first['input']!r}" if not isinstance(first["input"], dict) else ""
        raise UserError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}{shown}{more}") from error


def load_config(model: type[Model], name: str, overrides: list[str] | None = None) -> Model:
    """Read, override and validate the config that `--config NAME` and `--set` describe."""
    path = find_config(name)
    return validate(model, apply_overrides(read_toml(path), overrides or []), source=str(path))


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `location` takes; list indices and names in mappings are skipped."""
    here: Any = model
    for part in location:
        inner = here.model_fields[part].annotation if part in getattr(here, "model_fields", {}) else here
        here = next((kind for kind in _models_in(inner)), here)
    return sorted(here.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
