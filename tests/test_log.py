"""metrics.jsonl holds each line once, over any number of restarts; progress is quiet where nobody watches."""

import json
from pathlib import Path

import pytest

from dp4tl_dist import log
from dp4tl_dist.log import Metrics, progress, read_jsonl, truncate_jsonl


def test_lines_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    with Metrics(tmp_path, step=0, tensorboard=False) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write("step", step=step, loss=1 / step)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "step", "st')  # cut off by a crash
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with Metrics(tmp_path, step=2, tensorboard=False) as metrics:
        metrics.write("step", step=3, loss=0.1)
        # Each line is there as soon as it is written.
        assert read_jsonl(tmp_path / "metrics.jsonl")[-1] == {"kind": "step", "step": 3, "loss": 0.1}
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.1)]


def test_numbers_survive_the_rewriting(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = [0.1, 1 / 3, 1e-300, 5, True, None, "é"]
    path.write_text("".join(json.dumps({"step": i, "x": value}) + "\n" for i, value in enumerate(values)))
    before = path.read_bytes()
    truncate_jsonl(path, 100)
    assert path.read_bytes() == before
    truncate_jsonl(path, 2)
    assert [line["x"] for line in read_jsonl(path)] == values[:3]
    truncate_jsonl(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists() and read_jsonl(tmp_path / "none.jsonl") == []


def test_tensorboard_is_a_second_sink(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, step=0, tensorboard=True) as metrics:
        metrics.write("step", step=1, loss=0.5, label="text", flag=True)
        metrics.write("step", step=2, loss=0.25)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["step/loss"]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(1, 0.5), (2, 0.25)]


def test_plain_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with progress("train") as advance:
        for done in range(1, 31):
            now[0] += 1
            advance(done, 30, loss=0.123456, epoch="1/3")
    assert capsys.readouterr().out.splitlines() == [
        "train 10/30 loss 0.1235 epoch 1/3",
        "train 20/30 loss 0.1235 epoch 1/3",
    ]


def test_progress_that_is_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(log, "on_terminal", lambda: True)
    with progress("train", shown=False) as advance:
        advance(1, 2, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "on_terminal", lambda: True)
    with pytest.raises(ZeroDivisionError), progress("train") as advance:
        advance(1, 2, loss=0.5)
        raise ZeroDivisionError
    assert "1/2" in capsys.readouterr().out


def test_warnings_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("a")
    log.warn("b")
    assert capsys.readouterr() == ("a\n", "warning: b\n")
