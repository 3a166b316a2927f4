"""A run of several ranks that is stopped and continued, on as many ranks or on another number of them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cores import one_core
from ranks import run_ranks
from resume_runs import facts, make_run, reached

from dp4tl_dist.config import TrainConfig, load_config
from dp4tl_dist.errors import Stopped
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.train import watch
from dp4tl_dist.train.supervised import train
from dp4tl_dist.world import World


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    return make_run(root, batch_size=12)


def train_until(world: World, root: Path, out: Path, step: int) -> str:
    """Train to the end, or be asked to stop in step `step`. Returns what the stop said."""
    log_order = watch.log_order

    def signalled(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == step and world.rank == world.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    watch.log_order = signalled
    try:
        train(load_config(TrainConfig, str(root / "config.toml")), out=out, world=world)
    except Stopped as stop:
        return str(stop)
    finally:
        watch.log_order = log_order
    return ""


def test_moved_from_two_ranks_to_one_and_to_four(root: Path, tmp_path: Path) -> None:
    """Every step sees the samples that it would have seen, and each move is written down."""
    out, whole = tmp_path / "moved", tmp_path / "whole"
    assert all("stopped at step" in said for said in run_ranks(train_until, 2, root, out, 5))
    first = reached(out)
    with one_core():
        assert "stopped at step" in train_until(World(), root, out, 13)
    second = reached(out)
    assert run_ranks(train_until, 4, root, out, 0) == [""] * 4
    with one_core():
        train_until(World(), root, whole, 0)
    orders = [read_jsonl(folder / "order.jsonl") for folder in (out, whole)]
    sets = [[(line["step"], sorted(line["identifiers"])) for line in order] for order in orders]
    assert sets[0] == sets[1] and len(sets[0]) == 30
    moves = [line for line in read_jsonl(out / "metrics.jsonl") if line["kind"] == "resume"]
    assert [(line["step"], line["num_ranks"]) for line in moves] == [(first, 1), (second, 4)]


def test_three_ranks_stopped_and_continued(root: Path, tmp_path: Path) -> None:
    """More than two ranks sum in a ring, whose order may not depend on where the run was cut."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    assert all("stopped at step" in said for said in run_ranks(train_until, 3, root, out, 13))
    assert run_ranks(train_until, 3, root, out, 0) == run_ranks(train_until, 3, root, whole, 0) == [""] * 3
    assert facts(out) == facts(whole)
