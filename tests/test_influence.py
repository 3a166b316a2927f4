"""`influence`: a store that several workers fill, one of them killed; what it declares, refuses and concludes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton

from dp4tl_dist import influence as brute
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.errors import EXIT_BAD_INPUT
from dp4tl_dist.files import folder_lock, write_json
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.prune.influence import draw_mask, load_influence
from dp4tl_dist.world import World

MASKS = 12
ONE = World()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("influence")
    make_beton(root / "source.beton", num_classes=4, per_class=8)
    make_beton(root / "target.beton", kind="target", num_classes=2, per_class=8)
    sides = {"batch_size": 8, "peak_epoch": 0.5, "resolution": 16, "val_resolution": 16}
    write_json(root / "config.json", {
        "source": str(root / "source.beton"), "target": str(root / "target.beton"), "masks": MASKS,
        "model": {"arch": "resnet_tiny"}, "train": {"epochs": 1, **sides},
        "lp": {"epochs": 2, **sides, "batch_size": 4}, "engine": {"device": "cpu"},
    })  # fmt: skip
    return root


def line(root: Path, out: Path, *more: object) -> list[str]:
    return [str(item) for item in ("influence", "--config", root / "config.json", "--out", out, *more)]


def config_of(root: Path) -> InfluenceConfig:
    return InfluenceConfig.model_validate_json((root / "config.json").read_text())


def fake(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.0) -> list[int]:
    """Models that are "trained" at once: the accuracy is that class 2 is in, and a little by number. The rows' masks
    that were asked for come back."""
    asked: list[int] = []

    def measure(config: Any, source: Any, mask: Any, work: Path, world: Any) -> float:
        asked.append(int(work.name))
        (work / "half made").touch()
        time.sleep(seconds)
        return 0.3 * float(mask[2]) + 0.001 * int(work.name)

    monkeypatch.setattr(brute, "measure", measure)
    return asked


def test_a_killed_worker_loses_nothing(root: Path, tmp_path: Path) -> None:
    """Real models: what a killed worker left and another one finished is what one alone finds, to the bit."""
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    assert main(line(root, whole)) == 0
    rows = tmp_path / "cut.npz.run" / "rows"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "dp4tl_dist", *line(root, cut, "--worker", "1/3")]
    worker = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while not (rows.exists() and any(rows.glob("*.json"))) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    done = sorted(path.name for path in rows.glob("*.json"))
    assert done[0] == f"{MASKS // 3:06d}.json" and not cut.exists()
    before = {path: path.stat().st_mtime_ns for path in rows.glob("*.json")}
    assert main(line(root, cut)) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "what was done is not done again"
    source = open_beton(root / "source.beton")
    first, second = load_influence(whole, beton=source), load_influence(cut, beton=source)
    for name in ("influence", "stderr", "masks", "accuracy"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert all(np.array_equal(mask, draw_mask(4, row, seed=0)) for row, mask in enumerate(first.masks))
    assert ((first.accuracy >= 0) & (first.accuracy <= 1)).all()
    left = [path for path in (tmp_path / "cut.npz.run" / "work").rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {".lock"}, "models are not kept"


def test_workers_share_the_rows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, out, config = fake(monkeypatch, seconds=0.02), tmp_path / "i.npz", config_of(root)
    wrote: list[bool] = []

    def work(index: int) -> None:
        wrote.append(brute.influence(config, out=out, worker=(index, 4), world=ONE))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == list(range(MASKS)), "each row once"
    assert any(wrote) and len(wrote) == 4
    found = load_influence(out, beton=open_beton(root / "source.beton"))
    assert int(np.argmax(found.influence)) == 2 and found.accuracy[5] % 0.1 == pytest.approx(0.005)


def test_a_row_in_work_elsewhere_is_left_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, out, config = fake(monkeypatch), tmp_path / "i.npz", config_of(root)
    with folder_lock(tmp_path / "i.npz.run" / "work" / "000007"):
        assert not brute.influence(config, out=out, worker=(0, 1), world=ONE)
    assert sorted(asked) == [row for row in range(MASKS) if row != 7] and not out.exists()
    assert brute.influence(config, out=out, worker=(0, 1), world=ONE)
    assert asked[-1] == 7 and out.exists()


def test_more_masks_later(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, out = fake(monkeypatch), tmp_path / "i.npz"
    assert main(line(root, out)) == 0
    assert main(line(root, out, "--masks", MASKS + 3)) == EXIT_BAD_INPUT  # the file is there
    out.unlink()
    assert main(line(root, out, "--masks", MASKS + 3)) == 0
    assert asked == list(range(MASKS + 3))
    assert main(line(root, out, "--force")) == 0
    assert len(asked) == 2 * MASKS + 3 and not (tmp_path / ".i.npz.run.replaced").exists()


def test_the_models_that_force_replaces_stay_until_the_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out, store = fake(monkeypatch), tmp_path / "i.npz", tmp_path / "i.npz.run"
    assert main(line(root, out)) == 0
    rows, replaced = len(list((store / "rows").iterdir())), tmp_path / ".i.npz.run.replaced"
    first = out.read_bytes()
    for _ in range(2):  # the second finds an unfinished one, which is not what is to be kept
        with folder_lock(store / "work" / "000001"), monkeypatch.context() as patch:
            patch.setattr(brute, "conclude", lambda *_: False)
            brute.influence(config_of(root), out=out, worker=(0, 1), world=ONE, force=True)
        assert len(list((replaced / "rows").iterdir())) == rows and out.read_bytes() == first
    assert brute.influence(config_of(root), out=out, worker=(0, 1), world=ONE)
    assert not replaced.exists() and len(asked) > 2 * MASKS


def test_another_study_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    out = tmp_path / "i.npz"
    assert main(line(root, out)) == 0
    out.unlink()
    for override, says in (("train.lr=0.1", "config"), (f"target={root / 'source.beton'}", "inputs")):
        assert main(line(root, out, "--set", override)) == EXIT_BAD_INPUT
        assert f"another {says}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--worker", "3/3"], "--worker 3/3"), (["--worker", "x"], "--worker x"), (["--masks", "3"], "masks"),
        (["--masks", "4", "--set", "seed=9"], "use more --masks"), (["--set", "sources=1"], "unknown key"),
    ],
)  # fmt: skip
def test_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    assert main(line(root, tmp_path / "i.npz", *more)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_held_against_votes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_advise import cast

    fake(monkeypatch)
    assert main(line(root, tmp_path / "i.npz")) == 0
    source = open_beton(root / "source.beton")
    found = load_influence(tmp_path / "i.npz", beton=source)
    order = np.argsort(-found.influence)
    for ranking, spearman in ((order, 1.0), (order[::-1], -1.0)):
        counts = np.zeros(4, np.int64)
        counts[ranking] = [4, 3, 2, 1]
        votes = cast(tmp_path / "votes.npz", source, counts.tolist())
        capsys.readouterr()
        argv = ["advise", "--votes", votes, "--source", source.path, "--influence", tmp_path / "i.npz", "--json"]
        assert main([str(item) for item in argv]) == 0
        told = json.loads(capsys.readouterr().out)["agreement"]
        assert told["spearman"] == pytest.approx(spearman)
        assert told["top"][0]["overlap"] == (spearman == 1.0)
