"""How fast this machine trains a recipe: the real loader, engine and checkpoint, for a few steps on the ranks given."""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dp4tl_dist.config import TrainConfig
from dp4tl_dist.data.loader import CentreView
from dp4tl_dist.log import Metrics
from dp4tl_dist.schedule import learning_rate
from dp4tl_dist.train import state as run_state
from dp4tl_dist.train.cost import Speed
from dp4tl_dist.train.evaluate import Split, evaluate
from dp4tl_dist.train.loop import Fit
from dp4tl_dist.train.signals import Agreement, StopFlag
from dp4tl_dist.train.supervised import make_job
from dp4tl_dist.world import World, all_max

CHUNKS = 4
VAL_SAMPLES = 1024


def measure(config: TrainConfig, world: World, *, seconds: float = 10.0) -> Speed:
    """Train for about `seconds` as `config` says, in a folder that is thrown away. All ranks call it.

    The medians of CHUNKS stretches count, of the slowest rank each, so that one hiccup of the machine does not.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = make_job(config, out=Path(folder) / f"rank{world.rank}", world=world)
        job.check(world.num_ranks)
        fit = Fit(job, world)
        fit.agreement = Agreement(world, stack.enter_context(StopFlag()), save_every_s=0.0)
        job.task.module.train()
        warm_up = chunk(fit, 0, steps=min(2, job.steps_per_epoch))
        started = since_start()
        steps = int(np.clip(seconds / CHUNKS / max(warm_up[1], 1e-6), 2, job.steps_per_epoch))
        rows = np.array([chunk(fit, i, steps=steps) for i in range(1, CHUNKS + 1)])
        epoch_s, step_s = np.median(rows, axis=0).tolist()
        rest = job.val or job.train
        split = replace(rest, kept=rest.kept[:VAL_SAMPLES])
        val_s = min(timed(fit, lambda: validate(fit, split)) for _ in range(2))
        if world.is_main:
            job.out.mkdir()
            fit.metrics = stack.enter_context(Metrics(job.out, step=0, tensorboard=job.log.tensorboard))
        stack.callback(fit.saver.close)
        save_s = timed(fit, lambda: run_state.save(fit, must_succeed=True))
    # The warm-up's two steps are no start-up; what they took longer than others is.
    startup_s = float(all_max(world, np.array([max(0.0, started - epoch_s - 2 * step_s)]))[0])
    return Speed(config.train.batch_size / step_s, len(split.kept) / val_s, epoch_s, save_s, startup_s)


def chunk(fit: Fit, epoch: int, *, steps: int) -> tuple[float, float]:
    """(seconds until the first batch, seconds a step) of the first `steps` of an epoch, on the slowest rank."""
    job, fit.at.step = fit.job, epoch * fit.job.steps_per_epoch
    begun = now(fit)
    batches = fit._batches(epoch, job.optim.resolution)
    try:
        batch = next(batches)
        first = now(fit)
        for step in range(steps):
            fit.engine.step(batch, lr=learning_rate(job.optim, 0.0))
            fit.agreement.after_step()
            if step + 1 < steps:
                batch = next(batches)
        ended = now(fit)
        fit.agreement.settle()
    finally:
        batches.close()
    first_s, step_s = all_max(fit.world, np.array([first - begun, (ended - first) / steps])).tolist()
    return first_s, step_s


def validate(fit: Fit, split: Split) -> None:
    optim = fit.job.optim
    evaluate(fit.job.task, fit.engine, fit.world, split, CentreView(optim.val_resolution, optim.val_ratio))


def timed(fit: Fit, call: Callable[[], object]) -> float:
    begun = now(fit)
    call()
    return float(all_max(fit.world, np.array([now(fit) - begun]))[0])


def now(fit: Fit) -> float:
    """The time, once the device has done all that was asked of it."""
    if fit.world.device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic()


def since_start() -> float:
    """Seconds since this process began, or the launcher that started it as one of several ranks."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # in ticks since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
