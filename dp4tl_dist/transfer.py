"""`dp4tl transfer`: what a pretrained model is worth on a target, by linear probe or full finetuning, in the one loop.

The head is fresh, the epoch is chosen on a held-out part of the target's *training* set, and the test set is read once.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dp4tl_dist.config import CheckpointConfig, DataConfig
from dp4tl_dist.data.beton import Beton, check_apart, open_beton
from dp4tl_dist.data.loader import BetonLoader, CentreView
from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.errors import UserError
from dp4tl_dist.exact import Parts, rows_at_once
from dp4tl_dist.files import digest_file, make_meta, write_json
from dp4tl_dist.log import say, warn
from dp4tl_dist.models import build_model, head_name, normalise, replace_head
from dp4tl_dist.recipes import TransferConfig
from dp4tl_dist.sides import trained_at
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train.adversarial import robust_attack
from dp4tl_dist.train.check import check_classes, check_transfer, held_out
from dp4tl_dist.train.claim import claimed
from dp4tl_dist.train.evaluate import Score, Split, evaluate
from dp4tl_dist.train.job import Job
from dp4tl_dist.train.loop import Fit
from dp4tl_dist.train.source import FeatureSource
from dp4tl_dist.train.task import LinearProbe, Supervised, Task, backbone_digest
from dp4tl_dist.world import World, gather_rows, on_main


@dataclass(frozen=True)
class Target:
    """A target's betons and how its training set is divided."""

    train: Beton
    test: Beton | None
    fit: NDArray[np.int64]
    val: NDArray[np.int64]


def open_target(train: Path, test: Path | None, *, val_share: float, seed: int) -> Target:
    """Open both betons and hold out `val_share` of every class of the training set (at least one sample of each)."""
    first, second = open_beton(train), None if test is None else open_beton(test)
    first.labels_for("transfer")
    if second is not None:
        second.labels_for("transfer")
        check_classes(second.path, second.classes, train, first.classes)
        check_apart(train, second.path, same=first.fingerprint == second.fingerprint)
    keys = np.random.Philox(key=[seed, 0x7A]).random_raw(first.num_samples)
    held = []
    counts = held_out(first.class_sizes, val_share, path=train)
    for label, count in enumerate(counts):
        members = np.flatnonzero(first.labels == label)
        held.append(members[np.argsort(keys[members], kind="stable")[:count]])
    val = np.sort(np.concatenate(held))
    return Target(first, second, np.setdiff1d(np.arange(first.num_samples), val), val)


def transfer(
    config: TransferConfig,
    *,
    checkpoint_path: Path,
    train: Path,
    test: Path | None,
    out: Path,
    world: World,
    force: bool = False,
    allow_incomplete: bool = False,
) -> dict[str, Any]:
    """Transfer a checkpoint to a target; rank 0 writes the result to `out` (JSON) and every rank returns it.

    One that was cut off is continued; `force` starts afresh. Without `test` what was held out of `train` is all that
    judges, and the result has no accuracy but `val_top1`. allow_incomplete: also one before its training's end. All
    ranks call it.
    """
    started = time.monotonic()
    target = open_target(train, test, val_share=config.val_share, seed=config.seed)
    folder = checkpoint.resolve(checkpoint_path, allow_incomplete=allow_incomplete)
    meta = checkpoint.used_meta(folder)
    network = trained_at(meta, folder)
    config = config.suited(network)
    check_transfer(config, network.arch, target.train.class_sizes, train, world.num_ranks)
    inputs = {"checkpoint": digest_file(folder / "meta.json"), "train": target.train.fingerprint}
    if target.test is not None:
        inputs["test"] = target.test.fingerprint
    torch.manual_seed(config.seed)
    run = out.with_name(out.name + ".run")
    module, before = build_module(network.arch, folder, target.train.num_classes, config)
    job, test_split = make_job(config, module, target, inputs, run, world)
    job.check(world.num_ranks)
    for text in config.misfits(network) if world.is_main else ():
        warn(f"{job.label}: {text}")
    with contextlib.ExitStack() as held:
        on_main(world, lambda: held.enter_context(claimed(run, force=force)))
        fit = Fit(job, world)
        fit.run()
    chosen = checkpoint.best(run)
    checkpoint.load_into(job.task.module, chosen)
    about = checkpoint.read_meta(chosen)  # read before all ranks meet in `evaluate`: rank 0 deletes it afterwards
    if isinstance(module, LinearProbe) and backbone_digest(module.backbone) != before:
        raise RuntimeError("the linear probe changed its backbone: this is a defect of the tool, please report it")
    score = None if test_split is None else judge(config, module, fit, target, test_split)
    made_from = [meta, target.train.meta, {} if target.test is None else target.test.meta]
    result = summary(config, score, about, target, inputs, made_from=made_from)
    result["seconds"] = round(time.monotonic() - started, 3)
    if world.is_main:
        write_json(out, result)
        shutil.rmtree(run / "checkpoints")
        said = f"held-out top-1 {100 * result['val_top1']:.2f} %" if score is None else f"test top-1 {score}"
        say(f"{out.name}: {said} (epoch {result['epoch']} of {config.train.epochs})")
    return result


def judge(config: TransferConfig, module: nn.Module, fit: Fit, target: Target, split: Split) -> Score:
    """Read the test set, once."""
    task: Task = fit.job.task
    if config.robust and target.test is not None:
        # Attacks reach through the whole network, and so ask for pixels also where the probe had features.
        task = Supervised(module)
        task.robust = robust_attack(config.eps)
        split = Split(make_loader(target.test, config, fit.world), split.kept)
    return evaluate(task, fit.engine, fit.world, split, centre(config))


def centre(config: TransferConfig) -> CentreView:
    """How images are seen that choose the epoch and test, and by a linear probe those that train it."""
    return CentreView(config.train.val_resolution, config.train.val_ratio)


def build_module(arch: str, folder: Path, num_classes: int, config: TransferConfig) -> tuple[nn.Module, str]:
    """The pretrained model with a fresh head (frozen below it for a probe), and its backbone's digest."""
    model = build_model(arch, len(checkpoint.read_meta(folder)["classes"]))
    head = head_name(model)
    weights = checkpoint.load_weights(folder)
    names = model.state_dict().keys()
    if weights.keys() not in (names, names - checkpoint.head_keys(model)):
        raise UserError(f"{folder} does not hold a {arch}: its tensors have other names")
    backbone = {name: value for name, value in weights.items() if not name.startswith(head + ".")}
    missing, unexpected = model.load_state_dict(backbone, strict=False)
    if set(missing) != {f"{head}.weight", f"{head}.bias"} or unexpected:
        raise RuntimeError(f"only the head may be fresh, and {missing} were missing, {unexpected} unexpected")
    if config.recipe == "lp":
        probe = LinearProbe(model, num_classes)
        return probe, backbone_digest(probe.backbone)
    replace_head(model, num_classes)
    return model, ""


def make_job(
    config: TransferConfig, module: nn.Module, target: Target, inputs: dict[str, str], run: Path, world: World
) -> tuple[Job, Split | None]:
    """The training job on the target, and the test split. With `cached`, features are the data."""
    loader, view = make_loader(target.train, config, world), centre(config)
    test = None
    if target.test is not None:
        test = Split(make_loader(target.test, config, world), np.arange(target.test.num_samples))
    job = Job(
        out=run,
        task=Supervised(module, label_smoothing=config.train.label_smoothing),
        train=Split(loader, target.fit),
        val=Split(loader, target.val),
        classes=target.train.classes,
        config=config.model_dump(mode="json"),
        inputs=inputs,
        seed=config.seed,
        optim=config.train,
        data=DataConfig(min_scale=config.min_scale, flip=config.flip),
        views=(lambda side, epoch: view) if config.recipe == "lp" else None,
        engine=config.engine,
        log=config.log,
        checkpoint=CheckpointConfig(epoch_end_s=30),  # epochs can take milliseconds, and a checkpoint cannot
        label=run.name.removesuffix(".json.run"),
        whole=True,
    )
    if not config.cached:
        return job, test
    assert isinstance(module, LinearProbe)
    everything = Split(loader, np.arange(target.train.num_samples))
    features = cache_features(module, everything, target.train, view, world)
    if test is not None and target.test is not None:
        test = Split(cache_features(module, test, target.test, view, world), test.kept)
    # From here on nothing but the head is computed: drop the rest, so that a step costs microseconds.
    head_only = Supervised(module.head, label_smoothing=config.train.label_smoothing)
    job = replace(job, task=head_only, train=Split(features, target.fit), val=Split(features, target.val))
    return job, test


def make_loader(beton: Beton, config: TransferConfig, world: World) -> BetonLoader:
    workers = world.num_workers(config.num_workers)
    return BetonLoader(beton, device=world.device, num_workers=workers, tells=world.is_main)


def cache_features(probe: LinearProbe, split: Split, beton: Beton, view: CentreView, world: World) -> FeatureSource:
    """Features (samples, dim) float32 of the whole beton under `view`, on every rank, in the beton's order.

    The same bits for any number of ranks and threads (`dp4tl_dist.exact`).
    """
    batches = inference_batches(split.kept, batch_size=256, num_ranks=world.num_ranks, rank=world.rank)

    @torch.inference_mode()
    def features_of(backbone: nn.Module, images: Tensor) -> tuple[Tensor]:
        return (backbone(normalise(images)).float(),)

    size = rows_at_once(view.resolution) if world.device == "cpu" else 256
    with Parts(probe.backbone.to(world.device).eval(), features_of, size=size) as run:
        rows = [run(batch.images)[0].cpu().numpy() for batch in split.source.epoch(batches, view)]
    mine = np.concatenate([np.zeros((0, probe.head.in_features), np.float32), *rows])
    positions = np.concatenate([np.zeros(0, np.int64), *batches])
    features = torch.from_numpy(gather_rows(world, positions, mine, beton.num_samples))
    return FeatureSource(features.to(world.device), torch.from_numpy(beton.labels.copy()).to(world.device))


def summary(
    config: TransferConfig,
    score: Score | None,
    chosen: dict[str, Any],
    target: Target,
    inputs: dict[str, str],
    *,
    made_from: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The content of the result file; made_from as in `make_meta`."""
    about = config.model_dump(mode="json")
    return {
        **make_meta("transfer", config=about, seed=config.seed, inputs=inputs, made_from=made_from),
        "mode": "lp" if config.recipe == "lp" else "ff",
        "cached": config.cached,
        "num_threads": torch.get_num_threads(),
        **({} if score is None else score.values()),
        "val_top1": chosen["val"]["top1"],
        "epoch": chosen["epoch"],
        "num_train": len(target.fit),
        "num_val": len(target.val),
        "num_test": 0 if score is None else score.num_samples,
    }
