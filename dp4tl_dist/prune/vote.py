"""The verb `vote`: a surrogate, one or more targets, and for FM the source or its clusters -> a votes file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.files import check_fingerprint, check_output, digest_file, make_meta
from dp4tl_dist.prune.clusters_file import Clusters, load_clusters, nearest
from dp4tl_dist.prune.select import combine, count_for_coverage, rank_groups
from dp4tl_dist.prune.votes_file import Members, Votes, save_votes
from dp4tl_dist.sides import misfit, trained_at
from dp4tl_dist.world import World, on_main

if TYPE_CHECKING:
    from dp4tl_dist.data.loader import CentreView
    from dp4tl_dist.prune.surrogate import Surrogate

METHODS = ("lm", "fm")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class VoteSummary:
    """What `vote` found, over all targets."""

    method: str
    num_voters: int
    num_groups: int
    groups_with_votes: int
    groups_for_95: int
    """The fewest groups that hold 95 % of the votes."""
    top: tuple[tuple[str, int], ...]
    """The first groups of the ranking, and their votes."""
    what: str = "classes"

    def __str__(self) -> str:
        first = ", ".join(f"{name} {count}" for name, count in self.top)
        return (
            f"{self.num_voters} votes ({self.method}) for {self.groups_with_votes} of {self.num_groups} {self.what}; "
            f"{self.groups_for_95} hold 95 % of the votes; first: {first}"
        )


def vote(
    world: World,
    *,
    method: str,
    surrogate: Path,
    targets: Sequence[Path],
    source: Path | None = None,
    clusters: Path | None = None,
    out: Path,
    batch_size: int = 256,
    resolution: int | None = None,
    num_workers: int = 0,
    precision: str = "auto",
    force: bool = False,
    allow_incomplete: bool = False,
) -> VoteSummary:
    """Let the images of `targets` vote by the surrogate (a checkpoint or run folder); rank 0 writes `out`.

    All ranks call it and get the same summary or the same UserError. lm: groups are the surrogate's classes. fm: groups
    are the classes of `source` or the `clusters` of a clusters file: one of the two is needed. `resolution` defaults to
    the surrogate's validation resolution. allow_incomplete: also by a surrogate before its training's end.
    """
    one_of("--method", method, METHODS)
    one_of("--precision", precision, PRECISIONS)
    if method == "fm" and source is None and clusters is None:
        raise UserError("--method fm makes its centres from the source: add --source, or --clusters")
    if method == "lm" and clusters is not None:
        raise UserError("--clusters are the groups of --method fm: lm votes for the surrogate's classes")
    if batch_size < 1 or not targets:
        raise UserError(f"--batch-size {batch_size} must be positive, and at least one --target given")
    on_main(world, lambda: check_output(out, force=force, inputs=[surrogate, *targets, source, clusters]))
    betons = [open_beton(path) for path in targets]
    origin = None if source is None else open_beton(source)
    if origin is not None and method == "fm" and clusters is None:
        origin.labels_for("--method fm without --clusters")
    network, meta = load_surrogate(
        surrogate, world, batch_size, resolution, num_workers, bf16=use_bf16(precision, world),
        allow_incomplete=allow_incomplete,
    )  # fmt: skip
    inputs = _inputs(meta, surrogate, betons, origin, method=method)
    view, found = network.view, None
    if clusters is not None:
        found = load_clusters(clusters, beton=origin)
        inputs |= _of_clusters(found, clusters, inputs, surrogate, view)
    classes = tuple(meta["classes"]) if method == "lm" or origin is None else origin.classes
    if found is not None:
        classes = tuple(f"cluster {i}" for i in range(found.num_clusters))
    centres = closest = None
    if method == "fm" and found is None:
        centres, closest = _class_means(network, world, origin)
    elif found is not None:
        centres = found.centres
    result = _cast(network, world, betons, centres, len(classes))
    config = {
        "method": method, "surrogate": str(surrogate), "targets": [str(path) for path in targets],
        "source": source and str(source), "clusters": clusters and str(clusters), "batch_size": batch_size,
        "resolution": view.resolution, "ratio": view.ratio,
        "bf16": network.bf16,
    }  # fmt: skip
    members = None if found is None else Members(found.assignment, nearest(found))
    made_from = [meta] if found is None else [meta, found.meta]
    about = make_meta("votes", config=config, inputs=inputs, made_from=made_from)
    votes = Votes(*result, method, classes, about, members, closest)
    on_main(world, lambda: save_votes(out, votes))
    return summarise(votes)


def summarise(votes: Votes, *, num_top: int = 5) -> VoteSummary:
    """The summary over all targets: counts are plain sums, the ranking is the one `prune` makes by default."""
    combined, affinity = combine(votes.votes, votes.affinity)
    ranking, counts = rank_groups(combined, affinity), votes.votes.sum(axis=0)
    top = tuple((votes.classes[i], int(counts[i])) for i in ranking[:num_top])
    needed = count_for_coverage(combined[ranking], 0.95)
    return VoteSummary(votes.method, int(counts.sum()), len(counts), int(np.count_nonzero(counts)), needed, top,
                       votes.what)  # fmt: skip


def use_bf16(precision: str, world: World) -> bool:
    return precision == "bf16" or (precision == "auto" and world.device != "cpu")


def load_surrogate(
    path: Path,
    world: World,
    batch_size: int,
    resolution: int | None,
    num_workers: int,
    *,
    bf16: bool,
    allow_incomplete: bool = False,
) -> tuple["Surrogate", dict[str, Any]]:
    """The surrogate on this rank's device with its centre view, and its checkpoint's meta."""
    import torch

    from dp4tl_dist.data.loader import CentreView
    from dp4tl_dist.log import warn
    from dp4tl_dist.models import check_arch
    from dp4tl_dist.prune.surrogate import Surrogate
    from dp4tl_dist.train.checkpoint import load_model

    model, meta = load_model(path, allow_incomplete=allow_incomplete)
    network = trained_at(meta, path)
    view = CentreView(network.val_resolution if resolution is None else resolution, network.val_ratio)
    if view.resolution < 1:
        raise UserError(f"--resolution {view.resolution} must be a positive number of pixels")
    check_arch(network.arch, (view.resolution,))
    what = "its train.val_resolution" if resolution is None else "--resolution"
    if world.is_main and (wrong := misfit(what, view.resolution, network.resolution)):
        warn(f"{path}: {wrong}")
    model.to(world.device)
    if world.device != "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Surrogate(model, view, batch_size, world.num_workers(num_workers), bf16), meta


def check_voter(method: str, path: Path, *, has_head: bool) -> None:
    """Raise UserError where a surrogate without classes is to vote for classes."""
    if method == "lm" and not has_head:
        raise UserError(f"the checkpoint {path} was trained without labels and knows no classes: use --method fm")


def _inputs(
    meta: dict[str, Any], path: Path, targets: Sequence[Beton], source: Beton | None, *, method: str
) -> dict[str, str]:
    """Fingerprints of all that the votes depend on. An LM surrogate of another source is a UserError."""
    trained_on = meta["inputs"].get("train")
    if method == "lm" and source is not None:
        check_fingerprint("source", trained_on, source.fingerprint, expected_from=path, actual_from=source.path)
    check_voter(method, path, has_head=meta["has_head"])
    if method == "lm" and trained_on is None:
        raise UserError(f"the checkpoint {path} does not say what it was trained on: train it again with `dp4tl train`")
    return {
        "source": source.fingerprint if source is not None else str(trained_on),
        "surrogate": meta["digests"]["weights.safetensors"],
        **{f"target{i}": beton.fingerprint for i, beton in enumerate(targets)},
    }


def _of_clusters(
    clusters: Clusters, path: Path, inputs: dict[str, str], surrogate: Path, view: "CentreView"
) -> dict[str, str]:
    """The fingerprints of clusters that this surrogate made, looking at images as it does now; others are refused."""
    made_for, config = clusters.meta["inputs"], clusters.meta["config"]
    check_fingerprint(
        "surrogate", made_for["surrogate"], inputs["surrogate"], expected_from=path, actual_from=surrogate
    )
    if (config["resolution"], config["ratio"]) != (view.resolution, view.ratio):
        raise UserError(
            f"{path} was made at a resolution of {config['resolution']} px, and the targets would vote at "
            f"{view.resolution}: pass --resolution {config['resolution']}"
        )
    return {"source": made_for["source"], "clusters": digest_file(path)}


def _class_means(
    network: "Surrogate", world: World, source: Beton | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from dp4tl_dist.prune.surrogate import class_centres

    assert source is not None
    return class_centres(network, world, source)


def _cast(
    network: "Surrogate",
    world: World,
    targets: Sequence[Beton],
    middles: NDArray[np.float64] | None,
    num_groups: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Votes and affinity (targets, groups), predictions of all images, sizes of targets. FM if `middles` are given."""
    import torch
    from torch import Tensor

    from dp4tl_dist.prune.surrogate import cast_votes
    from dp4tl_dist.prune.votes import Tally, fm_tally, lm_tally

    centres = None if middles is None else torch.from_numpy(middles).to(world.device)

    def judge(logits: Tensor, features: Tensor) -> Tally:
        return lm_tally(logits) if centres is None else fm_tally(features, centres)

    rows = [cast_votes(network, world, beton, judge, num_groups=num_groups) for beton in targets]
    votes, affinity = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    if centres is not None:
        affinity[:, centres.isnan().any(dim=1).cpu().numpy()] = -math.inf
    return votes, affinity, np.concatenate([row[2] for row in rows]), np.array([beton.num_samples for beton in targets])
