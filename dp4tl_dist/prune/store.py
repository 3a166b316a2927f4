"""Features of a source on disk: each rank keeps its own rows in a file, and reads them a block at a time.

A block is mapped while it is used and let go afterwards, so that memory does not grow with the number of samples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.atomic import atomic_file
from dp4tl_dist.data.beton import Beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import read_json, write_json
from dp4tl_dist.prune.surrogate import Surrogate, shard
from dp4tl_dist.prune.votes import largest
from dp4tl_dist.world import World, all_max, all_sum, on_main

BLOCK_BYTES = 32 << 20
Precision = Literal["float16", "float32"]


@dataclass(frozen=True)
class Store:
    """The features of this rank's samples, rows in the order of their positions."""

    path: Path
    dtype: np.dtype[np.floating]
    first: int
    """The position of the first of this rank's samples in the source."""
    num_rows: int
    dim: int
    num_samples: int
    """Samples of all ranks."""
    largest: float
    """The largest magnitude in the features of all ranks."""
    reused: bool = False

    @property
    def num_bytes(self) -> int:
        """Of all ranks' files together."""
        return self.num_samples * self.dim * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(row of the first, features float32 (n, dim)) for all rows, in order."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for row in range(0, self.num_rows, step):
            yield row, self.rows(row, min(step, self.num_rows - row))

    def rows(self, row: int, count: int = 1) -> NDArray[np.float32]:
        """Features float32 (count, dim) from `row` on."""
        offset = row * self.dim * self.dtype.itemsize
        mapped = np.memmap(self.path, self.dtype, "r", offset, (count, self.dim))
        return np.array(mapped, np.float32)

    def gather(self, world: World, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features float32 (n, dim) of the samples at `positions` of the source, the same on every rank."""
        rows = np.zeros((len(positions), self.dim), np.float32)
        for i, position in enumerate(positions - self.first):
            if 0 <= position < self.num_rows:
                rows[i] = self.rows(int(position))[0]
        return all_sum(world, rows)


def open_store(
    surrogate: Surrogate, world: World, beton: Beton, *, folder: Path, key: str, precision: Precision = "float32"
) -> Store:
    """The store of `beton`'s features in `folder`, filled where it is missing or was made under another `key`.

    `key` names all that the features depend on. All ranks call it; one whose file is whole does not compute it again.
    Features that are not finite, or too large for `precision`, are a UserError on every rank.
    """
    on_main(world, lambda: _claim(folder, {"key": key, "num_ranks": world.num_ranks, "precision": precision}))
    path = folder / f"rank_{world.rank:05d}.bin"
    described, dtype = path.with_suffix(".json"), np.dtype(precision)
    about = read_json(described) if described.is_file() else None
    reused = about is not None and path.is_file() and path.stat().st_size == about["bytes"]
    if not reused:
        about = _fill(surrogate, world, beton, path, dtype)
        write_json(described, about)
    assert about is not None
    dim, rows = int(all_max(world, np.array([about["dim"]]))[0]), np.zeros(world.num_ranks + 1, np.int64)
    top = float(all_max(world, np.array([math.inf if about["largest"] is None else about["largest"]]))[0])
    if not top <= float(np.finfo(dtype).max):
        on_main(world, lambda: _clear(folder))
        raise UserError(
            f"features of {beton.path} are not finite or too large for {precision} (up to {top:g}): "
            "has this surrogate's training failed?"
        )
    rows[world.rank + 1] = about["rows"]
    first = int(np.cumsum(all_sum(world, rows))[world.rank])
    return Store(path, dtype, first, about["rows"], dim, beton.num_samples, top, reused)


def _claim(folder: Path, content: dict[str, object]) -> None:
    """Make `folder` a store of that content. What it holds of another is deleted; a folder of others is refused."""
    described = folder / "store.json"
    if folder.is_dir() and not described.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no features: choose another --store")
    try:
        if not described.is_file() or read_json(described) != content:
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
            write_json(described, content)
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): choose another --store") from error


def _clear(folder: Path) -> None:
    for item in [*folder.glob("rank_*.json"), *folder.glob("rank_*.bin"), *folder.glob(".rank_*.tmp")]:
        item.unlink()


def _fill(
    surrogate: Surrogate, world: World, beton: Beton, path: Path, dtype: np.dtype[np.floating]
) -> dict[str, object]:
    """Write this rank's features to `path`; returns what its description says. A NaN or infinity has no `largest`."""
    positions, items = shard(surrogate, world, beton, label="features")
    top, dim = 0.0, 0
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        for _, _, features in items:
            top, dim = max(top, largest(features)), features.shape[1]
            with np.errstate(over="ignore"):  # `open_store` refuses what does not fit
                rows = features.cpu().numpy().astype(dtype)
            handle.write(rows.tobytes())
    # What is read back is what was rounded, and may be a little larger than what was computed.
    top = top * (1 + float(np.finfo(dtype).eps)) if math.isfinite(top) else top
    return {
        "rows": len(positions), "dim": dim, "bytes": len(positions) * dim * dtype.itemsize,
        "largest": top if math.isfinite(top) else None,
    }  # fmt: skip
