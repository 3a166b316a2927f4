"""The sides, in pixels, at which a network sees images: each follows from the side of the crops it was trained on.

Training shows objects larger than they are (a crop is a part of the image, enlarged), and so a network is best tested
on images somewhat larger than its training crops. The published recipe does so: 256 px in validation and 224 px in
transfer for crops of 192 px. Small networks for small images have no such room: at 32 px all three are 32 px.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp4tl_dist.errors import UserError

STEP = 32
"""Strides of the usual networks multiply to this."""
FIXED_RESOLUTION = {"vit_b_16": 224}
FITS = (0.8, 1.5)
"""From which to which multiple of its training side a network sees images without a warning."""
LARGEST = 1 << 16


@dataclass(frozen=True)
class TrainedAt:
    """What a checkpoint tells of how its network saw images."""

    arch: str
    resolution: int
    """Side of the training crops, at the end of a ramp."""
    val_resolution: int
    val_ratio: float


def takes_one_side(arch: str) -> bool:
    """Whether a network is to be shown what it was trained on and nothing else. Many of timm's take no other size."""
    return arch in FIXED_RESOLUTION or arch.startswith("timm:")


def val_side(resolution: int, arch: str = "") -> int:
    """Of validation, voting and scoring: 4/3 of the training side, at most 256 px, unless training was larger."""
    return resolution if takes_one_side(arch) else _grown(resolution, 4, 3, most=256)


def transfer_side(resolution: int, arch: str = "") -> int:
    """Of a transfer: 7/6 of the training side, at most 224 px, unless training was larger."""
    return resolution if takes_one_side(arch) else _grown(resolution, 7, 6, most=224)


def start_side(resolution: int, step: int) -> int:
    """Of the crops before a ramp: 5/6 of its end, to the nearest multiple of `step`; 0, no ramp, where that is none."""
    start = round(resolution * 5 / 6 / step) * step
    return start if start < resolution else 0


def _grown(side: int, numerator: int, denominator: int, *, most: int) -> int:
    return max(side, min(most, side * numerator // denominator // STEP * STEP))


def misfit(what: str, side: int, trained: int) -> str:
    """What to warn of where a network trained at `trained` px is to see images at `side`; empty where that fits."""
    low, high = FITS
    if low * trained <= side <= high * trained:
        return ""
    return (
        f"{what} {side} px does not fit a network that is trained at {trained} px: it will look worse than it is; "
        "left out, it follows from the network"
    )


def trained_at(meta: dict[str, Any], path: Path) -> TrainedAt:
    """What the meta of the checkpoint at `path` tells; a UserError where it does not."""
    try:
        train = meta["config"]["train"]
        arch, ratio = meta["config"]["model"]["arch"], train["val_ratio"]
        sides = train["resolution"], train["val_resolution"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} lacks {error} in its meta: is it one of `dp4tl train`?") from error
    whole = all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < LARGEST for side in sides)
    if not whole or not isinstance(arch, str) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise UserError(
            f"the checkpoint {path} was trained at {sides[0]!r} px and validated at {sides[1]!r} px of {ratio!r}, says "
            "its meta: it is damaged, or not one of `dp4tl train`"
        )
    return TrainedAt(arch, *sides, float(ratio))
