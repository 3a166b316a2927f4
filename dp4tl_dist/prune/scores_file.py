"""The scores file: one number for every sample of a source, and which of them are kept."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_fingerprint, load_npz, require_array, save_npz
from dp4tl_dist.prune.ranking import RULES

KIND = "scores"


@dataclass(frozen=True, eq=False)
class Scores:
    scores: NDArray[Any]
    """(samples,), finite, by position in the source; float32 in a file."""
    method: str
    keeps: str
    """Which samples the method keeps: those with the "highest" scores, the "lowest", or the "middle"."""
    per_class: bool
    """Whether scores compare within a class alone, so that the same share of every class is kept."""
    meta: dict[str, Any] = field(default_factory=dict)


def save_scores(path: Path, scores: Scores) -> None:
    """Write `scores` atomically. Its meta must name the source's fingerprint: meta["inputs"]["source"]."""
    meta = {"kind": KIND, "method": scores.method, "keeps": scores.keeps, "per_class": scores.per_class}
    save_npz(path, {"scores": scores.scores.astype(np.float32)}, {**scores.meta, **meta})


def load_scores(path: Path, *, beton: Beton | None = None) -> Scores:
    """Load and validate scores; with `beton` (the source), refuse those that were made for another file."""
    arrays, meta = load_npz(path, KIND)
    scores = require_array(path, arrays, "scores", dtype="float32", ndim=1)
    method, keeps, per_class = (meta.pop(name, None) for name in ("method", "keeps", "per_class"))
    if beton is not None:
        inputs = meta.get("inputs")
        expected = inputs.get("source") if isinstance(inputs, dict) else None
        check_fingerprint("source", expected, beton.fingerprint, expected_from=path, actual_from=beton.path)
    fits = len(scores) == beton.num_samples if beton is not None else len(scores) > 0
    described = isinstance(method, str) and keeps in RULES and isinstance(per_class, bool)
    if not fits or not described or not np.isfinite(scores).all():
        raise UserError(f"{path} holds no score for each sample of a source: make it again with `dp4tl score`")
    return Scores(scores, method, keeps, per_class, meta)
