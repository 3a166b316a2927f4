"""`dp4tl train`: from a TrainConfig to a run folder. Surrogate and source model alike."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dp4tl_dist.config import TrainConfig
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.loader import BetonLoader
from dp4tl_dist.data.subset import load_subset, samples_of_groups
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, make_meta
from dp4tl_dist.log import say, warn
from dp4tl_dist.models import build_model
from dp4tl_dist.sides import misfit
from dp4tl_dist.train.adversarial import Adversarial
from dp4tl_dist.train.check import check_classes, check_train, with_steps_of
from dp4tl_dist.train.checkpoint import load_into, resolve, used_meta
from dp4tl_dist.train.claim import claimed
from dp4tl_dist.train.evaluate import Split, evaluate
from dp4tl_dist.train.job import Job
from dp4tl_dist.train.knn import probe
from dp4tl_dist.train.loop import Fit
from dp4tl_dist.train.loss_log import LossLog
from dp4tl_dist.train.moco import Moco
from dp4tl_dist.train.task import Supervised, Task
from dp4tl_dist.world import World, on_main


def train(config: TrainConfig, *, out: Path, world: World, force: bool = False) -> dict[str, Any]:
    """Train as `config` says, into the run folder `out`; returns the last checkpoint's meta.

    A run that is there already is continued; `force` starts afresh. All ranks call it.
    """
    job = make_job(config, out=out, world=world)
    data = config.data
    inputs = (config.model.init, data.train, data.val, data.subset, data.val_subset, data.steps_of)
    with contextlib.ExitStack() as held:
        on_main(world, lambda: held.enter_context(claimed(out, force=force, inputs=inputs)))
        fit = Fit(job, world)
        meta = fit.run()
    return meta


def make_job(config: TrainConfig, *, out: Path, world: World) -> Job:
    """What `config` describes, ready for `Fit`: the files are open, and the model has its first weights."""
    optim = config.train
    train_beton, train_split, inputs, made_from = make_split(config, world, part="train")
    without_labels = config.task.kind == "moco"
    if not without_labels:
        train_beton.labels_for(f"task.kind {config.task.kind}", train_split.kept)
    val_split = None
    if config.data.val:
        val_split, val_inputs = open_validation(config, train_beton, train_split, world, label=out.name)
        inputs |= val_inputs
    if world.is_main and (wrong := misfit("train.val_resolution", optim.val_resolution, optim.resolution)):
        warn(f"{out.name}: {wrong}")
    if config.data.steps_of:
        whole = open_beton(Path(config.data.steps_of))
        optim, inputs["steps_of"] = with_steps_of(whole.num_samples, optim), whole.fingerprint
    folder = None
    if config.model.init:
        folder = resolve(Path(config.model.init), allow_incomplete=config.model.allow_incomplete)
        made_from.append(used_meta(folder))
    classes = train_beton.classes or ("unlabelled",)  # a checkpoint names at least one
    check_train(config, optim, samples=len(train_split.kept), num_classes=len(classes), num_ranks=world.num_ranks)
    torch.manual_seed(config.seed)
    model = build_model(config.model.arch, len(classes))
    if folder is not None:
        load_into(model, folder, fresh_head=True)
        inputs["init"] = digest_file(folder / "meta.json")
    task = make_task(config, model, world)
    job = Job(
        out=out,
        task=task,
        views=task.square if isinstance(task, Moco) else None,
        evaluate=probe if isinstance(task, Moco) else evaluate,
        train=train_split,
        val=val_split,
        classes=classes,
        config=config.model_dump(mode="json"),
        inputs=inputs,
        seed=config.seed,
        optim=optim,
        data=config.data,
        engine=config.engine,
        log=config.log,
        checkpoint=config.checkpoint,
        label=out.name,
        made_from=tuple(made_from),
    )
    job.check(world.num_ranks)
    if not config.log.sample_losses:
        return job
    assert isinstance(task, Supervised)
    about = make_meta("losses", config=job.config, inputs=inputs, made_from=made_from)
    losses = LossLog(out, train_beton, epochs=job.plan.num_epochs, meta=about)
    task.watch = losses.add
    return replace(job, losses=losses)


def open_validation(
    config: TrainConfig, train_beton: Beton, train: Split, world: World, *, label: str
) -> tuple[Split, dict[str, str]]:
    """The validation split and its inputs' fingerprints; UserError where it does not go with what is trained on."""
    beton, split, inputs, _ = make_split(config, world, part="val")
    without_labels = config.task.kind == "moco"
    if not without_labels or (beton.labels[split.kept] >= 0).sum() < 2:
        beton.labels_for("validation", split.kept)
    if not (without_labels and not train_beton.num_classes):
        check_classes(beton.path, beton.classes, train_beton.path, train_beton.classes)
    if not config.data.val_subset:
        split = of_trained_classes(config, train_beton, train, beton, split, world)
    if beton.fingerprint == train_beton.fingerprint and world.is_main:
        warn(f"{label}: data.val holds the samples of data.train: its accuracy says nothing of other images")
    return split, inputs


def of_trained_classes(
    config: TrainConfig, train_beton: Beton, train: Split, val_beton: Beton, val: Split, world: World
) -> Split:
    """The part of a validation set whose classes are trained on, told in one line where that is not plain; all of it
    where clusters, and not classes, were left out, or labels train nothing.
    """
    path = config.data.subset
    groups_are = load_subset(Path(path), beton=train_beton).meta.get("groups_are") if path else None
    trained = np.unique(train_beton.labels[train.kept])
    whole = groups_are == "clusters" or config.task.kind == "moco"
    kept = val.kept if whole else samples_of_groups(val_beton.labels, trained.astype(np.int64))
    if not len(kept):
        raise UserError(f"{val_beton.path} has no sample of the {len(trained)} classes that are trained on")
    if world.is_main and (path or len(kept) < len(val.kept)):
        of = "all classes" if whole else f"the {len(trained)} classes that are trained on"
        say(f"validation: {len(kept)} of {val_beton.num_samples} samples, of {of} (data.val_subset is not set)")
    return replace(val, kept=kept)


def make_task(config: TrainConfig, model: nn.Module, world: World) -> Task:
    """The objective that `task.kind` names, over `model`."""
    if config.task.kind == "adversarial":
        smoothing = config.train.label_smoothing
        return Adversarial(model, config.task.adversarial, seed=config.seed, label_smoothing=smoothing)
    optim = config.train
    if config.task.kind == "moco":
        return Moco(
            model, config.task.moco, world, seed=config.seed, batch_size=optim.batch_size, parts=optim.accumulate,
            flip=config.data.flip,
        )  # fmt: skip
    return Supervised(model, label_smoothing=config.train.label_smoothing)


def make_split(
    config: TrainConfig, world: World, *, part: str
) -> tuple[Beton, Split, dict[str, str], list[dict[str, Any]]]:
    """The beton, the split and the inputs' fingerprints and metas of `part`: "train" or "val"."""
    data = config.data
    path, subset_path = (data.train, data.subset) if part == "train" else (data.val, data.val_subset)
    if not path:
        raise UserError(f"data.{part} is not set: name a beton in the config or with --set data.{part}=FILE.beton")
    beton = open_beton(Path(path))
    inputs, metas = {part: beton.fingerprint}, [beton.meta]
    kept = np.arange(beton.num_samples)
    if subset_path:
        subset = load_subset(Path(subset_path), beton=beton)
        kept = subset.indices
        metas.append(subset.meta)
        inputs[f"{part}_subset"] = digest_file(Path(subset_path))
    loader = BetonLoader(
        beton,
        device=world.device,
        num_workers=world.num_workers(data.num_workers),
        os_cache=data.os_cache,
        skip_bad=data.on_bad_sample == "skip",
        tells=world.is_main,
    )
    pages = beton.pages[kept] if data.page_aware and part == "train" else None
    return beton, Split(loader, kept, pages), inputs, metas
