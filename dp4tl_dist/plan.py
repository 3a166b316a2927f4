"""The plan of a run, proved before its first stage: each stage is checked by the functions that it will ask itself.

Stages are looked at in their order. What one will make (the classes and sizes of a dataset, a network, how many samples
a subset has) is known to those that read it, and is taken from the files themselves where nothing makes them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dp4tl_dist.config import ModelConfig, TrainConfig, validate
from dp4tl_dist.data.beton import check_apart
from dp4tl_dist.data.folder import check_broken, read_folder
from dp4tl_dist.data.synthetic import dataset
from dp4tl_dist.data.write import WriteOptions
from dp4tl_dist.errors import UserError
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.plan_content import Content
from dp4tl_dist.plan_known import Dataset, Look, Network
from dp4tl_dist.plan_sizes import Kept, kept_classes, kept_samples
from dp4tl_dist.plan_words import in_the_runs_words
from dp4tl_dist.recipes import TransferConfig, recipe
from dp4tl_dist.records import check_folder
from dp4tl_dist.schedule import Plan
from dp4tl_dist.sides import TrainedAt
from dp4tl_dist.stage import Stage
from dp4tl_dist.stages import Graph

__all__ = ["check_plan"]


def check_plan(graph: Graph, *, ranks: Callable[[Stage], int], here: bool = True) -> None:
    """Raise UserError for the first stage that would refuse its config, files or ranks; nothing is written. Before that
    for a folder that is another run's: no fault of this config.

    ranks: of each stage. here: whether the stages run on this machine, and so find its devices.
    """
    check_folder(graph)
    known: dict[Path, object] = {}
    for stage in graph.stages.values():
        try:
            made = CHECKS[stage.argv[0]](Look(stage, known, ranks(stage), here))
        except UserError as error:
            raise UserError(f"{stage.name}: {in_the_runs_words(stage, str(error))}") from error
        known |= {stage.output: made} if made is not None else {}


# ---------------------------------------------------------------- a check for each verb


def _write(look: Look) -> Dataset:
    given = look.options
    skip_bad = "skip-bad" in given
    max_side, quality, seed = (int(given[key][0]) for key in ("max-side", "quality", "seed"))
    options = WriteOptions(max_side, quality, seed, skip_bad=skip_bad, reencode="reencode" in given)
    if "synthetic" in given:
        kind, _, split = given["synthetic"][0].partition("/")
        samples, classes = dataset(kind, split, seed=seed)  # type: ignore[arg-type]
    else:
        origin = given["images"][0]
        if re.match(r"[a-z]+:", origin) and not Path(origin).exists():
            raise UserError(
                f"{origin} is none of what a run reads: a folder, a .beton or synthetic:KIND/SPLIT (for a dataset of "
                "torchvision: write it with `dp4tl write --torchvision`, and name the beton)"
            )
        found = read_folder(Path(origin))
        check_broken(found, skip_bad=skip_bad)
        samples, classes = found.samples, found.classes
        if not samples:
            raise UserError(f"{origin}: there are no images to write")
    sizes = np.bincount([sample.label for sample in samples], minlength=len(classes)).astype(np.int64)
    content = Content(samples=samples, options=options)
    return Dataset(tuple(classes), sizes, Kept(len(samples), len(samples)), content)


def _train(look: Look) -> Network:
    from dp4tl_dist.train.check import check_classes, check_train, with_steps_of

    config = validate(TrainConfig, look.stage.config or {}, source=look.stage.name)
    look.check_devices(config.engine.device)
    data, optim = config.data, config.train
    source, by_labels = look.dataset(Path(data.train)), config.task.kind != "moco"
    if by_labels and not data.subset:
        source.labels_for(f"task.kind {config.task.kind}")
    if data.val:
        val = look.dataset(Path(data.val))
        if by_labels and not data.val_subset:
            val.labels_for("validation")
        if by_labels or source.classes:
            check_classes(Path(data.val), val.classes, Path(data.train), source.classes)
    if data.steps_of:
        optim = with_steps_of(look.dataset(Path(data.steps_of)).kept.least, optim)
    kept = look.kept(Path(data.subset)) if data.subset else source.kept
    try:
        check_train(config, optim, samples=kept.least, num_classes=max(1, len(source.classes)),
                    num_ranks=look.num_ranks)  # fmt: skip
    except UserError as error:
        if kept.least == kept.most:
            raise
        raise UserError(f"{error} (its subset may have {kept} of them)") from error
    _check_init(look, config.model, source.classes)
    logs, epochs = bool(data.val) and config.log.sample_losses, Plan(kept.least, optim).num_epochs
    validated = -(-epochs // optim.val_every) if logs else 0
    trained = TrainedAt(config.model.arch, optim.resolution, optim.val_resolution, optim.val_ratio)
    return Network(trained, source.classes or ("unlabelled",), by_labels, validated)


def _check_init(look: Look, model: ModelConfig, classes: tuple[str, ...]) -> None:
    """Raise UserError where training cannot start from `model.init`, as a stage will find it."""
    from dp4tl_dist.models import outline
    from dp4tl_dist.train.checkpoint import fitting_weights, resolve

    before = look.known.get(Path(model.init)) if model.init else None
    if isinstance(before, Network):
        if (before.trained.arch, before.classes) != (model.arch, classes):
            raise UserError(f"model.init: {model.init} is of another network or of other classes")
    elif model.init:
        folder = resolve(Path(model.init), allow_incomplete=model.allow_incomplete)
        fitting_weights(outline(model.arch, max(1, len(classes))), folder, fresh_head=True)


def _looks(look: Look) -> Network:
    """The surrogate of a stage that looks at images, once it is proved to take them."""
    from dp4tl_dist.models import check_arch, check_shapes

    look.check_devices("auto")
    network = look.network("surrogate")
    check_arch(network.trained.arch, (network.trained.val_resolution,))
    check_shapes(network.trained.arch, len(network.classes), network.trained.val_resolution)
    return network


def _vote(look: Look) -> int:
    """How many clusters the votes are for; 0 for classes."""
    from dp4tl_dist.prune.vote import check_voter

    network = _looks(look)
    check_voter(look.options["method"][0], look.path("surrogate"), has_head=network.has_head)
    for option in ("target", "source"):
        for path in look.options.get(option, ()):
            found = look.dataset(Path(path))
            if option == "source":
                found.labels_for("--method fm without --clusters")
    return int(str(look.known[look.path("clusters")])) if "clusters" in look.options else 0


def _cluster(look: Look) -> int:
    from dp4tl_dist.prune.cluster import check_count

    _looks(look)
    count = int(look.options["clusters"][0])
    check_count(count, look.dataset(look.path("source")).kept.least, look.path("source"))
    return count


def _score(look: Look) -> bool:
    """Whether what is kept by these scores is the same share of every class."""
    from dp4tl_dist.prune.loss_scores import check_validated
    from dp4tl_dist.prune.score import METHODS, check_surrogate

    method, network, source = look.options["method"][0], _looks(look), look.dataset(look.path("source"))
    check_surrogate(method, look.path("surrogate"), network.classes, look.path("source"), source.classes,
                    has_head=network.has_head)  # fmt: skip
    for path in look.options.get("target", ()):
        look.dataset(Path(path))
    if METHODS[method].reads != "targets":
        source.labels_for(f"--method {method}")
    if method == "cld":
        check_validated(network.validated)
    return METHODS[method].per_class


def _prune(look: Look) -> Kept:
    from dp4tl_dist.prune.make import check_val_classes

    given, source = look.options, look.dataset(look.path("source"))
    like = look.kept(look.path("like")) if "like" in given else None
    voted = given.get("votes", [])
    clusters = max((int(str(look.known[Path(path)])) for path in voted), default=0)
    by_samples = given.get("random", [""])[0] in ("samples", "balanced")
    if by_samples or not given.keys() & {"votes", "influence", "random"}:
        per_class = given["random"][0] == "balanced" if by_samples else bool(look.known[look.path("scores")])
        total = int(source.sizes.sum())
        shares = [like.least / total, like.most / total] if like else [float(given["keep"][0])] * 2
        least, most = (kept_samples(share, source.sizes, per_class=per_class) for share in shares)
        kept = Kept(least, most)
        if per_class:
            source.labels_for("a choice of every class")
    else:
        if not clusters:
            source.labels_for("a choice of classes")
        kept = kept_classes(given, source.sizes, like=like, clusters=clusters, ranked="random" not in given)
    if "apply-to" in given:
        path = look.path("apply-to")
        val = look.dataset(path)
        check_val_classes(path, val.classes, look.path("source"), source.classes)
        if kept.groups and not np.sort(val.sizes)[: kept.groups[0]].any():
            raise UserError(f"{path} may have no sample of the {kept.groups[0]} kept classes: keep more of them")
    return kept


def _compact(look: Look) -> Dataset:
    source = look.dataset(look.path("source"))
    return Dataset(source.classes, source.sizes, look.kept(look.path("subset")))


def _transfer(look: Look) -> None:
    from dp4tl_dist.train.check import check_classes, check_transfer

    mode = look.options["mode"][0]
    content = recipe(mode, look.stage.config or {})  # type: ignore[arg-type]
    config = validate(TransferConfig, content, source=look.stage.name)
    look.check_devices(config.engine.device)
    train, test = look.dataset(look.path("train")), look.dataset(look.path("test"))
    for each in (train, test):
        each.labels_for("transfer")
    check_classes(look.path("test"), test.classes, look.path("train"), train.classes)
    check_apart(look.path("train"), look.path("test"), same=train.content.same(test.content))
    network = look.network("checkpoint").trained
    check_transfer(config.suited(network), network.arch, train.sizes, look.path("train"), look.num_ranks)


def _influence(look: Look) -> None:
    from dp4tl_dist.influence import check_influence

    config = validate(InfluenceConfig, look.stage.config or {}, source=look.stage.name)
    look.check_devices(config.engine.device)
    source, target = look.dataset(Path(config.source)), look.dataset(Path(config.target))
    for each in (source, target):
        each.labels_for("influence")
    check_influence(config, source.sizes, target.sizes)
    _check_init(look, config.model, source.classes)


CHECKS: dict[str, Callable[[Look], object]] = {
    "write": _write, "train": _train, "vote": _vote, "cluster": _cluster, "score": _score, "prune": _prune,
    "compact": _compact, "transfer": _transfer, "influence": _influence,
}  # fmt: skip
