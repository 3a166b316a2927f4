"""Saving and restoring a run, exactly: weights, optimizer, generators, each rank's own batch-norm buffers, position."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from dp4tl_dist.errors import UserError
from dp4tl_dist.log import warn
from dp4tl_dist.machine import hardware
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train.buffers import averaged_buffers
from dp4tl_dist.waiting import together
from dp4tl_dist.world import alone, lost_others

if TYPE_CHECKING:
    from dp4tl_dist.train.loop import Fit

# What may differ between a run and its continuation without changing the result.
FREE = (
    "log", "checkpoint", "engine.device", "engine.compile", "engine.channels_last", "engine.timeout_s", "model.init",
    "data.num_workers", "data.os_cache", "data.train", "data.val", "data.subset", "data.val_subset",
    "data.steps_of", "data.on_bad_sample", "train.val_every",
)  # fmt: skip


def save(fit: "Fit", *, must_succeed: bool) -> dict[str, Any]:
    """Write a checkpoint from rank 0, with every rank's own state inside. All ranks call it together.

    A full disk does not end a run that can go on: it is warned about, and the last good checkpoint stays. With
    `must_succeed` the checkpoint is whole on return, or it is a UserError on every rank.
    """
    job, world, meta = fit.job, fit.world, fit.meta()
    if world.is_main:
        fit.owner.check()
    alone(world, "which saves the checkpoint before", fit.saver.wait)
    shared, own_share = fit.engine.optimizer_state()
    own = own_state(fit, own_share)
    everyone: list[Any] = [own]
    if world.num_ranks > 1:
        everyone = [None] * world.num_ranks
        with together():
            dist.all_gather_object(everyone, own)
    folder, step = checkpoint.checkpoint_path(job.out, fit.at.step), fit.at.step

    def write(content: dict[str, Any]) -> None:
        assert fit.metrics is not None
        fit.owner.check()
        fit.metrics.save()
        if job.losses:
            job.losses.save()
        checkpoint.save(folder, **content, meta=meta)
        checkpoint.prune_old(job.out, keep=job.checkpoint.keep, step=step)

    extra = job.task.extra()
    with averaged_buffers(job.task.module, world):
        where = {key: meta[key] for key in ("epoch", "step", "samples_seen")}
        state = {"optimizer": shared, "ranks": everyone, "task": extra, **where}
        content = {"weights": job.task.weights() if world.is_main else {}, "state": state}
        alone(world, f"which saves {folder}", lambda: fit.saver.save(folder, write, content))
    if must_succeed:
        failure = [alone(world, f"which saves {folder}", fit.saver.wait)]
        if world.num_ranks > 1:
            with together():
                dist.broadcast_object_list(failure)
        if failure[0]:
            again = "make room and run the same command again, it goes on from the last one saved"
            raise UserError(f"{failure[0]}: {again}")
    return meta


def own_state(fit: "Fit", optimizer: Any) -> dict[str, Any]:
    """What this rank alone knows: generators, batch-norm buffers before averaging, its share of the optimizer."""
    buffers = {name: buffer.detach().cpu() for name, buffer in fit.job.task.module.named_buffers()}
    losses = [loss.item() for loss in fit.at.since_log]
    own: dict[str, Any] = {"cpu_rng": torch.get_rng_state(), "buffers": buffers, "losses": losses}
    own["optimizer"] = optimizer
    own["bad_samples"] = int(fit.at.bad_samples)
    if fit.world.device != "cpu":
        own["cuda_rng"] = torch.cuda.get_rng_state()
    return own


def resume(fit: "Fit") -> dict[str, Any] | None:
    """Restore the newest whole checkpoint of the run folder into `fit`; None where there is none."""
    job, world = fit.job, fit.world
    # Rank 0 looks and the others follow, so that a slow shared file system cannot split them.
    found: list[Any] = [alone(world, f"which reads {job.out}", lambda: checkpoint.newest(job.out))]
    if world.num_ranks > 1:
        with together():
            dist.broadcast_object_list(found)
    folder = found[0]
    if folder is None:
        return None
    meta = checkpoint.read_meta(folder)
    with fitting(folder):
        check_same_run(fit, meta)
        state = checkpoint.load_state(folder)
        job.task.restore(folder, state["task"])
        restore(fit, meta, state)
    if world.is_main and not meta["complete"]:
        other = f" (saved by {meta['num_ranks']} ranks)" if fit.at.moved else ""
        warn(f"{job.label}: resuming {job.out} at step {fit.at.step} of {job.num_steps}{other}")
        if not fit.at.moved and (change := other_machine(meta, on_cpu=world.device == "cpu")):
            warn(f"{change}: training goes on, and may end in other last bits than without the stop")
    return meta


def other_machine(meta: dict[str, Any], *, on_cpu: bool) -> str:
    """What rounds otherwise here than where a checkpoint was saved; empty where nothing is known to."""
    saved, here = meta.get("hardware"), hardware()
    threads, now = meta.get("num_threads"), torch.get_num_threads()
    if isinstance(saved, dict):
        for key in ("processor", "instructions"):
            if key in saved and saved[key] != here[key]:
                return f"the checkpoint was saved on {saved[key]}, and this is {here[key]}"
    if on_cpu and isinstance(threads, int) and threads != now:
        return f"the checkpoint was saved by ranks of {threads} threads, and these have {now} (see OMP_NUM_THREADS)"
    return ""


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """A checkpoint whose parts are whole, but not what this run would have saved, is a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        if lost_others(error):
            raise
        raise UserError(
            f"the checkpoint {folder} does not fit this run ({type(error).__name__}: {str(error)[:200]}): "
            "use another --out, or --force to start afresh"
        ) from error


def restore(fit: "Fit", meta: dict[str, Any], state: dict[str, Any]) -> None:
    """Fill optimizer, generators, buffers and position from a checkpoint; ValueError and its like where they do not
    fit."""
    job, world, at = fit.job, fit.world, fit.at
    fit.engine.adopt()
    fit.engine.load_optimizer_state(state["optimizer"], [rank["optimizer"] for rank in state["ranks"]])
    same = len(state["ranks"]) == world.num_ranks
    own = state["ranks"][world.rank if same else 0]
    losses = own["losses"] if same else np.mean([rank["losses"] for rank in state["ranks"]], axis=0)
    at.since_log = [torch.tensor(float(loss), device=world.device) for loss in losses]
    bad_samples = [int(rank["bad_samples"]) for rank in state["ranks"]]
    at.bad_samples = bad_samples[world.rank] if same else sum(bad_samples) * world.is_main
    if same:
        named = dict(job.task.module.named_buffers())
        with torch.no_grad():
            for name, value in own["buffers"].items():
                named[name].copy_(value)
        torch.set_rng_state(own["cpu_rng"])
        if "cuda_rng" in own and world.device != "cpu":
            torch.cuda.set_rng_state(own["cuda_rng"])
    at.step, at.seconds, at.restarts = int(meta["step"]), float(meta["seconds"]), int(meta["restarts"]) + 1
    first, second = meta["best"]
    at.val, at.best = meta["val"], (float(first), float(second))
    at.moved = int(meta["num_ranks"]) != world.num_ranks
    if not (0 <= at.step <= job.num_steps and 0 <= at.seconds < math.inf and at.restarts > 0):
        raise ValueError(f"step {at.step}, {at.seconds} s, {at.restarts - 1} restarts")
    if not isinstance(meta["complete"], bool) or not isinstance(at.val, dict | None):
        raise TypeError('"complete" or "val"')


def check_same_run(fit: "Fit", meta: dict[str, Any]) -> None:
    """Refuse to continue a run under another config or on other data, naming what differs."""
    job = fit.job
    before, now = flatten(meta["config"]), flatten(job.config)
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE)
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"{job.out} holds a run with {key} = {before.get(key)!r}, and now it is {now.get(key)!r}: "
                "use another --out, or --force to start afresh"
            )
    for name in sorted(meta["inputs"].keys() | job.inputs.keys()):
        if meta["inputs"].get(name) != job.inputs.get(name):
            raise UserError(
                f"{job.out} holds a run on another {name} ({meta['inputs'].get(name)}, now {job.inputs.get(name)}): "
                "use another --out, or --force to start afresh"
            )


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
