"""What brute force says of each source class (`dp4tl influence`), and how far the votes agree with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.arm_name import INFLUENCE
from dp4tl_dist.data.beton import Beton
from dp4tl_dist.prune.influence import Influence, agreement, load_influence, rank_influence
from dp4tl_dist.report.collect import Arm, Run
from dp4tl_dist.report.selection import SHOWN_CLASSES, SHOWN_IMAGES, Selection, kept_by
from dp4tl_dist.report.thumbs import ALL_THUMBS_BYTES, ClassSample, Thumbs

SHARE_OF_THUMBS = 0.2


@dataclass(frozen=True, eq=False)
class Force:
    """One influence file, what the arms made of it, and the votes beside it."""

    target: str
    arms: tuple[Arm, ...]
    classes: tuple[str, ...]
    influence: NDArray[np.float64]
    stderr: NDArray[np.float64]
    ranking: NDArray[np.int64]
    kept: NDArray[np.bool_]
    """(arms, classes): by class id."""
    num_models: int
    helpful: tuple[ClassSample, ...]
    harmful: tuple[ClassSample, ...]
    agreement: tuple[tuple[str, dict[str, Any]], ...]
    """(what voted, `prune.influence.agreement` of its ranking with this one)."""


def forces(run: Run, found: Sequence[Selection]) -> Iterator[Force]:
    """One for each influence file that is there, in the order of the targets."""
    source = run.betons.get("source")
    for target in run.config.targets:
        path = run.out / INFLUENCE / f"{INFLUENCE}-{target}.npz"
        read = run.attempt(load_influence, path, beton=source) if source and path.is_file() else None
        if source is not None and read is not None:
            yield _force(run, target, source, read, [item for item in found if item.target == target])


def _force(run: Run, target: str, source: Beton, read: Influence, found: Sequence[Selection]) -> Force:
    thumbs = Thumbs(run, int(run.detail * SHARE_OF_THUMBS * ALL_THUMBS_BYTES / len(run.config.targets)))
    ranking = rank_influence(read.influence)

    def samples(ids: list[int]) -> tuple[ClassSample, ...]:
        said = [f"{100 * read.influence[i]:+.2f} ± {100 * read.stderr[i]:.2f} points" for i in ids]
        images = [thumbs.of(source, np.flatnonzero(source.labels == i)[:SHOWN_IMAGES].tolist()) for i in ids]
        return tuple(map(ClassSample, [source.classes[i] for i in ids], said, images))

    half = min(SHOWN_CLASSES // 2, len(ranking) // 2)
    arms, kept = kept_by(run, target, INFLUENCE, len(ranking))
    same = [item for item in found if item.classes == source.classes]
    agreed = [(item.method, agreement(item.ranking, ranking)) for item in same]
    return Force(
        target, arms, source.classes, read.influence, read.stderr, ranking, kept, len(read.accuracy),
        samples(ranking[:half].tolist()), samples(ranking[::-1][:half].tolist()), tuple(agreed),
    )  # fmt: skip
