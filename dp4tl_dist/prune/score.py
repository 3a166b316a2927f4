"""The verb `score`: one number for every source sample, by one of the methods of `METHODS` -> a scores file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.loader import BetonLoader
from dp4tl_dist.data.losses import NAME, load_losses
from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.exact import Parts
from dp4tl_dist.files import check_output, digest_file, make_meta
from dp4tl_dist.models import normalise
from dp4tl_dist.prune import coresets, loss_scores, scores
from dp4tl_dist.prune.scores_file import Scores, save_scores
from dp4tl_dist.prune.surrogate import Surrogate, shard, shard_classes
from dp4tl_dist.prune.vote import PRECISIONS, load_surrogate, use_bf16
from dp4tl_dist.world import World, all_max, gather_rows, on_main

Rows = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Positions (n,) and their scores (n,)."""


@dataclass(frozen=True)
class Method:
    """How a method scores, and what `prune --scores` does with it."""

    keeps: str
    """"highest", "lowest" or "middle"."""
    per_class: bool
    """Whether the same share of every class is kept, unless `prune` is told otherwise."""
    reads: str
    """What a score is made of: "outputs" of the network for the sample, features of its whole "class", the nearest of
    the "targets", or the "losses" that a training logged."""
    function: Callable[..., Any]


METHODS = {
    "el2n":       Method("highest", False, "outputs", scores.el2n),
    "grand":      Method("highest", False, "outputs", scores.grand),
    "moderate":   Method("middle",  True,  "class",   coresets.moderate),
    "herding":    Method("highest", True,  "class",   coresets.herding),
    "k-centre":   Method("highest", True,  "class",   coresets.k_centre),
    "retrieval":  Method("highest", False, "targets", scores.retrieval),
    "forgetting": Method("highest", False, "losses",  loss_scores.forgetting),
    "cld":        Method("highest", True,  "losses",  loss_scores.cld),
}  # fmt: skip


@dataclass(frozen=True)
class ScoreSummary:
    """What `score` found."""

    method: str
    num_samples: int
    low: float
    median: float
    high: float
    keeps: str

    def __str__(self) -> str:
        return (
            f"{self.num_samples} scores ({self.method}) from {self.low:.4g} to {self.high:.4g}, median "
            f"{self.median:.4g}; prune keeps the {self.keeps}"
        )


def score(
    world: World,
    *,
    method: str,
    surrogates: Sequence[Path],
    source: Path,
    targets: Sequence[Path] = (),
    out: Path,
    full_gradient: bool = False,
    batch_size: int = 256,
    resolution: int | None = None,
    num_workers: int = 0,
    precision: str = "auto",
    force: bool = False,
    allow_incomplete: bool = False,
) -> ScoreSummary:
    """Score every sample of `source` by `method`, the mean over `surrogates` (checkpoint or run folders); rank 0 writes
    `out`.

    All ranks call it and get the same summary or the same UserError. `targets` are what retrieval looks for. forgetting
    and cld read what the surrogates' runs logged. full_gradient: grand by all parameters and not by the head's alone.
    allow_incomplete: also by networks before their training's end.
    """
    one_of("--method", method, list(METHODS))
    one_of("--precision", precision, PRECISIONS)
    rule = METHODS[method]
    _check_options(rule, method, surrogates, targets, full_gradient=full_gradient, batch_size=batch_size)
    on_main(world, lambda: check_output(out, force=force, inputs=[*surrogates, source, *targets]))
    beton, betons = open_beton(source), [open_beton(path) for path in targets]
    inputs = {"source": beton.fingerprint, **{f"target{i}": item.fingerprint for i, item in enumerate(betons)}}
    if rule.reads != "targets":
        beton.labels_for(f"--method {method}")
    total, view, made_from = np.zeros(beton.num_samples), None, []
    for i, path in enumerate(surrogates):
        if rule.reads == "losses":
            found, inputs[f"losses{i}"], meta = _from_losses(path, rule, beton)
        else:
            bf16 = use_bf16(precision, world)
            network, meta = load_surrogate(
                path, world, batch_size, resolution, num_workers, bf16=bf16, allow_incomplete=allow_incomplete
            )
            check_surrogate(method, path, meta["classes"], beton.path, beton.classes, has_head=meta["has_head"])
            inputs[f"surrogate{i}"], view = meta["digests"]["weights.safetensors"], network.view
            found = _from_network(network, world, rule, beton, betons, full_gradient=full_gradient)
        if not np.isfinite(found).all():
            raise UserError(f"scores of {path} are not finite: has this surrogate's training failed?")
        total += found / len(surrogates)
        made_from.append(meta)
    config = {
        "method": method, "surrogates": [str(path) for path in surrogates], "source": str(source),
        "targets": [str(path) for path in targets], "full_gradient": full_gradient, "batch_size": batch_size,
        "resolution": view and view.resolution, "ratio": view and view.ratio, "bf16": use_bf16(precision, world),
    }  # fmt: skip
    meta = make_meta("scores", config=config, inputs=inputs, made_from=made_from)
    result = Scores(total.astype(np.float32), method, rule.keeps, rule.per_class, meta)
    on_main(world, lambda: save_scores(out, result))
    low, median, high = np.quantile(result.scores, [0, 0.5, 1]).tolist()
    return ScoreSummary(method, beton.num_samples, low, median, high, rule.keeps)


def _check_options(
    rule: Method, method: str, surrogates: Sequence[Path], targets: Sequence[Path], *, full_gradient: bool,
    batch_size: int,
) -> None:  # fmt: skip
    if not surrogates:
        raise UserError(f"--method {method} needs a trained network: add --surrogate")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be positive")
    if bool(targets) != (rule.reads == "targets"):
        hint = "add --target" if not targets else "leave --target out, it is for retrieval"
        raise UserError(f"--method {method} with {len(targets)} targets: {hint}")
    if full_gradient and method != "grand":
        raise UserError(f"--full-gradient is for --method grand, not {method}")


def check_surrogate(
    method: str, path: Path, classes: Sequence[str], source: Path, wanted: Sequence[str], *, has_head: bool
) -> None:
    """What is made of outputs needs a surrogate that knows the source's classes; features are of any one's."""
    if METHODS[method].reads != "outputs":
        return
    if not has_head:
        raise UserError(f"the checkpoint {path} was trained without labels and has no outputs: {method} needs a head")
    if tuple(classes) != tuple(wanted):
        raise UserError(
            f"the checkpoint {path} was trained on other classes ({len(classes)}) than those of {source} "
            f"({len(wanted)}): use a surrogate of this source"
        )


def _from_losses(path: Path, rule: Method, beton: Beton) -> tuple[NDArray[np.float64], str, dict[str, Any]]:
    """Scores (samples,) of what the run at `path` logged, and the log's digest and meta."""
    folders = (path, path.parent.parent)  # a run folder, or a checkpoint in one
    file = next((folder / NAME for folder in folders if (folder / NAME).is_file()), path)
    if file.is_dir():
        raise UserError(f"{path} has no {NAME}: train it with --set log.sample_losses=true, or pass the run folder")
    logged = load_losses(file, beton=beton)
    return rule.function(logged, beton.labels), digest_file(file), logged.meta


def _from_network(
    network: Surrogate, world: World, rule: Method, beton: Beton, targets: list[Beton], *, full_gradient: bool
) -> NDArray[np.float64]:
    """Scores (samples,) by one network, the same on every rank."""
    if rule.reads == "class":
        rows = _by_class(network, world, rule, beton)
    elif full_gradient:
        rows = _by_gradients(network, world, beton)
    else:
        wanted = torch.cat([_features(network, world, item) for item in targets]) if targets else None
        rows = _by_sample(network, world, rule, beton, wanted)
    found = list(rows)
    positions = np.concatenate([np.zeros(0, np.int64), *(row[0] for row in found)])
    values = np.concatenate([np.zeros(0), *(row[1] for row in found)])
    return gather_rows(world, positions, values, beton.num_samples)


def _by_sample(network: Surrogate, world: World, rule: Method, beton: Beton, targets: Tensor | None) -> Iterator[Rows]:
    positions, items = shard(network, world, beton, label="score")
    done = 0
    for batch, logits, features in items:
        values = rule.function(logits, features, batch.labels) if targets is None else rule.function(features, targets)
        yield positions[done : done + len(values)], values.cpu().numpy()
        done += len(values)


def _by_class(network: Surrogate, world: World, rule: Method, beton: Beton) -> Iterator[Rows]:
    for members, features in shard_classes(network, world, beton, label="score"):
        if not features.isfinite().all():
            yield members, np.full(len(members), np.nan)
        else:
            yield members, rule.function(features.double().numpy())


def _by_gradients(network: Surrogate, world: World, beton: Beton) -> Iterator[Rows]:
    batches = inference_batches(
        np.arange(beton.num_samples), batch_size=network.batch_size, num_ranks=world.num_ranks, rank=world.rank
    )
    loader = BetonLoader(beton, device=world.device, num_workers=network.num_workers, tells=world.is_main)

    def norms(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (scores.full_grand(model, normalise(images), labels),)

    size = scores.gradients_at_once(network.model, loader.device.type)
    with Parts(network.model.eval(), norms, size=size) as run:
        for positions, batch in zip(batches, loader.epoch(batches, network.view), strict=True):
            (values,) = run(batch.images, batch.labels)
            yield positions, values.cpu().numpy()


def _features(network: Surrogate, world: World, beton: Beton) -> Tensor:
    """Unit features float64 (images, dim) of all of a target, on this rank's device: every rank has them all."""
    positions, items = shard(network, world, beton, label="target's features")
    mine = [features.cpu() for _, _, features in items]
    dim = int(all_max(world, np.array([mine[0].shape[1] if mine else 0]))[0])
    rows = torch.cat([torch.zeros(0, dim), *mine]).numpy()
    return scores.unit(torch.from_numpy(gather_rows(world, positions, rows, beton.num_samples)).to(world.device))
