"""The table `train` of a training config: how the weights move, and at which sides images are seen meanwhile."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dp4tl_dist.config_file import Count, CountOrNone, NotNegative, Share, Side, SideOrNone, Table
from dp4tl_dist.limits import MAX_DECAY, MAX_RATE
from dp4tl_dist.sides import FIXED_RESOLUTION, start_side, takes_one_side, val_side


class OptimConfig(Table):
    """How the weights move."""

    epochs: Count = 16
    """Passes over the samples; with `steps`, the unit that schedule and ramp count in."""
    steps: CountOrNone = 0
    """Optimizer steps in all, however many passes they make; schedule and ramp stretch to fit. 0: `epochs` decide."""
    batch_size: Count = 1024
    """The *global* batch: the sum over all ranks."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=MAX_RATE, allow_inf_nan=False)] = 0.5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=MAX_DECAY, allow_inf_nan=False)] = 5e-5
    schedule: Literal["triangular", "cosine", "constant"] = "triangular"
    peak_epoch: NotNegative = Field(default_factory=lambda data: min(2.0, data["epochs"] / 8))
    """Epochs of linear warm-up before the peak (triangular and cosine). Unset: an eighth of `epochs`, at most 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate: Count = 1
    """Micro-batches that one optimizer step sums over. The global batch counts them all."""
    clip_norm: NotNegative = 0.0
    """Largest gradient norm; 0 does not clip."""
    resolution: Side = 192
    """Side of the training crops in pixels, at the end of the ramp."""
    resolution_step: Count = 32
    """Resolutions within a ramp are multiples of this."""
    ramp: bool = False
    """Train on smaller crops first. The published ramp, which the next three keys change: from 5/6 of `resolution`
    (160 px for 192), between 11/16 and 13/16 of the epochs; the last one is at full size."""
    start_resolution: SideOrNone = Field(
        default_factory=lambda data: start_side(data["resolution"], data["resolution_step"]) if data["ramp"] else 0
    )
    """Side before the ramp; 0 means no ramp."""
    ramp_start: NotNegative = Field(default_factory=lambda data: _ramp_at(11 / 16, data))
    """Epoch at which the resolution starts to grow."""
    ramp_end: NotNegative = Field(default_factory=lambda data: _ramp_at(13 / 16, data))
    """Epoch from which the resolution is full."""
    val_resolution: Side = Field(default_factory=lambda data: val_side(data["resolution"]))
    """Side of the centre crop for validation and voting. Unset it follows from `resolution` (256 for 192, 32
    for 32; `dp4tl_dist.sides` has the rule)."""
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
        if self.start_resolution and self.ramp_end > self.epochs:
            raise ValueError(f"ramp_end {self.ramp_end} is past the last epoch {self.epochs}")
        if 0 < self.resolution < self.start_resolution:
            raise ValueError(f"start_resolution {self.start_resolution} is above resolution {self.resolution}")
        return self

    def suited(self, arch: str) -> "OptimConfig":
        """These settings for a network: what is not set of the resolutions follows from the only one that it takes."""
        if not takes_one_side(arch):
            return self
        side = self.resolution if "resolution" in self.model_fields_set else FIXED_RESOLUTION.get(arch, self.resolution)
        sides = {"resolution": side, "start_resolution": 0, "val_resolution": side}
        return self.model_copy(update={key: sides[key] for key in sides.keys() - self.model_fields_set})


def _ramp_at(share: float, data: dict[str, int]) -> float:
    """The epoch at that share of them all, and before the last one, which is to be at the full resolution."""
    return min(share * data["epochs"], data["epochs"] - 1.0) if data["start_resolution"] else 0.0
