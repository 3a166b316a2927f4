"""What was kept and why: rankings, cuts, and images straight from the betons."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.prune.amount import Suggestion, suggest
from dp4tl_dist.prune.select import rank_groups
from dp4tl_dist.prune.votes_file import Votes, load_votes
from dp4tl_dist.report.collect import Arm, Run
from dp4tl_dist.report.thumbs import ALL_THUMBS_BYTES, ClassSample, Thumb, Thumbs

SHOWN_CLASSES = 8
SHOWN_IMAGES = 3
SHOWN_TARGET_CLASSES = 24
SHOWN_VOTED = 5


@dataclass(frozen=True)
class Cut:
    """How far down the ranking one arm keeps; a reversed arm keeps from the other end."""

    arm: str
    count: int
    reverse: bool
    share: float
    """Share of the votes that the kept classes hold."""


@dataclass(frozen=True)
class Affinity:
    """One target class: which source classes its images voted for, most votes first."""

    name: str
    images: int
    voted: tuple[tuple[str, int, bool], ...]
    """(source class, votes, whether the arm with the fewest classes keeps it)."""
    pairs: tuple[tuple[Thumb, Thumb], ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """One votes file and what the arms made of it."""

    target: str
    method: str
    arms: tuple[Arm, ...]
    what: str
    """What the groups are: classes or clusters."""
    classes: tuple[str, ...]
    """The groups' names."""
    votes: NDArray[np.int64]
    ranking: NDArray[np.int64]
    sizes: NDArray[np.int64] | None
    """Source samples of each group; None where the source is not there."""
    suggestion: Suggestion
    """How many groups the votes suggest to keep."""
    kept: NDArray[np.bool_]
    """(arms, classes): by class id."""
    cuts: tuple[Cut, ...]
    top_kept: tuple[ClassSample, ...]
    top_pruned: tuple[ClassSample, ...]
    affinities: tuple[Affinity, ...]
    shown: str
    """Which images stand for a group."""


def selections(run: Run) -> Iterator[Selection]:
    """One for each votes file that is there, in the order of the targets."""
    source = run.betons.get("source")
    methods = dict.fromkeys(arm.voter for arm in run.arms)
    paths = {
        (target, method): path
        for target in run.config.targets
        for method in methods
        if (path := run.out / "votes" / f"vote-{method}-{target}.npz").is_file()
    }
    for (target, method), path in paths.items():
        votes = run.attempt(load_votes, path, beton=source)
        if votes is not None:
            yield _selection(run, target, method, votes, Thumbs(run, int(run.detail * ALL_THUMBS_BYTES / len(paths))))


def _selection(run: Run, target: str, method: str, cast: Votes, thumbs: Thumbs) -> Selection:
    votes, num_classes = cast.votes[0], len(cast.classes)
    ranking = rank_groups(votes, cast.affinity[0])
    arms, kept = kept_by(run, target, method, num_classes)
    cuts = [
        Cut(arm.name, int(row.sum()), arm.method.endswith("-reverse"), float(votes[row].sum() / max(1, votes.sum())))
        for arm, row in zip(arms, kept, strict=True)
    ]
    forward = [row for row, cut in zip(kept, cuts, strict=True) if not cut.reverse]
    least = min(forward, key=lambda row: int(row.sum()), default=np.zeros(num_classes, bool))
    sample = _Sampler(run, thumbs, cast)
    top_kept = sample.classes([int(i) for i in ranking if least[i]][:SHOWN_CLASSES])
    top_pruned = sample.classes([int(i) for i in ranking if not least[i]][:SHOWN_CLASSES] if forward else [])
    target_train = run.betons.get(f"{target}-train")
    affinities = tuple(sample.affinities(target_train, least)) if target_train else ()
    source = run.betons.get("source")
    sizes = None
    if cast.members is not None:
        sizes = np.bincount(cast.members.assignment, minlength=num_classes)
    elif source is not None:
        sizes = np.bincount(source.labels[source.labels >= 0], minlength=num_classes)
    return Selection(
        target, method, arms, cast.what, cast.classes, votes, ranking, sizes, suggest(votes[ranking]), kept,
        tuple(cuts), top_kept, top_pruned, affinities,
        "Shown are the images " + ("nearest to each cluster's centre, nearest first." if cast.members is not None else
        "nearest to the mean of each class, of its first ones, nearest first." if cast.closest is not None else
        "that each class begins with."),
    )  # fmt: skip


def kept_by(run: Run, target: str, method: str, num_classes: int) -> tuple[tuple[Arm, ...], NDArray[np.bool_]]:
    """The arms on a target that choose whole groups by these votes (or by influence), and what each one keeps
    (arms, classes)."""
    arms, rows = [], []
    for arm in run.arms:
        subset = run.subset(arm.trials[0]) if arm.target == target and arm.voter == method else None
        if subset is None or not len(subset.groups) or subset.groups[-1] >= num_classes:
            continue
        row = np.zeros(num_classes, bool)
        row[subset.groups] = True
        arms.append(arm)
        rows.append(row)
    return tuple(arms), np.array(rows, bool).reshape(len(rows), num_classes)


class _Sampler:
    """Picks the images that stand for groups: those nearest to a cluster's centre or (FM) a class's mean; for LM
    a class's first ones in the file, which is shuffled."""

    def __init__(self, run: Run, thumbs: Thumbs, votes: Votes) -> None:
        self.source, self.thumbs, self.votes = run.betons.get("source"), thumbs, votes

    def classes(self, ids: list[int]) -> tuple[ClassSample, ...]:
        return tuple(
            ClassSample(self.votes.classes[i], f"{self.votes.votes[0][i]} votes", self._images(i)) for i in ids
        )

    def _images(self, label: int, count: int = SHOWN_IMAGES) -> tuple[Thumb, ...]:
        if self.source is None:
            return ()
        near = self.votes.closest if self.votes.members is None else self.votes.members.nearest
        chosen = np.flatnonzero(self.source.labels == label) if near is None else near[label]
        return self.thumbs.of(self.source, [index for index in chosen[:count].tolist() if index >= 0])

    def affinities(self, target: Beton, kept: NDArray[np.bool_]) -> Iterator[Affinity]:
        """Row by row of the table target class x source class."""
        predictions = self.votes.predictions
        if len(predictions) != target.num_samples:
            return
        for label in range(target.num_classes):
            mine = np.flatnonzero(target.labels == label)
            counts = np.bincount(predictions[mine], minlength=len(self.votes.classes))
            order = [int(i) for i in np.lexsort((np.arange(len(counts)), -counts))[:SHOWN_VOTED] if counts[i]]
            voted = tuple((self.votes.classes[i], int(counts[i]), bool(kept[i])) for i in order)
            pairs = []
            for i in order[:2] if label < SHOWN_TARGET_CLASSES else []:
                index = int(mine[predictions[mine] == i][0])
                left, right = self.thumbs(target, index, target.classes[label]), self._images(i, 1)
                if left and right:
                    pairs.append((left, right[0]))
            yield Affinity(target.classes[label], len(mine), voted, tuple(pairs))
