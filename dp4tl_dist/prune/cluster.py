"""The verb `cluster`: a surrogate and a source -> a clusters file, by k-means on the source's features."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.files import check_output, make_meta
from dp4tl_dist.log import progress
from dp4tl_dist.prune.clusters_file import Clusters, save_clusters
from dp4tl_dist.prune.vote import PRECISIONS, load_surrogate, use_bf16
from dp4tl_dist.world import World, gather_rows, on_main

if TYPE_CHECKING:
    from dp4tl_dist.prune.surrogate import Surrogate

STORE_PRECISIONS = ("float32", "float16")
NUM_TOP = 5


@dataclass(frozen=True)
class ClusterSummary:
    """What `cluster` found."""

    num_clusters: int
    num_samples: int
    sizes: tuple[int, int]
    """Samples of the smallest and of the largest cluster."""
    empty: int
    inertia: float
    iterations: int
    converged: bool
    store: Path
    store_bytes: int
    reused: bool

    def __str__(self) -> str:
        ended = "converged" if self.converged else "stopped by --iterations"
        empty = f" ({self.empty} of them empty)" if self.empty else ""
        kept = "used again" if self.reused else "kept for the next time"
        return (
            f"{self.num_samples} samples in {self.num_clusters} clusters{empty} of {self.sizes[0]} to {self.sizes[1]}; "
            f"inertia {self.inertia:.6g} after {self.iterations} iterations ({ended}); "
            f"features of {self.store_bytes / 1e6:.1f} MB in {self.store} ({kept})"
        )


def store_path(out: Path) -> Path:
    """Where the features go by default: C.npz -> C.features/."""
    return out.with_name(f"{out.stem}.features")


def check_count(num_clusters: int, samples: int, source: Path) -> None:
    """Raise UserError unless so many samples make so many clusters."""
    if not 1 <= num_clusters <= samples:
        raise UserError(f"--clusters {num_clusters} is not between 1 and the {samples} samples of {source}")


def cluster(
    world: World,
    *,
    surrogate: Path,
    source: Path,
    num_clusters: int,
    out: Path,
    start: str = "kmeans++",
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-4,
    store: Path | None = None,
    store_precision: str = "float32",
    batch_size: int = 256,
    resolution: int | None = None,
    num_workers: int = 0,
    precision: str = "auto",
    force: bool = False,
    allow_incomplete: bool = False,
) -> ClusterSummary:
    """Cluster `source` by what the surrogate sees in it; rank 0 writes `out`.

    All ranks call it and get the same summary or the same UserError. Features are kept in `store` (a folder, by default
    beside `out`) and used again where nothing that they depend on has changed. allow_incomplete: also by a surrogate
    before its training's end.
    """
    from dp4tl_dist.prune.kmeans import STARTS, lloyd, start_positions
    from dp4tl_dist.prune.store import open_store

    one_of("--init", start, STARTS)
    one_of("--precision", precision, PRECISIONS)
    one_of("--store-precision", store_precision, STORE_PRECISIONS)
    if batch_size < 1 or iterations < 1 or not tolerance >= 0:
        raise UserError(
            f"--batch-size {batch_size} and --iterations {iterations} must be positive, and --tolerance {tolerance} "
            "not negative"
        )
    folder = store or store_path(out)
    on_main(world, lambda: check_output(out, force=force, inputs=[surrogate, source], folders=[folder]))
    beton = open_beton(source)
    check_count(num_clusters, beton.num_samples, source)
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} is not between 0 and {2**63 - 1}")
    network, meta = load_surrogate(
        surrogate, world, batch_size, resolution, num_workers, bf16=use_bf16(precision, world),
        allow_incomplete=allow_incomplete,
    )  # fmt: skip
    inputs = {"source": beton.fingerprint, "surrogate": meta["digests"]["weights.safetensors"]}
    seen = {
        "batch_size": batch_size, "resolution": network.view.resolution, "ratio": network.view.ratio,
        "bf16": network.bf16,
    }  # fmt: skip
    on_main(world, lambda: _check_room(folder, network, beton, store_precision))
    key = hashlib.blake2b(json.dumps([inputs, seen], sort_keys=True).encode(), digest_size=16).hexdigest()
    features = open_store(
        network, world, beton, folder=folder, key=key,
        precision="float16" if store_precision == "float16" else "float32",
    )  # fmt: skip
    first = start_positions(features, world, num_clusters, how=start, seed=seed)
    with progress("cluster", shown=world.is_main) as advance:
        found = lloyd(
            features, world, features.gather(world, first).astype(np.float64), iterations=iterations,
            tolerance=tolerance, report=lambda step, inertia: advance(step, iterations, inertia=inertia),
        )  # fmt: skip
    positions = np.arange(features.first, features.first + features.num_rows)
    assignment = gather_rows(world, positions, found.assignment, beton.num_samples)
    distances = gather_rows(world, positions, found.distances, beton.num_samples)
    config = {
        "surrogate": str(surrogate), "source": str(source), "clusters": num_clusters, "start": start,
        "iterations": iterations, "tolerance": tolerance, "store_precision": store_precision, **seen,
    }  # fmt: skip
    about = {
        **make_meta("clusters", config=config, seed=seed, inputs=inputs, made_from=[meta]),
        "converged": found.converged,
        "iterations": len(found.inertia) - 1, "inertia": found.inertia[-1], "inertias": list(found.inertia),
        "reseeded": found.reseeded,
    }  # fmt: skip
    clusters = Clusters(found.centres, assignment, distances, first, found.inertia[-1], about)
    on_main(world, lambda: save_clusters(out, clusters))
    sizes = clusters.sizes
    return ClusterSummary(
        num_clusters, beton.num_samples, (int(sizes.min()), int(sizes.max())), int((sizes == 0).sum()),
        clusters.inertia, len(found.inertia) - 1, found.converged, folder, features.num_bytes, features.reused,
    )  # fmt: skip


def _check_room(folder: Path, network: "Surrogate", beton: Beton, precision: str) -> None:
    """Refuse a store that the disk has no room for. One that is there already has taken its room."""
    from dp4tl_dist.models import feature_dim

    place = next((item for item in (folder, *folder.parents) if item.exists()), Path())
    taken = sum(item.stat().st_size for item in folder.glob("rank_*.bin"))
    needed = beton.num_samples * feature_dim(network.model) * np.dtype(precision).itemsize - taken
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the features need {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: "
            "make room, choose another --store, or halve them with --store-precision float16"
        )
