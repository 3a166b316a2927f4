"""Fixed steps: a subset trains as many steps as the whole source would, and a stop anywhere changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.subset import Subset, save_subset
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_STOPPED
from dp4tl_dist.files import make_meta
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train.signals import Agreement

CONFIG: dict[str, Any] = {
    "model": {"arch": "resnet_tiny"},
    "train": {"epochs": 4, "batch_size": 8, "lr": 0.05, "peak_epoch": 1, "start_resolution": 8, "resolution": 16,
              "ramp_start": 1, "ramp_end": 3, "resolution_step": 8, "val_resolution": 16},
    "engine": {"device": "cpu"},
    "log": {"every": 1, "tensorboard": False, "order": True},
    "checkpoint": {"every_minutes": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples (6 steps an epoch, 24 steps in all) and a subset of 20 of them (2 full batches)."""
    root = tmp_path_factory.mktemp("steps")
    source = open_beton(make_beton(root / "source.beton", per_class=12))
    meta = make_meta("subset", inputs={"source": source.fingerprint})
    save_subset(root / "subset.npz", Subset(np.arange(20), np.zeros(0, np.int64), 28 / 48, "random-samples", meta))
    (root / "config.json").write_text(json.dumps({**CONFIG, "data": {"train": str(source.path), "num_workers": 1}}))
    return root


def run(root: Path, out: Path, *more: str) -> int:
    given = [part for item in more for part in ("--set", item)]
    return main(["train", "--config", str(root / "config.json"), "--subset", str(root / "subset.npz"),
                 "--out", str(out), *given])  # fmt: skip


def test_as_many_steps_as_the_whole_source_and_exact_after_stops(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    like = f"data.steps_of={root / 'source.beton'}"
    assert run(root, whole, like) == 0
    lines = [line for line in read_jsonl(whole / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in lines] == list(range(1, 25))
    # Two steps a pass: 12 passes. The ramp runs from a quarter of the steps to three quarters, as in 4 epochs.
    assert [line["epoch"] for line in lines] == [step // 2 for step in range(24)]
    assert lines[5]["resolution"] == 8 and {line["resolution"] for line in lines[18:]} == {16}
    assert [lines[step]["lr"] for step in (6, 15)] == pytest.approx([0.05, 0.05 * (1 - 9 / 18)])
    seen = [item["identifiers"] for item in read_jsonl(whole / "order.jsonl")]
    assert all(len(set(seen[i] + seen[i + 1])) == 16 for i in range(0, 24, 2)), "no sample twice in a pass"

    def stop_at(step: int) -> None:
        after_step, count = Agreement.after_step, {"left": step}

        def stopping(self: Agreement) -> tuple[bool, bool]:
            count["left"] -= 1
            stop, save = after_step(self)
            return stop or count["left"] == 0, save

        with monkeypatch.context() as patch:
            patch.setattr(Agreement, "after_step", stopping)
            assert run(root, cut, like) == EXIT_STOPPED

    stop_at(7)  # inside a pass
    stop_at(9)  # at the end of one
    assert run(root, cut, like) == 0
    newest = [checkpoint.newest(out) for out in (whole, cut)]
    first, second = [(folder / "weights.safetensors").read_bytes() for folder in newest if folder]
    assert first == second
    assert (whole / "order.jsonl").read_bytes() == (cut / "order.jsonl").read_bytes()
    meta = checkpoint.read_meta(newest[1]) if newest[1] else {}
    assert meta["complete"] and meta["restarts"] == 2 and meta["samples_seen"] == 24 * 8
    assert "steps_of" in meta["inputs"]


def test_steps_that_end_inside_a_pass(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "run", "train.steps=5") == 0
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [2, 4, 5]
    folder = checkpoint.newest(tmp_path / "run")
    assert folder is not None and checkpoint.read_meta(folder)["complete"]
    assert run(root, tmp_path / "run", "train.steps=5") == 0  # complete: nothing is trained again
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == lines


def test_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = f"data.steps_of={root / 'source.beton'}"
    assert run(root, tmp_path / "run", like, "train.steps=3") == EXIT_BAD_INPUT
    assert "give one of them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
