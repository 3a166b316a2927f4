"""`advise` against `prune` and slow arithmetic: what it says of a size is what that size turns out to be."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton
from ranks import run_ranks

from dp4tl_dist import advise as advising
from dp4tl_dist.cli import main
from dp4tl_dist.config import OptimConfig, TrainConfig
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import EXIT_BAD_INPUT
from dp4tl_dist.files import make_meta, write_json
from dp4tl_dist.prune.votes_file import Votes, save_votes
from dp4tl_dist.schedule import resolution
from dp4tl_dist.train.benchmark import measure
from dp4tl_dist.train.cost import Speed, train_seconds
from dp4tl_dist.world import World

COUNTS = [0, 30, 2, 0, 5, 61, 0, 2, 0, 0]
RECIPE = {
    "model": {"arch": "resnet_tiny"},
    "train": {"epochs": 4, "batch_size": 8, "peak_epoch": 1, "resolution": 32, "val_resolution": 32},
    "engine": {"device": "cpu"},
    "log": {"tensorboard": False},
}


def cast(path: Path, beton: Beton, counts: list[int], **config: Any) -> Path:
    votes = np.array([counts], np.int64)
    predictions = np.repeat(np.arange(len(counts)), counts)
    meta = make_meta("votes", config=config, inputs={"source": beton.fingerprint})
    sizes = np.array([len(predictions)])
    save_votes(path, Votes(votes, np.zeros(votes.shape), predictions, sizes, "lm", beton.classes, meta))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advise")
    beton = open_beton(make_beton(root / "source.beton", num_classes=10, per_class=8))
    seen = {"resolution": 32, "val_resolution": 64, "val_ratio": 0.875}
    config = {"model": {"arch": "resnet_tiny"}, "train": seen}
    surrogate = {"seconds": 20.0, "samples_seen": 4000, "config": config, "complete": True}
    write_json(root / "surrogate" / "checkpoints" / "step_000000007" / "meta.json", surrogate)
    cast(root / "votes.npz", beton, COUNTS, surrogate=str(root / "surrogate"))
    write_json(root / "recipe.json", RECIPE)
    return root


def told(root: Path, capsys: pytest.CaptureFixture[str], *more: object) -> dict[str, Any]:
    argv = ["advise", "--votes", root / "votes.npz", "--source", root / "source.beton", "--json", "--config",
            root / "recipe.json", *more]  # fmt: skip
    assert main([str(item) for item in argv]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_size_is_what_prune_makes_of_it(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(root, capsys)
    beton = open_beton(root / "source.beton")
    assert found["num_voters"] == 100 and found["zero_votes"]["classes"] == [0, 3, 6, 8, 9]
    assert found["zero_votes"]["samples"] == 40 and found["costs"] is None
    for size in found["sizes"]:
        out = tmp_path / f"{size['classes']}.npz"
        line = ["prune", "--source", beton.path, "--votes", root / "votes.npz", "--keep-classes", size["classes"]]
        assert main([str(item) for item in [*line, "--out", out]]) == 0
        subset = load_subset(out, beton=beton)
        assert size["samples"] == len(subset.indices) and size["keep"] == size["classes"] / 10
        assert size["bytes"] == sum(len(beton.payload(i)) for i in subset.indices)
        assert size["coverage"] == sum(COUNTS[i] for i in subset.groups) / 100
        ranked = found["curve"]["ranking"][: size["classes"]]
        assert sorted(ranked) == subset.groups.tolist()
        assert found["curve"]["samples"][size["classes"] - 1] == size["samples"]
    auto = tmp_path / "auto.npz"
    line = [
        "prune",
        "--source",
        str(beton.path),
        "--votes",
        str(root / "votes.npz"),
        "--keep",
        "auto",
        "--out",
        str(auto),
    ]
    assert main(line) == 0
    assert len(load_subset(auto, beton=beton).groups) == found["suggestion"]["classes"] == 3  # 96 of 100 votes
    assert found["knee"] == 2 and found["suggestion"]["rule"] == "coverage"
    notes = {size["classes"]: size["notes"] for size in found["sizes"]}
    assert notes[2] == ["knee"] and notes[3] == ["95 % of the votes", "suggested"] and "with votes" in notes[5][0]


def test_times_count_the_selection(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(root, capsys, "--throughput", 4, "--val", root / "source.beton")
    # Four epochs of whole batches at 4 images a second; validation is forward only, and pruned alike.
    seconds = {size["classes"]: size["hours"] * 3600 for size in found["sizes"]}
    selection = 20 + 100 * 4 / 3 / 200 + 1  # surrogate; votes at twice the side; prune
    assert seconds[10] == pytest.approx(4 * (80 / 4 + 80 / 12))
    assert seconds[3] == pytest.approx(4 * (24 / 4 + 24 / 12) + selection)
    assert seconds[5] == pytest.approx(4 * (40 / 4 + 40 / 12) + selection)
    for size in found["sizes"]:
        assert size["speed_up"] == pytest.approx(seconds[10] / seconds[size["classes"]])
    assert "does not pay" not in found["suggestion"]["reason"]
    assert found["costs"]["surrogate_s"] == 20 and found["costs"]["pretrain_s"] == pytest.approx(32)
    fast = told(root, capsys, "--throughput", 400)
    assert "does not pay" in fast["suggestion"]["reason"]
    unknown = told(root, capsys, "--throughput", 4, "--set", "train.batch_size=64")
    assert [size["hours"] is None for size in unknown["sizes"]] == [size["classes"] < 8 for size in unknown["sizes"]]


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize(("steps", "val_every"), [(0, 1), (0, 3), (37, 2)])
def test_seconds_of_a_training(ramp: bool, steps: int, val_every: int) -> None:
    """Against a run step by step."""
    optim = OptimConfig(epochs=5, steps=steps, batch_size=10, peak_epoch=1, val_every=val_every, resolution=64,
                        start_resolution=32 * ramp, ramp_start=1, ramp_end=4, resolution_step=8)  # fmt: skip
    speed = Speed(images_per_s=50, val_images_per_s=80, epoch_s=0.5, save_s=0.25, startup_s=7)
    total = steps or 5 * (64 // 10)
    clock, epoch = 7.0, 0
    for step in range(total):
        if step % 6 == 0:
            clock, side = clock + 0.5, resolution(optim, step * 5 / total)
        clock += 10 / 50 * (side / 64) ** 2
        if (step + 1) % 6 == 0 or step + 1 == total:
            epoch += 1
            clock += 0.25 + (16 / 80 if epoch % val_every == 0 or step + 1 == total else 0)
    assert train_seconds(optim, 64, speed, num_val=16) == pytest.approx(clock)
    assert train_seconds(optim, 9, speed) == math.inf


def speed_on_rank(world: World, source: Path) -> Speed:
    config = TrainConfig.model_validate({**RECIPE, "data": {"train": str(source), "val": str(source)}})
    return measure(config, world, seconds=0.2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_speed_of_this_machine(root: Path, num_ranks: int) -> None:
    before = sorted(root.rglob("*"))
    speeds = run_ranks(speed_on_rank, num_ranks, root / "source.beton")
    assert len(set(speeds)) == 1, "the slowest rank counts, on all ranks"
    (speed,) = set(speeds)
    assert all(0 < value < math.inf for value in (speed.images_per_s, speed.val_images_per_s, speed.epoch_s))
    assert speed.save_s > 0 and speed.startup_s > 0.05
    assert sorted(root.rglob("*")) == before


def test_a_benchmark_is_what_the_times_rest_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(root, capsys, "--benchmark")
    speed = Speed(**found["costs"]["speed"])
    optim = TrainConfig.model_validate(RECIPE).train
    assert found["costs"]["pretrain_dense_s"] == pytest.approx(train_seconds(optim, 80, speed))
    assert speed.images_per_s != 4


def test_what_a_reader_sees(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["advise", "--votes", str(root / "votes.npz"), "--source", str(root / "source.beton"), "--throughput", "500"]
    assert main(line) == 0  # the recipe is that of the published source model
    text = capsys.readouterr().out
    assert "5 of 10 classes; the other 5 (40 samples) got no vote" in text
    assert "suggested: keep 0.3 (3 classes)" in text and "speed-up" in text


def test_a_runs_config_is_a_recipe(tmp_path: Path) -> None:
    recipe = advising.read_recipe("demo", ["pretrain.train.epochs=7"])
    assert (recipe.model.arch, recipe.train.epochs, recipe.data.min_scale) == ("resnet_tiny", 7, 0.5)
    assert recipe.log.every == 10


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--throughput", "0"], "--throughput 0"), (["--throughput", "nan"], "--throughput nan"),
        (["--throughput", "9", "--surrogate", "nowhere"], "--surrogate nowhere"),
        (["--throughput", "9", "--benchmark"], "not allowed with"),
        (["--weights", "1,2"], "--weights"), (["--config", "nothing"], "no preset"),
    ],
)  # fmt: skip
def test_refused(root: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    line = ["advise", "--votes", str(root / "votes.npz"), "--source", str(root / "source.beton"), *more]
    assert main(line) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
