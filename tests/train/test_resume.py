"""A run that is stopped, killed or moved to other ranks ends as one that never was: weights, metrics and order."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from cores import one_core
from data_factory import make_beton
from ranks import run_ranks
from resume_runs import facts, make_run, reached

from dp4tl_dist.cli import main
from dp4tl_dist.config import TrainConfig, load_config
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.train import checkpoint, claim, watch
from dp4tl_dist.train import loop as train_loop
from dp4tl_dist.train import state as run_state
from dp4tl_dist.train.supervised import train
from dp4tl_dist.world import World

STEPS_PER_EPOCH, NUM_STEPS = 15, 45
Undisturbed = Callable[[int], Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    return make_run(root, batch_size=8)


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Undisturbed:
    """The run folder of a run on so many ranks that nothing happened to."""

    def run(num_ranks: int) -> Path:
        out = root / f"undisturbed-{num_ranks}"
        if not out.exists():
            assert finish(root, out, num_ranks) == [EXIT_DONE] * num_ranks
        return out

    return run


def argv(root: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--config", str(root / "config.toml"), "--out", str(out), *more]


def command(line: list[str]) -> int:
    """The command in this process: its exit code."""
    with one_core():
        return main(line)


def train_on_rank(world: World, root: Path, out: Path) -> int:
    train(load_config(TrainConfig, str(root / "config.toml")), out=out, world=world)
    return EXIT_DONE


def finish(root: Path, out: Path, num_ranks: int) -> list[int]:
    """Train to the end and return the exit codes; without new processes, whose imports take seconds."""
    return run_ranks(train_on_rank, num_ranks, root, out) if num_ranks > 1 else [command(argv(root, out))]


class Ranks:
    """The command on several ranks of their own; with `torchrun`, started by it."""

    def __init__(self, root: Path, out: Path, num_ranks: int, *more: str, torchrun: bool = False) -> None:
        self.out = out
        line = ["-m", "dp4tl_dist", *argv(root, out, *more)]
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_ranks}"]
            if torchrun
            else []
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(1 if torchrun else num_ranks):
            environ = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            given = {} if torchrun or num_ranks == 1 else {key: str(value) for key, value in environ.items()}
            with one_core() if num_ranks == 1 else contextlib.nullcontext():
                process = subprocess.Popen(
                    [sys.executable, *launch, *line], env={**os.environ, "OMP_NUM_THREADS": "1", **given},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
            self.processes.append(process)

    def until(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not there():
            assert all(process.poll() is None for process in self.processes), self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        self.until(lambda: reached(self.out) >= step)

    def send(self, number: int, *, rank: int | None = None) -> None:
        for i, process in enumerate(self.processes):
            if rank in (None, i):
                process.send_signal(number)

    def wait(self) -> tuple[list[int], str]:
        """(exit codes, what went to stderr)"""
        texts = [process.communicate(timeout=120)[1] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(texts)


def assert_same(out: Path, other: Path) -> None:
    (weights, metrics, order), expected = facts(out), facts(other)
    assert metrics == expected[1]
    assert order == expected[2]
    assert weights == expected[0]


# ---------------------------------------------------------------- one rank


def test_an_undisturbed_run_is_complete(undisturbed: Undisturbed) -> None:
    out = undisturbed(1)
    weights, metrics, _ = facts(out)
    assert [line["step"] for line in metrics if line["kind"] == "epoch"] == [15, 30, 45]
    every = {*range(4, NUM_STEPS, 4), 15, 30, 45}
    assert [line["step"] for line in metrics if line["kind"] == "step"] == sorted(every)
    assert [line["resolution"] for line in metrics if line["step"] in (4, 20, 44)] == [8, 16, 16]
    order = read_jsonl(out / "order.jsonl")
    assert [line["step"] for line in order] == list(range(1, NUM_STEPS + 1))
    epochs = [list(chain.from_iterable(line["identifiers"] for line in order[i : i + 15])) for i in (0, 15, 30)]
    assert all(len(set(epoch)) == 120 and set(epoch) <= {3 * i + 1 for i in range(124)} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    meta = checkpoint.read_meta(checkpoint.newest(out))  # type: ignore[arg-type]
    assert (meta["step"], meta["epoch"], meta["samples_seen"], meta["restarts"]) == (45, 3, 360, 0)
    assert json.loads((out / "config.json").read_text()) == meta["config"]
    assert len(weights) > 100_000


def test_one_rank_stopped_twice_killed_and_continued(root: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    out = tmp_path / "run"
    for number, step in ((signal.SIGUSR2, 5), (signal.SIGTERM, 20)):
        ranks = Ranks(root, out, 1)
        ranks.until_step(step)
        ranks.send(number)
        codes, text = ranks.wait()
        assert codes == [EXIT_STOPPED] and f"stopped at step {reached(out)} with everything saved in {out}" in text
        meta = checkpoint.read_meta(checkpoint.newest(out))  # type: ignore[arg-type]
        assert meta["step"] == reached(out) < NUM_STEPS and not meta["complete"]
        assert meta["val"] is None or meta["step"] % STEPS_PER_EPOCH == 0
    ranks = Ranks(root, out, 1, "--set", "checkpoint.every_minutes=1e-9")
    ranks.until(lambda: len(list((out / "checkpoints").glob("step_*"))) > 0 and reached(out) >= 33)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    assert finish(root, out, 1) == [EXIT_DONE]
    assert_same(out, undisturbed(1))
    assert checkpoint.read_meta(checkpoint.newest(out))["restarts"] == 3  # type: ignore[arg-type]
    assert not list((out / "checkpoints").glob(".*"))


def test_a_complete_run_is_left_as_it_is(
    root: Path, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in undisturbed(1).rglob("*") if path.is_file()}
    assert finish(root, undisturbed(1), 1) == [EXIT_DONE]
    assert "is complete (3 epochs)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in undisturbed(1).rglob("*") if path.is_file()} == before


@pytest.fixture
def stopped(root: Path, tmp_path: Path) -> Path:
    """A run folder stopped at step 20, inside the second epoch."""
    out = tmp_path / "stopped"
    assert stop_at(argv(root, out), 20) == EXIT_STOPPED
    return out


def stop_at(line: list[str], step: int) -> int:
    """Run the command here; SIGUSR2 arrives while the order of `step` is written down."""
    log_order = watch.log_order

    def signalled(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == step:
            os.kill(os.getpid(), signal.SIGUSR2)

    watch.log_order = signalled
    try:
        return command(line)
    finally:
        watch.log_order = log_order


@pytest.mark.parametrize("step", [14, 15, 16])
def test_stopped_about_an_epochs_end(root: Path, tmp_path: Path, undisturbed: Undisturbed, step: int) -> None:
    out = tmp_path / "run"
    assert stop_at(argv(root, out), step) == EXIT_STOPPED
    assert reached(out) == step
    assert finish(root, out, 1) == [EXIT_DONE]
    assert_same(out, undisturbed(1))


def test_stopped_where_every_step_is_an_epoch(root: Path, tmp_path: Path) -> None:
    line = [*argv(root, tmp_path / "run"), "--set", "train.batch_size=124", "--set", "train.epochs=4"]
    assert stop_at(line, 2) == EXIT_STOPPED
    assert reached(tmp_path / "run") == 2


def test_a_torn_newest_checkpoint_is_skipped(
    root: Path, stopped: Path, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.checkpoint_path(stopped, 20)
    (newest / "meta.json").unlink()
    assert finish(root, stopped, 1) == [EXIT_DONE]
    text = capsys.readouterr().err
    assert f"{newest} is torn or damaged: skipped" in text and "at step 15 of 45" in text
    assert_same(stopped, undisturbed(1))


def test_other_threads_and_another_processor_are_told(
    root: Path, stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on all the same: the same samples in the same steps, and perhaps other last bits."""
    meta = checkpoint.read_meta(checkpoint.checkpoint_path(stopped, 20))
    assert meta["num_threads"] == 1 and run_state.other_machine({}, on_cpu=True) == ""
    elsewhere = {"hardware": {**meta["hardware"], "processor": "Abacus"}}
    assert "saved on Abacus" in run_state.other_machine(elsewhere, on_cpu=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert finish(root, stopped, 1) == [EXIT_DONE]
    told = [line for line in capsys.readouterr().err.splitlines() if "last bits" in line]
    assert len(told) == 1 and "ranks of 1 threads, and these have 2" in told[0] and "training goes on" in told[0]
    assert [line["step"] for line in read_jsonl(stopped / "order.jsonl")] == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(
    ("key", "value"), [("train.lr", "0.06"), ("seed", "4"), ("model.arch", "resnet18"), ("data.flip", "false")]
)
def test_a_changed_config_is_refused(
    root: Path, stopped: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert command([*argv(root, stopped), "--set", f"{key}={value}"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{key} = " in line and str(stopped) in line and "--force" in line
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_changed_data_are_refused(
    root: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_beton(tmp_path / "other.beton", num_classes=4, per_class=30)
    assert command([*argv(root, stopped), "--set", f"data.train={other}"]) == EXIT_BAD_INPUT
    assert "holds a run on another train" in capsys.readouterr().err
    for name in ("train.beton", "train.beton.json"):  # the same content elsewhere is the same
        shutil.copy(root / name, tmp_path / name)
    assert command([*argv(root, stopped), "--set", f"data.train={tmp_path / 'train.beton'}"]) == EXIT_DONE


def test_force_starts_afresh(root: Path, stopped: Path) -> None:
    changes = [part for key in ("lr=0.06", "epochs=1", "ramp_end=1") for part in ("--set", f"train.{key}")]
    assert command([*argv(root, stopped), "--force", *changes]) == EXIT_DONE
    assert [line["step"] for line in read_jsonl(stopped / "order.jsonl")] == list(range(1, 16))
    assert checkpoint.read_meta(checkpoint.newest(stopped))["restarts"] == 0  # type: ignore[arg-type]
    assert not [path for path in stopped.iterdir() if path.name.startswith(claim.REPLACED)]


def test_what_force_replaces_stays_until_its_replacement_is_complete(
    root: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(argv(root, stopped)) == EXIT_DONE
    (stopped / "mine.txt").write_text("not the run's")
    whole = content(stopped)
    assert set(whole) >= {"metrics.jsonl", "order.jsonl", "config.json"}
    force, changed = [*argv(root, stopped), "--force"], ["--set", "train.lr=0.06"]
    # Cut off after any of its renames, the next command finds the run as it was, with --force and without.
    for renames in range(5):
        left, true = iter(range(renames)), Path.rename

        def cut(path: Path, to: Path, left: Iterator[int] = left, true: Any = true) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return true(path, to)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", cut)
            with contextlib.suppress(KeyboardInterrupt):
                claim.set_aside(stopped)
        if renames % 2:
            assert command(argv(root, stopped)) == EXIT_DONE  # it is complete
        else:
            with contextlib.suppress(KeyboardInterrupt), claim.claimed(stopped, force=True):
                raise KeyboardInterrupt
            assert content(stopped / claim.REPLACED) == {name: whole[name] for name in whole if name != "mine.txt"}
            shutil.rmtree(stopped / claim.MOVING, ignore_errors=True)
            with claim.claimed(stopped, force=True):  # one more --force keeps the finished run, not the empty one
                assert (stopped / claim.REPLACED / "checkpoints").is_dir()
                for path in (stopped / claim.REPLACED).iterdir():
                    path.rename(stopped / path.name)
        assert content(stopped) == whole
    # Stopped and gone on with, without --force the second time: the old run is there until the new one is whole.
    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "learning_rate", lambda optim, epoch: float("inf") if epoch > 1.5 else 0.01)
        assert command([*force, *changed]) == EXIT_FAILURE
    assert content(stopped / claim.REPLACED) == {name: whole[name] for name in whole if name != "mine.txt"}
    assert command([*argv(root, stopped), *changed]) == EXIT_DONE
    assert not (stopped / claim.REPLACED).exists() and content(stopped) != whole
    assert (stopped / "mine.txt").read_text() == "not the run's"


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run by their names, less the hidden ones and TensorBoard's."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = [name for name in names if any(part[0] == "." or part == "tensorboard" for part in name.parts)]
    return {str(name): (folder / name).read_bytes() for name in names if name not in hidden}


# ---------------------------------------------------------------- what is not finite


@pytest.fixture
def spoilt_rate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, float], None]]:
    """spoilt_rate(step, lr): that step of a run takes that learning rate."""

    def spoil(step: int, lr: float) -> None:
        true = train_loop.learning_rate
        at = lambda optim, epoch: lr if round(epoch * STEPS_PER_EPOCH) == step else true(optim, epoch)  # noqa: E731
        monkeypatch.setattr(train_loop, "learning_rate", at)

    yield spoil


def test_a_loss_that_is_not_finite_ends_the_run(
    root: Path, tmp_path: Path, spoilt_rate: Callable[[int, float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt_rate(20, float("inf"))
    assert command(argv(root, tmp_path / "run")) == EXIT_FAILURE
    (line,) = capsys.readouterr().err.splitlines()
    assert "the loss became nan within steps 20..23" in line and "last good checkpoint" in line
    last = checkpoint.newest(tmp_path / "run")
    assert last is not None and checkpoint.read_meta(last)["step"] == 15


def test_weights_that_are_not_finite_are_not_saved(
    root: Path, tmp_path: Path, spoilt_rate: Callable[[int, float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt_rate(29, float("inf"))  # the last step of the second epoch: no loss shows it before that epoch's checkpoint
    assert command(argv(root, tmp_path / "run")) == EXIT_FAILURE
    assert "not finite after step 29" in capsys.readouterr().err
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "run")] == ["step_000000015"]


# ---------------------------------------------------------------- several ranks


def test_two_ranks_stopped_by_one_killed_and_continued(root: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    out = tmp_path / "run"
    ranks = Ranks(root, out, 2)
    ranks.until_step(5)
    ranks.send(signal.SIGUSR2, rank=1)
    codes, text = ranks.wait()
    assert codes == [EXIT_STOPPED] * 2 and text.count("stopped at step") == 1
    shutil.copytree(out, tmp_path / "alone")
    ranks = Ranks(root, out, 2, "--set", "checkpoint.every_minutes=1e-9")
    ranks.until_step(21)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    assert finish(root, out, 2) == [EXIT_DONE] * 2
    assert_same(out, undisturbed(2))
    # On another number of ranks each step still sees the samples that it would have seen.
    moved = tmp_path / "alone"
    assert finish(root, moved, 1) == [EXIT_DONE]
    orders = [read_jsonl(folder / "order.jsonl") for folder in (moved, undisturbed(2), undisturbed(1))]
    sets = [[(line["step"], sorted(line["identifiers"])) for line in order] for order in orders]
    assert sets[0] == sets[1] == sets[2]


def test_torchrun_passes_the_stop_on(root: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    out = tmp_path / "run"
    ranks = Ranks(root, out, 2, torchrun=True)
    ranks.until_step(18)
    ranks.send(signal.SIGTERM)
    (code,), text = ranks.wait()
    assert code != EXIT_DONE and "stopped at step" in text  # torchrun has an exit code of its own
    assert checkpoint.read_meta(checkpoint.newest(out))["step"] == reached(out) < NUM_STEPS  # type: ignore[arg-type]
    assert finish(root, out, 2) == [EXIT_DONE] * 2
    assert_same(out, undisturbed(2))
