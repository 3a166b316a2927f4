"""The one training loop: fit(job) -> epoch -> engine.step(batch) -> task(batch)["loss"]."""

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dp4tl_dist.data.loader import IGNORED, Batch, CentreView
from dp4tl_dist.data.order import epoch_order, rank_batches, spread_batches
from dp4tl_dist.errors import Stopped
from dp4tl_dist.files import make_meta, write_json
from dp4tl_dist.log import Advance, Metrics, progress, say
from dp4tl_dist.nodes import seconds_to_stop
from dp4tl_dist.schedule import learning_rate
from dp4tl_dist.train import checkpoint, watch
from dp4tl_dist.train import state as run_state
from dp4tl_dist.train.engine import make_engine
from dp4tl_dist.train.evaluate import Score
from dp4tl_dist.train.job import Job
from dp4tl_dist.train.owner import Owner
from dp4tl_dist.train.saver import Saver
from dp4tl_dist.train.signals import Agreement, StopFlag
from dp4tl_dist.waiting import together
from dp4tl_dist.world import World, all_max, all_sum

EPOCH_LINE_EVERY_S = 3.0


@dataclass
class Progress:
    """Where a run stands. What is saved, and what resuming restores."""

    step: int = 0
    seconds: float = 0.0
    restarts: int = 0
    val: dict[str, float] | None = None
    best: tuple[float, float] = checkpoint.goodness(None)
    """The best validation so far."""
    since_log: list[torch.Tensor] = field(default_factory=list)
    bad_samples: torch.Tensor | int = 0
    """Samples of this rank's part of the epoch that could not be decoded and were left out."""
    moved: bool = False
    """Whether another number of ranks saved what this run goes on from."""


class Fit:
    """One run of a Job on this rank."""

    def __init__(self, job: Job, world: World) -> None:
        job.check(world.num_ranks)
        self.job, self.world = job, world
        self.engine = make_engine(world, job.task, job.optim, job.engine)
        self.at = Progress()
        self.metrics: Metrics | None = None
        self.owner = Owner(job.out)
        self.saver = Saver(background=world.device != "cpu")
        self.started = time.monotonic()
        self.said_at = -EPOCH_LINE_EVERY_S
        self.skips = job.data.on_bad_sample == "skip"

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if there is one. Returns the last checkpoint's meta."""
        job = self.job
        meta = run_state.resume(self)
        if self.world.is_main:
            job.out.mkdir(parents=True, exist_ok=True)
            write_json(job.out / "config.json", job.config)
        if self.at.step >= job.num_steps and meta is not None:
            self._say(f"{job.label}: {job.out} is complete ({job.plan.num_epochs} epochs)")
            watch.finish_losses(self)
            return meta
        watch.open_losses(self)
        self.started = time.monotonic() - self.at.seconds
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopFlag(seconds_to_stop(os.environ) if self.world.is_main else None))
            self.agreement = Agreement(self.world, stop, save_every_s=job.checkpoint.every_minutes * 60)
            if self.world.is_main:
                self.owner.claim()
                self.metrics = stack.enter_context(Metrics(job.out, step=self.at.step, tensorboard=job.log.tensorboard))
                if self.at.moved:
                    self.metrics.write(
                        "resume", step=self.at.step, restarts=self.at.restarts, num_ranks=self.world.num_ranks
                    )
            stack.callback(self.saver.close)
            advance = stack.enter_context(progress(job.label, shown=self.world.is_main))
            job.task.module.train()
            while self.at.step < job.num_steps:
                meta = self._epoch(advance)
        watch.finish_losses(self)
        assert meta is not None
        return meta

    def _epoch(self, advance: Advance) -> dict[str, Any] | None:
        """Train to the end of the epoch that the run stands in; validate and save. Returns the meta, where saved."""
        job, at = self.job, self.at
        at.val = None
        epoch = at.step // job.steps_per_epoch
        side, end = job.plan.side(epoch), job.plan.last_step(epoch)
        waited, begun, first = 0.0, time.monotonic(), at.step
        job.task.epoch = epoch
        with contextlib.closing(self._batches(epoch, side)) as batches:
            while at.step < end:
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                lr = learning_rate(job.optim, job.plan.position(at.step))
                size = job.plan.seen(at.step + 1) - job.plan.seen(at.step)
                with together():
                    at.since_log.append(self.engine.step(batch, lr=lr, size=size))
                if self.skips:
                    at.bad_samples += (batch.labels == IGNORED).sum()
                at.step += 1
                at.val = None  # it was that of other weights
                watch.log_order(self, batch)
                stop, save = self.agreement.after_step()
                end_of_epoch = at.step == end
                if at.step % job.log.every == 0 or end_of_epoch:
                    spent = time.monotonic() - begun
                    rate = (job.plan.seen(at.step) - job.plan.seen(first)) / spent
                    loss = watch.log_step(self, epoch, lr=lr, side=side, rate=rate, waited=waited / spent)
                    advance(
                        at.step, job.num_steps, epoch=f"{epoch + 1}/{job.plan.num_epochs}", loss=loss, img_s=round(rate)
                    )
                if (stop or save) and not end_of_epoch:
                    self._save(stopping=stop)
        better = self._validate(epoch, loss, rate)
        stopping = (self.agreement.settle()[0] or stop) and at.step < job.num_steps
        if stopping or better or at.step == job.num_steps or self._due():
            return self._save(stopping=stopping)
        return None

    def _due(self) -> bool:
        """Whether an epoch's end is saved for its own sake; rank 0's clock decides."""
        due = time.monotonic() - self.agreement.saved_at >= self.job.checkpoint.epoch_end_s
        return bool(all_max(self.world, np.array([int(self.world.is_main and due)]))[0])

    def _batches(self, epoch: int, side: int) -> Generator[Batch, None, None]:
        job = self.job
        order = epoch_order(job.train.kept, job.train.pages, seed=job.seed, epoch=epoch)
        done, batch, world = self.at.step - epoch * job.steps_per_epoch, job.optim.batch_size, self.world
        if job.whole:
            mine = spread_batches(order, batch_size=batch, num_ranks=world.num_ranks, rank=world.rank, first=done)
        else:
            mine = list(rank_batches(
                order, batch_size=batch, num_ranks=world.num_ranks, rank=world.rank, drop_first=done * batch
            ))  # fmt: skip
        return job.train.source.epoch(mine, job.view(side, epoch))

    def _validate(self, epoch: int, loss: float, rate: float) -> bool:
        """Validate where it is due, write the epoch's line, and tell whether the model was never better."""
        job, last = self.job, self.at.step == self.job.num_steps
        score: Score | None = None
        if job.val is not None and ((epoch + 1) % job.optim.val_every == 0 or last):
            view = CentreView(job.optim.val_resolution, job.optim.val_ratio)
            observe = job.losses.add_validation if job.losses else None
            self.engine.collect()
            more = {"observe": observe} if observe else {}
            score = job.evaluate(job.task, self.engine, self.world, job.val, view, **more)
            if job.losses:
                job.losses.end_validation(self.world, epoch)
        self.at.val = None if score is None else score.values()
        self.at.seconds = time.monotonic() - self.started
        values: dict[str, Any] = {f"val_{name}": value for name, value in (self.at.val or {}).items()}
        if self.skips:
            values["bad_samples"] = int(all_sum(self.world, np.array([int(self.at.bad_samples)]))[0])
            self.at.bad_samples = 0
        if self.metrics:
            self.metrics.write(
                "epoch", step=self.at.step, epoch=epoch, loss=loss, seconds=round(self.at.seconds, 3), **values
            )
        shown = f"  val top-1 {score}" if score else ""
        if last or time.monotonic() - self.said_at >= EPOCH_LINE_EVERY_S:
            self.said_at = time.monotonic()
            self._say(
                f"{job.label}: epoch {epoch + 1}/{job.plan.num_epochs}  loss {loss:.4f}{shown}  {rate:.0f} images/s"
            )
        now = checkpoint.goodness(self.at.val)
        better = now > self.at.best
        self.at.best = max(self.at.best, now)
        return better

    def _save(self, *, stopping: bool) -> dict[str, Any]:
        """Save where the run stands, on all ranks together; then stop if that was asked."""
        watch.mean_loss(self)  # weights that a NaN has reached are never saved over good ones
        self.engine.collect()
        watch.check_weights(self)
        watch.gather_losses(self)
        self.at.seconds = time.monotonic() - self.started
        meta = run_state.save(self, must_succeed=stopping or self.at.step == self.job.num_steps)
        self.agreement.saved_at = time.monotonic()
        if stopping:
            raise Stopped(
                f"stopped at step {self.at.step} with everything saved in {self.job.out}: run it again to continue"
            )
        return meta

    def _say(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    def meta(self) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        job, at = self.job, self.at
        return {
            **make_meta("checkpoint", config=job.config, seed=job.seed, inputs=job.inputs, made_from=job.made_from),
            "classes": list(job.classes),
            "step": at.step,
            "epoch": at.step // job.steps_per_epoch,
            "samples_seen": job.plan.seen(at.step),
            "num_samples": len(job.train.kept),
            "num_ranks": self.world.num_ranks,
            "num_threads": torch.get_num_threads(),
            "restarts": at.restarts,
            "seconds": round(at.seconds, 3),
            "val": at.val,
            "best": list(at.best),
            "complete": at.step == job.num_steps,
        }
