"""The losses file: what each sample of a training lost, epoch by epoch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz

KIND = "losses"
NAME = "sample_losses.npz"
"""Its name in a run folder."""


@dataclass(frozen=True, eq=False)
class SampleLosses:
    losses: NDArray[np.float32]
    """(epochs, samples): what the sample lost (cross-entropy) when the epoch saw it; NaN where it did not."""
    correct: NDArray[np.bool_]
    """(epochs, samples): whether its label had the largest output then."""
    val_losses: NDArray[np.float32]
    """(epochs, classes): the mean over each class's validation samples after the epoch; NaN where there is none."""
    meta: dict[str, Any] = field(default_factory=dict)


def save_losses(path: Path, losses: SampleLosses) -> None:
    """Write `losses` atomically. Its meta must name the fingerprint of the training beton: meta["inputs"]["train"]."""
    arrays = {"losses": losses.losses, "correct": losses.correct, "val_losses": losses.val_losses}
    save_npz(path, arrays, {**losses.meta, "kind": KIND})


def load_losses(path: Path, *, beton: Beton | None = None) -> SampleLosses:
    """Load and validate losses; with `beton`, refuse those of a training on another file."""
    arrays, meta = load_npz(path, KIND)
    losses = require_array(path, arrays, "losses", dtype="float32", ndim=2)
    correct = require_array(path, arrays, "correct", dtype="bool", ndim=2)
    val_losses = require_array(path, arrays, "val_losses", dtype="float32", ndim=2)
    shape, classes = losses.shape, val_losses.shape[1]
    if beton is not None:
        inputs = meta.get("inputs")
        expected = inputs.get("train") if isinstance(inputs, dict) else None
        check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
        shape = (len(losses), beton.num_samples)
        classes = beton.num_classes
    whole = losses.shape == correct.shape == shape and val_losses.shape == (len(losses), classes)
    if not whole or min(*shape, classes) < 1 or np.isinf(losses).any() or np.isinf(val_losses).any():
        raise UserError(f"{path} holds losses that do not fit together: train again with log.sample_losses")
    return SampleLosses(losses, correct, val_losses, meta)
