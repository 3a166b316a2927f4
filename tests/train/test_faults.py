"""What goes wrong ends every rank soon, with the cause told first; what can be borne is borne and told."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cores import one_core
from data_factory import make_beton
from fault_ranks import Fault, run_with_fault, torchrun_with_fault

from dp4tl_dist import launcher
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE
from dp4tl_dist.launcher import StageProcess
from dp4tl_dist.log import JsonLines, read_jsonl
from dp4tl_dist.train import checkpoint, watch
from dp4tl_dist.train import loop as train_loop
from dp4tl_dist.train.saver import Saver, snapshot
from dp4tl_dist.train.task import Supervised

TIMEOUT_S = 4
TIMES = ("images_per_s", "data_wait", "seconds")


def make_config(folder: Path, **tables: dict[str, Any]) -> Path:
    """A run of 3 epochs x 8 steps over `folder`/train.beton."""
    content: dict[str, Any] = {
        "data": {"train": str(folder / "train.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": 3, "batch_size": 4, "peak_epoch": 1, "lr": 0.05, "resolution": 32, "val_resolution": 32},
        "engine": {"device": "cpu", "timeout_s": TIMEOUT_S},
        "log": {"every": 3, "tensorboard": False, "order": True},
        "checkpoint": {"every_minutes": 0},
    }
    for name, table in tables.items():
        content[name] |= table
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_beton(tmp_path / "train.beton", num_classes=4, per_class=8)
    make_config(tmp_path)
    return tmp_path


def argv(folder: Path, out: str = "run") -> list[str]:
    return ["train", "--config", str(folder / "config.json"), "--out", str(folder / out)]


def shared_files() -> set[str]:
    return {item.name for item in Path("/dev/shm").iterdir() if item.is_file()}


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("kind", "code", "told"),
    [
        ("raise", EXIT_FAILURE, "dp4tl [rank 1]: error: ZeroDivisionError: the seventh wave"),
        ("exit", 7, ""),
        ("SIGKILL", -signal.SIGKILL, ""),
        ("SIGSTOP", -signal.SIGKILL, ""),
        ("memory", EXIT_FAILURE, "dp4tl [rank 1]: error: out of memory (Unable to allocate 2.00 GiB"),
        ("thread", EXIT_FAILURE, "train.beton has died"),
    ],
)
def test_a_rank_that_fails_ends_all(folder: Path, kind: str, code: int, told: str) -> None:
    before = shared_files()
    codes, text, took = run_with_fault(argv(folder), Fault(kind), folder)
    errors = [line for line in text.splitlines() if line.startswith("dp4tl")]
    assert codes == [EXIT_FAILURE, code], text
    assert errors[-1].startswith("dp4tl: error: another rank ended, or does not answer any more"), text
    assert told in errors[0] and len(errors) == (2 if told else 1), text
    assert took < TIMEOUT_S + 90  # imports on a busy machine included
    assert shared_files() <= before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"),
    [("SIGSTOP", "rank 1 is stopped (SIGSTOP, or a debugger) and did not answer"), ("hang", "another rank ended, or")],
)
def test_a_rank_that_hangs_is_ended_at_once_under_torchrun(folder: Path, kind: str, told: str) -> None:
    """torchrun itself would wait for half a minute after the timeout."""
    code, text, _ = torchrun_with_fault(argv(folder), Fault(kind))
    assert code != 0 and f"dp4tl: error: {told}" in text
    assert "Signal 9 (SIGKILL)" in text or "exitcode: -9" in text, text
    assert "forcefully" not in text, text  # what torchrun says when it has waited
    assert not [line for line in processes() if str(folder) in line]


def processes() -> list[str]:
    """The command lines of all processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.parametrize("kind", ["truncate", "replace"])
def test_a_beton_that_changes_under_the_run(folder: Path, kind: str) -> None:
    path = folder / "train.beton"
    make_beton(folder / "other.beton", num_classes=4, per_class=9)
    (folder / "other.beton").rename(folder / "train.beton.other")
    codes, text, _ = run_with_fault(argv(folder), Fault(kind, path=str(path)), folder)
    if kind == "truncate" and -signal.SIGBUS in codes:  # a thread was just about to read what is gone
        assert sorted(codes) == [-signal.SIGBUS, EXIT_FAILURE] and "another rank ended" in text
        return
    assert codes == [EXIT_FAILURE] * 2
    assert f"error: {path} was changed while it was read: put it back and run again" in text


def test_a_beton_that_is_copied_anew_goes_on(folder: Path) -> None:
    shutil.copy(folder / "train.beton", folder / "train.beton.other")
    codes, text, _ = run_with_fault(argv(folder), Fault("replace", path=str(folder / "train.beton")), folder)
    assert codes == [EXIT_DONE] * 2, text


SHORTENED = """
import mmap, os, sys, tempfile
if os.environ.get("RANK", "1") == "1":
    with tempfile.TemporaryFile() as handle:
        handle.truncate(1 << 16)
        memory = mmap.mmap(handle.fileno(), 1 << 16)
        handle.truncate(0)
        memory[0]
import time
time.sleep(60)
"""


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_launcher_tells_what_signal_ended_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nproc: int
) -> None:
    script = tmp_path / "shortened.py"
    script.write_text(SHORTENED)
    line = [sys.executable, str(script)]
    if nproc == 2:
        program = "import sys; from dp4tl_dist import ranks; ranks.python = lambda *_: sys.argv[1:]; ranks.run(2, [])"
        program += " and sys.exit(1)"
        line = [sys.executable, "-c", program, *line]
    monkeypatch.setattr(launcher, "command", lambda argv, nproc: line)
    with pytest.raises(RuntimeError, match=rf"rank {nproc - 1} was ended by SIGBUS \(was a file cut short"):
        StageProcess([], nproc=nproc, log=tmp_path / "stage.log", label="stage").run()


def test_ranks_do_not_outlive_who_started_them(folder: Path) -> None:
    make_config(folder, train={"epochs": 2000})
    line = [sys.executable, *launcher.command(argv(folder), 2)[1:]]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (folder / "run" / "order.jsonl").exists():
        assert process.poll() is None, (folder / "output.txt").read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while "stopped at step" not in (folder / "output.txt").read_text():
        assert time.monotonic() < deadline, (folder / "output.txt").read_text()
        time.sleep(0.05)
    assert checkpoint.newest(folder / "run") is not None


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_slow_save_does_not_end_the_other_ranks(folder: Path, engine: str) -> None:
    """Each checkpoint takes rank 0 longer than the ranks' timeout, within an epoch and at the end."""
    pytest.importorskip("torch" if engine == "ddp" else "deepspeed")
    make_config(folder, engine={"kind": engine, "timeout_s": 2}, checkpoint={"epoch_end_s": 0}, train={"epochs": 2})
    codes, text, _ = run_with_fault(argv(folder), Fault("slow disk", rank=0, path="3.5"), folder)
    assert codes == [EXIT_DONE] * 2, text
    assert len(checkpoint.checkpoints(folder / "run")) == 2


# ---------------------------------------------------------------- samples


def spoil(path: Path, position: int) -> int:
    """Damage the JPEG at a position; returns its identifier."""
    beton = open_beton(path)
    start, size = int(beton.pointers[position]), int(beton.sizes[position])
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return int(beton.identifiers[position])


def test_a_damaged_image_stops_the_run_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identifier = spoil(folder / "train.beton", 5)
    with one_core():
        assert main(argv(folder)) == EXIT_FAILURE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the sample at position 5 (identifier {identifier}) cannot be decoded" in line
    assert 'data.on_bad_sample = "skip"' in line


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_damaged_image_is_skipped_and_counted(folder: Path, num_ranks: int) -> None:
    identifiers = [spoil(folder / "train.beton", position) for position in (5, 11)]
    shutil.copy(folder / "train.beton", folder / "val.beton")
    shutil.copy(folder / "train.beton.json", folder / "val.beton.json")
    make_config(folder, data={"on_bad_sample": "skip", "val": str(folder / "val.beton")})
    codes, text, _ = run_with_fault(argv(folder), Fault("none"), folder, num_ranks=num_ranks)
    assert codes == [EXIT_DONE] * num_ranks, text
    for identifier in identifiers:
        assert f"(identifier {identifier}) cannot be decoded" in text
    epochs = [line for line in read_jsonl(folder / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["bad_samples"] for line in epochs] == [2, 2, 2]
    assert all(0 < line["loss"] < 10 and 0 <= line["val_top1"] <= 1 for line in epochs)


def test_a_skipped_sample_has_no_part_in_the_loss() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([1, IGNORED, 0, 4, IGNORED, 2])
    task = Supervised(torch.nn.Identity(), label_smoothing=0.1)
    loss = task(Batch(logits, labels, labels))["loss"]
    good = labels != IGNORED
    alone = task(Batch(logits[good], labels[good], labels[good]))["loss"]
    assert loss.item() == pytest.approx(alone.item() * 4 / 6)
    loss.backward()
    assert logits.grad is not None and not logits.grad[~good].any() and logits.grad[good].any(dim=1).all()
    nothing = task(Batch(logits, torch.full((6,), IGNORED), labels))["loss"]
    assert nothing.item() == 0


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder of 16 MiB that is a file system of its own."""
    disk = folder / "run"
    disk.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("only root can mount a small disk")
    try:
        yield disk
    finally:
        subprocess.call(["umount", "-R", str(disk)])


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Have the next runs of this process act after these steps."""
    log_order = watch.log_order

    def acting(fit: Any, batch: Any) -> None:
        log_order(fit, batch)
        actions.get(fit.at.step, lambda: None)()

    monkeypatch.setattr(watch, "log_order", acting)


def fill(disk: Path) -> None:
    with open(disk / ".filler", "ab", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(bytes(4096))


def read_only(disk: Path) -> None:
    for more in (["--bind", str(disk / "checkpoints"), str(disk / "checkpoints")],
                 ["-o", "remount,bind,ro", str(disk / "checkpoints")]):  # fmt: skip
        subprocess.check_call(["mount", *more])


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_full_disk_is_borne_and_nothing_is_missing(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, {6: lambda: fill(small_disk), 19: lambda: (small_disk / ".filler").unlink()})
    with one_core():
        assert main(argv(folder)) == EXIT_DONE
        text = capsys.readouterr().err
        assert "step_000000008 (" in text and "the last good checkpoint stays" in text
        monkeypatch.undo()
        assert main(argv(folder, "undisturbed")) == EXIT_DONE
    assert lines_of(small_disk) == lines_of(folder / "undisturbed")
    names = [(out / "order.jsonl").read_text() for out in (small_disk, folder / "undisturbed")]
    assert names[0] == names[1]
    assert not list((small_disk / "checkpoints").glob(".*"))


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_stays_bad_ends_the_run_with_the_last_checkpoint_whole(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    at_step(monkeypatch, {10: lambda: fill(small_disk) if how == "full" else read_only(small_disk)})
    with one_core():
        assert main(argv(folder)) == EXIT_BAD_INPUT
    text = capsys.readouterr().err
    assert "warning: could not save" in text and "step_000000016" in text
    assert text.splitlines()[-1].startswith("dp4tl: error: could not save") and "make room" in text
    assert ("No space left" if how == "full" else "Read-only file system") in text
    last = checkpoint.newest(small_disk)
    assert last is not None and last.name == "step_000000008"
    monkeypatch.undo()
    (small_disk / ".filler").unlink(missing_ok=True)
    if how == "read-only":
        subprocess.check_call(["umount", str(small_disk / "checkpoints")])
    with one_core():
        assert main(argv(folder)) == main(argv(folder, "undisturbed")) == EXIT_DONE
    assert lines_of(small_disk) == lines_of(folder / "undisturbed")
    found = [checkpoint.newest(out) for out in (small_disk, folder / "undisturbed")]
    weights = [(last / "weights.safetensors").read_bytes() for last in found if last]
    assert weights[0] == weights[1]


def test_lines_that_a_full_disk_refuses_are_not_cut(small_disk: Path) -> None:
    lines = JsonLines(small_disk / "x.jsonl", step=0)
    lines.add({"step": 1})
    fill(small_disk)
    for step in (2, 3):
        lines.add({"step": step, "text": "x" * 9000})
    assert (small_disk / "x.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(OSError, match="No space"):
        lines.flush()
    (small_disk / ".filler").unlink()
    lines.add({"step": 4})
    lines.close()
    assert [line["step"] for line in read_jsonl(small_disk / "x.jsonl")] == [1, 2, 3, 4]


# ---------------------------------------------------------------- saving in the background


def test_saving_in_the_background_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_config(folder, checkpoint={"every_minutes": 1e-9, "keep": 99})
    with one_core():
        assert main(argv(folder, "plain")) == EXIT_DONE
        monkeypatch.setattr(train_loop, "Saver", lambda background: Saver(background=True))
        assert main(argv(folder, "background")) == EXIT_DONE
    assert lines_of(folder / "plain") == lines_of(folder / "background")
    first, second = checkpoint.checkpoints(folder / "plain"), checkpoint.checkpoints(folder / "background")
    assert [path.name for path in first] == [path.name for path in second] and len(first) > 20
    for a, b in zip(first, second, strict=True):
        assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()


def test_the_background_is_given_a_copy_and_tells_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.zeros(3)
    content = {"a": [weights, 1, "x"], "b": {2: weights}}
    copied = snapshot(content)
    weights += 1
    assert copied["a"][0].tolist() == copied["b"][2].tolist() == [0, 0, 0] and copied["a"][1:] == [1, "x"]
    saver = Saver(background=True)

    def refuse(content: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    saver.save(tmp_path / "c", refuse, {})
    assert "No space left" in saver.wait()
    saver.save(tmp_path / "c", lambda content: None, {})
    assert saver.wait() == ""
    saver.close()
    assert capsys.readouterr().err.count("the last good checkpoint stays") == 1


def test_another_number_of_ranks_is_recorded(folder: Path) -> None:
    codes, _, _ = run_with_fault(argv(folder), Fault("exit", step=12), folder)
    assert codes == [EXIT_FAILURE, 7]
    before = checkpoint.read_meta(checkpoint.newest(folder / "run"))  # type: ignore[arg-type]
    with one_core():
        assert main(argv(folder)) == EXIT_DONE
    (line,) = [line for line in read_jsonl(folder / "run" / "metrics.jsonl") if line["kind"] == "resume"]
    assert line == {"kind": "resume", "step": 8, "restarts": 1, "num_ranks": 1}
    after = checkpoint.read_meta(checkpoint.newest(folder / "run"))  # type: ignore[arg-type]
    assert (before["num_ranks"], after["num_ranks"], after["restarts"]) == (2, 1, 1)
    assert after["seconds"] > before["seconds"] > 0
