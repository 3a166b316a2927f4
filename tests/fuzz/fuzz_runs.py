"""Run folders: what a training goes on from, and what the report shows."""

import contextlib
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import fuzz_checkpoint
import numpy as np
import torch
from fuzz_formats import mutate_npz, mutate_state
from fuzz_mutate import mutate_bytes, mutate_json, mutate_lines
from torch import nn

from dp4tl_dist.config import CheckpointConfig, DataConfig, EngineConfig, LogConfig, OptimConfig, TrainConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import write_json
from dp4tl_dist.log import Metrics
from dp4tl_dist.report import provenance, sections, tables
from dp4tl_dist.report.brute_force import forces
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.collect import read_run
from dp4tl_dist.report.html import render
from dp4tl_dist.report.selection import selections
from dp4tl_dist.report.studies import sweep_tables
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train import state as run_state
from dp4tl_dist.train.evaluate import Split
from dp4tl_dist.train.job import Job
from dp4tl_dist.train.loop import Fit
from dp4tl_dist.train.task import Supervised
from dp4tl_dist.world import World

sys.path.append(str(Path(__file__).parents[1] / "report"))
from fake_run import make_run

Files = dict[str, bytes]
NUM_STEPS = 40
PAGE_EVERY = 100  # drawing takes a second: one case of so many is shown whole


# ---------------------------------------------------------------- resuming


class Images:
    """As a source of samples; nothing is drawn from it."""

    def epoch(self, batches: Any, view: Any) -> Iterator[Batch]:
        return iter(())


@cache
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def make_fit(out: Path) -> Fit:
    """A small run in `out`, as it stands before it looks for a checkpoint."""
    optim = OptimConfig(epochs=4, batch_size=4, peak_epoch=1)
    config = TrainConfig(train=optim).model_dump(mode="json")
    job = Job(
        out=out, task=Supervised(network()), train=Split(Images(), np.arange(NUM_STEPS)), val=None, classes=("a", "b"),
        config=config, inputs={"train": "ab" * 16}, seed=0, optim=optim, data=DataConfig(),
        engine=EngineConfig(device="cpu", channels_last=False), log=LogConfig(), checkpoint=CheckpointConfig(),
    )  # fmt: skip
    return Fit(job, World())


def resume_seeds(folder: Path) -> list[Files]:
    found = []
    for step in (7, 30):
        fit = make_fit(folder)
        labels = torch.tensor([0, 1, 1, 0])
        fit.engine.step(Batch(torch.randn(4, 3), labels, labels), lr=0.1)
        fit.at.step, fit.at.since_log = step, [torch.tensor(0.5)]
        with Metrics(folder, step=0, tensorboard=False) as fit.metrics:
            run_state.save(fit, must_succeed=True)
        files = sorted(checkpoint.checkpoint_path(folder, step).iterdir())
        found.append({f"{fuzz_checkpoint.STEP}/{item.name}": item.read_bytes() for item in files})
    return found


def mutate_resume(rng: Random, files: Files, others: list[Files]) -> Files:
    """The state or the meta, whose digests are made right again: `checkpoint` has what does not fit its digest."""
    name = f"{fuzz_checkpoint.STEP}/{rng.choice(('state.pt', 'meta.json'))}"
    change = mutate_state if name.endswith(".pt") else mutate_json
    return {**files, name: change(rng, files[name], [other[name] for other in others]), "resign": b""}


def read_resume(folder: Path) -> Iterator[None]:
    step = folder / fuzz_checkpoint.STEP
    with contextlib.suppress(UserError):  # what cannot be read cannot be signed
        if (folder / "resign").exists():
            fuzz_checkpoint.resign(step)
    fit = make_fit(folder)
    yield
    if run_state.resume(fit) is None:
        return
    yield
    # What the loop goes on with.
    at = fit.at
    assert isinstance(at.step, int) and 0 <= at.step <= NUM_STEPS and at.seconds >= 0 and at.restarts >= 0
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in at.since_log)
    assert isinstance(at.best, tuple) and len(at.best) == 2 and isinstance(int(at.bad_samples), int)
    labels = torch.tensor([0, 1, 1, 0])
    fit.engine.step(Batch(torch.randn(4, 3), labels, labels), lr=0.1)
    yield


# ---------------------------------------------------------------- the report


def report_seeds(folder: Path) -> list[Files]:
    out = folder / "run"
    with contextlib.redirect_stdout(sys.stderr):
        arms = ("dense", "lm@0.5", "fm@0.5", "influence@0.5", "random@0.5")
        make_run(out, classes=("ant", "bee", "<b>cat", "d\n"), arms=arms, robust=True)
    row = {"target": "pets", "arm": "lm@0.5", "mode": "lp", "n": 2, "mean": 79.5, "to_random": 19.0, "pairs": 2}
    write_json(out / "sweep.json", {"summary": [row, {**row, "std": None}], "surrogates": []})
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return [found]


def mutate_report(rng: Random, files: Files, others: list[Files]) -> Files:
    changed = dict(files)
    names = [name for name in sorted(files) if not name.endswith(".beton")]
    for name in rng.sample(names, rng.choice((1, 1, 3))):
        content = files[name]
        if name.endswith(".npz"):
            changed[name] = mutate_npz(rng, content, [content])
        elif name.endswith(".json"):
            changed[name] = mutate_json(rng, content, [content])
        elif name.endswith(".jsonl"):
            rows = content.split(b"\n")
            place = rng.randrange(len(rows))
            rows[place] = mutate_json(rng, rows[place] or b"{}", [content])
            changed[name] = b"\n".join(rows)
        else:
            changed[name] = rng.choice((mutate_bytes, mutate_lines))(rng, content, [content])
    return changed


def read_report(folder: Path) -> Iterator[None]:
    run = read_run(folder)
    whole = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.json")))
    if zlib.crc32(whole) % PAGE_EVERY == 0:
        assert "</html>" in render(run)
        return
    found = list(selections(run))
    forced = list(forces(run, found))
    yield
    shown: list[object] = [tables.results(run), tables.times(run.arms), provenance.stages(run), sweep_tables(run)]
    shown += [provenance.fingerprints(run), tables.curves("x", run.trainings), list(caveats(run)), run.last_sign()]
    shown += [provenance.datasets(run), sections.in_words(run), sections.cards(run, found, forced)]
    shown += [table(item) for item in found for table in (tables.votes, tables.affinities)]
    shown += [table(item) for item in forced for table in (tables.influence, tables.agreed)]
    assert all(item is not None for item in shown) and all(isinstance(text, str) for text in run.problems)
    yield
