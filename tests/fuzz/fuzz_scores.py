"""Scores, logged losses and checksums under mutation: their seeds, and what must hold of what the readers return."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.losses import SampleLosses, load_losses, save_losses
from dp4tl_dist.data.rows import checksum, describe_sample, load_rows, read_names, rows_path, save_rows
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.prune.clusters_file import Clusters, load_clusters, nearest, save_clusters
from dp4tl_dist.prune.loss_scores import cld, forgetting
from dp4tl_dist.prune.ranking import choose_samples
from dp4tl_dist.prune.scores_file import Scores, load_scores, save_scores

Files = dict[str, bytes]


def scores_seeds(folder: Path) -> list[Files]:
    rng, found = np.random.default_rng(1), []
    for size, keeps in ((24, "highest"), (1, "middle"), (7, "lowest")):
        meta = make_meta("scores", inputs={"source": "ef" * 16})
        save_scores(folder / "x.npz", Scores(rng.standard_normal(size), "el2n", keeps, size == 7, meta))
        found.append({"x.npz": (folder / "x.npz").read_bytes()})
    return found


def read_scores(folder: Path) -> Iterator[None]:
    found = load_scores(folder / "x.npz")
    assert len(found.scores) and np.isfinite(found.scores).all() and isinstance(found.meta, dict)
    kept = choose_samples(found.scores, 0.5, rule=found.keeps)
    assert len(kept) == max(1, (len(found.scores) + 1) // 2) and (np.diff(kept) > 0).all()
    yield


def losses_seeds(folder: Path) -> list[Files]:
    rng, found = np.random.default_rng(2), []
    for shape, classes in (((4, 24), 3), ((1, 1), 1), ((7, 5), 2)):
        losses = rng.random(shape).astype(np.float32)
        losses[rng.random(shape) < 0.2] = np.nan
        val = rng.random((shape[0], classes)).astype(np.float32)
        meta = make_meta("losses", inputs={"train": "ef" * 16})
        save_losses(folder / "x.npz", SampleLosses(losses, losses < 0.5, val, meta))
        found.append({"x.npz": (folder / "x.npz").read_bytes()})
    return found


def read_losses(folder: Path) -> Iterator[None]:
    found = load_losses(folder / "x.npz")
    labels = np.zeros(found.losses.shape[1], np.int64)
    scores = forgetting(found, labels)
    assert scores.min() >= 0 and scores.max() <= len(found.losses)
    with contextlib.suppress(UserError):  # fewer validated epochs than it takes
        scores = cld(found, labels)
    assert np.isfinite(scores).all()
    yield


# ---------------------------------------------------------------- clusters


def clusters_seeds(folder: Path) -> list[Files]:
    rng, found = np.random.default_rng(2), []
    for samples, groups, dim in ((24, 5, 3), (1, 1, 1), (9, 4, 2)):
        centres = rng.standard_normal((groups, dim))
        centres[-1] = np.nan if groups > 1 else 0.0
        assignment = rng.integers(0, max(1, groups - 1), samples).astype(np.int32)
        distances = rng.random(samples).astype(np.float32)
        meta = make_meta("clusters", inputs={"source": "ab" * 16, "surrogate": "cd" * 16})
        start = np.arange(groups, dtype=np.int64)
        save_clusters(folder / "x.npz", Clusters(centres, assignment, distances, start, 1.5, meta))
        found.append({"x.npz": (folder / "x.npz").read_bytes()})
    return found


def read_clusters(folder: Path) -> Iterator[None]:
    found = load_clusters(folder / "x.npz")
    assert found.sizes.sum() == len(found.assignment) == len(found.distances) and len(found.start) == found.num_clusters
    near = nearest(found, 3)
    assert near.min() >= -1 and near.max() < len(found.assignment) and isinstance(found.meta, dict)
    yield


# ---------------------------------------------------------------- checksums and names


def rows_beton(folder: Path) -> Beton:
    """24 samples as a beton tells of them; the file itself plays no part here."""
    ids, small = np.arange(24), np.full(24, 8, np.uint16)
    places = (ids + 9).astype(np.uint64)
    return Beton(
        folder / "x.beton", 1 << 21, "ab" * 16, ("a",), np.zeros(24, np.int64), ids, small, small,
        small.astype(np.uint8), places, places, ("image", "label", "identifier"),
    )  # fmt: skip


def rows_seeds(folder: Path) -> list[Files]:
    found, crc = [], [checksum(bytes([i]), label=0, identifier=i) for i in range(24)]
    for names in ([""] * 24, [f"ant/{i} é\udcff.jpg" for i in range(24)], ["", "a"] * 12):
        save_rows(folder / "x.beton", crc, names, fingerprint="ab" * 16)
        found.append({"x.npz": rows_path(folder / "x.beton").read_bytes()})
    return found


def read_rows(folder: Path) -> Iterator[None]:
    beton = rows_beton(folder)
    (folder / "x.npz").rename(rows_path(beton.path))
    rows, names = load_rows(beton), read_names(beton)
    assert rows is not None and rows.crc.shape == (24,) and not rows.proved.any()
    assert names is None or (len(names) == 24 and all(describe_sample(beton, i, names) for i in range(24)))
    rows.proves(beton, 23, b"\x17")
    yield
