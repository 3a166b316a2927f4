"""What was kept and why: rankings, cuts, and images straight from the betons."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dp4tl_dist.data.beton import JPEG, Beton
from dp4tl_dist.prune.select import rank_groups
from dp4tl_dist.prune.votes_file import Votes, load_votes
from dp4tl_dist.report.collect import Arm, Run

THUMB_SIDE = 96
AS_IT_IS_BYTES = 4096
SHOWN_CLASSES = 8
SHOWN_IMAGES = 3
SHOWN_TARGET_CLASSES = 24
SHOWN_VOTED = 5
ALL_THUMBS_BYTES = 2 << 20


@dataclass(frozen=True)
class Thumb:
    """One image for the page."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Cut:
    """How far down the ranking one arm keeps; a reversed arm keeps from the other end."""

    arm: str
    count: int
    reverse: bool
    share: float
    """Share of the votes that the kept classes hold."""


@dataclass(frozen=True)
class ClassSample:
    name: str
    votes: int
    thumbs: tuple[Thumb, ...]


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
    kept: NDArray[np.bool_]
    """(arms, classes): by class id."""
    cuts: tuple[Cut, ...]
    top_kept: tuple[ClassSample, ...]
    top_pruned: tuple[ClassSample, ...]
    affinities: tuple[Affinity, ...]


class Thumbs:
    """Makes small data URIs, up to a fixed number of bytes in all, so that the page stays small."""

    def __init__(self, run: Run) -> None:
        self.run, self.left = run, ALL_THUMBS_BYTES
        self.made: dict[tuple[Path, int], str | None] = {}

    def __call__(self, beton: Beton, index: int, caption: str) -> Thumb | None:
        """The image at a position; None where it cannot be read or the page is full."""
        key = (beton.path, index)
        if key not in self.made:
            self.made[key] = self.run.attempt(data_uri, beton, index)
        uri = self.made[key]
        if uri is None or len(uri) > self.left:
            return None
        self.left -= len(uri)
        return Thumb(uri, caption)


def data_uri(beton: Beton, index: int) -> str:
    """The stored JPEG itself where it is small; larger and raw images are shrunk first."""
    payload, height, width = beton.payload(index), int(beton.heights[index]), int(beton.widths[index])
    jpeg = int(beton.modes[index]) == JPEG
    if not jpeg or len(payload) > AS_IT_IS_BYTES:
        image = Image.open(io.BytesIO(payload)) if jpeg else Image.frombytes("RGB", (width, height), payload)
        image.draft("RGB", (2 * THUMB_SIDE, 2 * THUMB_SIDE))  # lets libjpeg decode at a fraction of the size
        image.thumbnail((THUMB_SIDE, THUMB_SIDE))
        small = io.BytesIO()
        image.convert("RGB").save(small, "JPEG", quality=80)
        payload = small.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(payload).decode()}"


def selections(run: Run) -> Iterator[Selection]:
    """One for each votes file that is there, in the order of the targets."""
    thumbs = Thumbs(run)
    source = run.betons.get("source")
    for target in run.config.targets:
        methods = dict.fromkeys(arm.voter for arm in run.arms)
        for method in methods:
            path = run.out / "votes" / f"vote-{method}-{target}.npz"
            if not path.is_file():
                continue
            votes = run.attempt(load_votes, path, beton=source)
            if votes is not None:
                yield _selection(run, target, method, votes, thumbs)


def _selection(run: Run, target: str, method: str, cast: Votes, thumbs: Thumbs) -> Selection:
    votes, num_classes = cast.votes[0], len(cast.classes)
    ranking = rank_groups(votes, cast.affinity[0])
    arms, cuts, rows = [], [], []
    for arm in run.arms:
        subset = run.subset(arm.trials[0]) if arm.target == target else None
        if subset is None or arm.voter != method or not len(subset.groups):
            continue
        if subset.groups[-1] >= num_classes:
            continue
        row = np.zeros(num_classes, bool)
        row[subset.groups] = True
        arms.append(arm)
        rows.append(row)
        reverse = arm.method.endswith("-reverse")
        cuts.append(Cut(arm.name, int(row.sum()), reverse, float(votes[row].sum() / max(1, votes.sum()))))
    kept = np.array(rows, bool).reshape(len(rows), num_classes)
    forward = [row for row, cut in zip(kept, cuts, strict=True) if not cut.reverse]
    least = min(forward, key=lambda row: int(row.sum()), default=np.zeros(num_classes, bool))
    sample = _Sampler(run, thumbs, cast)
    top_kept = sample.classes([int(i) for i in ranking if least[i]][:SHOWN_CLASSES])
    top_pruned = sample.classes([int(i) for i in ranking if not least[i]][:SHOWN_CLASSES] if forward else [])
    target_train = run.betons.get(f"{target}-train")
    affinities = tuple(sample.affinities(target_train, least)) if target_train else ()
    return Selection(
        target, method, tuple(arms), cast.what, cast.classes, votes, ranking, kept, tuple(cuts),
        top_kept, top_pruned, affinities,
    )  # fmt: skip


class _Sampler:
    """Picks the images that stand for groups: a class's first ones in the file, which is shuffled, or those nearest to
    a cluster's centre."""

    def __init__(self, run: Run, thumbs: Thumbs, votes: Votes) -> None:
        self.source, self.thumbs, self.votes = run.betons.get("source"), thumbs, votes

    def classes(self, ids: list[int]) -> tuple[ClassSample, ...]:
        return tuple(
            ClassSample(self.votes.classes[i], int(self.votes.votes[0][i]), self._images(self.source, i)) for i in ids
        )

    def _images(self, beton: Beton | None, label: int, count: int = SHOWN_IMAGES) -> tuple[Thumb, ...]:
        if beton is None:
            return ()
        members = self.votes.members
        chosen = np.flatnonzero(beton.labels == label) if members is None else members.nearest[label]
        found = [
            self.thumbs(beton, int(index), beton.classes[beton.labels[index]]) for index in chosen[:count] if index >= 0
        ]
        return tuple(thumb for thumb in found if thumb)

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
                left, right = self.thumbs(target, index, target.classes[label]), self._images(self.source, i, 1)
                if left and right:
                    pairs.append((left, right[0]))
            yield Affinity(target.classes[label], len(mine), voted, tuple(pairs))
