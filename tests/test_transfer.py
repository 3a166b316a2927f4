"""Transfer keeps the protocol: fresh head, bit-equal backbone, a choice on held-out training data, one test pass."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cores import one_core
from data_factory import make_beton
from ranks import run_ranks

from dp4tl_dist import transfer as module
from dp4tl_dist.cli import main
from dp4tl_dist.config import CheckpointConfig, validate
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import BetonLoader, CentreView, TrainView
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.models import build_model, normalise
from dp4tl_dist.recipes import TransferConfig, recipe
from dp4tl_dist.sides import TrainedAt
from dp4tl_dist.train import checkpoint, watch
from dp4tl_dist.train.evaluate import Split
from dp4tl_dist.train.loop import Fit
from dp4tl_dist.transfer import LinearProbe, Target, build_module, cache_features, make_job, open_target, transfer
from dp4tl_dist.world import World

SOURCE_CLASSES, CLASSES, PER_CLASS = 7, 4, 15
TRAIN = {"epochs": 4, "batch_size": 8}
SEEN = {"resolution": 16, "val_resolution": 16, "val_ratio": 224 / 256}
VIEW = CentreView(16, 224 / 256)
Content = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and an untrained source model: a backbone as good as any for a protocol."""
    root = tmp_path_factory.mktemp("transfer")
    for split in ("train", "test"):
        make_beton(root / f"{split}.beton", kind="target", split=split, num_classes=CLASSES, per_class=PER_CLASS)
    torch.manual_seed(5)
    meta = make_meta("checkpoint", config={"model": {"arch": "resnet_tiny"}, "train": SEEN})
    meta |= {"classes": [str(i) for i in range(SOURCE_CLASSES)], "complete": True}
    weights = build_model("resnet_tiny", SOURCE_CLASSES).state_dict()
    checkpoint.save(root / "source", weights=weights, state={}, meta=meta)
    return root


def config_of(mode: str, content: Content | None = None) -> TransferConfig:
    content = content or {}
    content = {"engine": {"device": "cpu"}, "num_workers": 1, **content, "train": {**TRAIN, **content.get("train", {})}}
    return validate(TransferConfig, recipe(mode, content), source="test")  # type: ignore[arg-type]


def transferred(world: World, root: Path, out: Path, mode: str, content: Content | None = None) -> Content:
    paths = {"checkpoint_path": root / "source", "train": root / "train.beton", "test": root / "test.beton"}
    return transfer(config_of(mode, content), **paths, out=out, world=world)


def alone(root: Path, out: Path, mode: str, content: Content | None = None) -> Content:
    with one_core():
        return transferred(World(), root, out, mode, content)


def command(root: Path, out: Path, *more: str, mode: str = "lp") -> int:
    line = ["transfer", "--checkpoint", root / "source", "--train", root / "train.beton", "--test", root / "test.beton",
            "--mode", mode, "--out", out, "--set", "engine.device=cpu"]  # fmt: skip
    sets = [part for key, value in TRAIN.items() for part in ("--set", f"train.{key}={value}")]
    with one_core():
        return main([str(part) for part in [*line, *sets, *more]])


def without_time(result: Content) -> Content:
    return {key: value for key, value in result.items() if key not in ("seconds", "command")}


# ---------------------------------------------------------------- the split


def test_the_split_is_disjoint_complete_and_class_by_class(root: Path) -> None:
    for share, held in ((0.1, 2), (0.2, 3), (0.5, 8), (0.001, 1)):
        target = open_target(root / "train.beton", root / "test.beton", val_share=share, seed=0)
        assert sorted([*target.fit, *target.val]) == list(range(CLASSES * PER_CLASS))
        assert np.bincount(target.train.labels[target.val]).tolist() == [held] * CLASSES
    splits = [open_target(root / "train.beton", root / "test.beton", val_share=0.2, seed=s).val for s in (0, 0, 1)]
    assert np.array_equal(splits[0], splits[1]) and not np.array_equal(splits[0], splits[2])


def test_a_lone_sample_of_a_class_is_trained_on(tmp_path: Path) -> None:
    for per_class in (1, 2):
        path = make_beton(tmp_path / f"{per_class}.beton", kind="target", num_classes=3, per_class=per_class)
        if per_class == 1:
            with pytest.raises(UserError, match="no class with two samples"):
                open_target(path, None, val_share=0.5, seed=0)
        else:
            target = open_target(path, None, val_share=0.1, seed=0)
            assert len(target.fit) == len(target.val) == 3


def test_train_and_test_with_other_classes(root: Path, tmp_path: Path) -> None:
    other = make_beton(tmp_path / "other.beton", kind="target", split="test", num_classes=3)
    with pytest.raises(UserError, match=r"other\.beton has other classes than"):
        open_target(root / "train.beton", other, val_share=0.1, seed=0)


# ---------------------------------------------------------------- heads and backbones


def job_of(root: Path, out: Path, mode: str, content: Content | None = None) -> tuple[Any, Any, Target, Split]:
    config = config_of(mode, content).suited(TrainedAt("resnet_tiny", **SEEN))
    target = open_target(root / "train.beton", root / "test.beton", val_share=config.val_share, seed=config.seed)
    torch.manual_seed(0)
    net, _ = build_module("resnet_tiny", root / "source", CLASSES, config)
    job, test = make_job(config, net, target, {}, out, World())
    return net, job, target, test


@pytest.mark.parametrize("cached", [False, True])
def test_a_probe_trains_its_head_alone(root: Path, tmp_path: Path, cached: bool) -> None:
    with one_core():
        probe, job, _, _ = job_of(root, tmp_path / "run", "lp", {"cached": cached})
        head = probe.head.weight.detach().clone()
        assert head.shape == (CLASSES, 128)
        Fit(job, World()).run()
    source = checkpoint.load_weights(root / "source")
    backbone = probe.backbone.state_dict()
    assert backbone.keys() == {name for name in source if not name.startswith("fc.")}
    assert all(torch.equal(value, source[name]) for name, value in backbone.items())
    assert not torch.equal(probe.head.weight, head)


def test_finetuning_starts_from_the_backbone_and_moves_all(root: Path, tmp_path: Path) -> None:
    with one_core():
        net, job, _, _ = job_of(root, tmp_path / "run", "ff")
        source = checkpoint.load_weights(root / "source")
        before = {name: value.clone() for name, value in net.state_dict().items()}
        assert all(torch.equal(value, source[name]) for name, value in before.items() if not name.startswith("fc."))
        assert before["fc.weight"].shape == (CLASSES, 128)
        Fit(job, World()).run()
    assert all(not torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_a_probe_that_moves_its_backbone_is_a_failure(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearProbe, "train", torch.nn.Module.train)  # batch norm drifts
    with pytest.raises(RuntimeError, match="changed its backbone"):
        alone(root, tmp_path / "r.json", "lp")
    assert not (tmp_path / "r.json").exists()


def test_another_architecture_is_refused(root: Path, tmp_path: Path) -> None:
    meta = json.loads((root / "source" / "meta.json").read_text())
    for arch, words in (("resnet18", "does not hold a resnet18"), ("resnet19", "unknown architecture")):
        folder = tmp_path / arch
        folder.mkdir()
        for name in ("weights.safetensors", "state.pt"):
            (folder / name).symlink_to(root / "source" / name)
        content = {**meta, "config": {"model": {"arch": arch}}}
        (folder / "meta.json").write_text(json.dumps({**content, "digest": checkpoint.digest_meta(content)}))
        with pytest.raises(UserError, match=words):
            build_module(arch, folder, CLASSES, config_of("lp"))


# ---------------------------------------------------------------- features


def features_on_rank(world: World, root: Path) -> np.ndarray:
    probe, _ = build_module("resnet_tiny", root / "source", CLASSES, config_of("lp"))
    beton = open_beton(root / "train.beton")
    assert isinstance(probe, LinearProbe)
    split = Split(BetonLoader(beton), np.arange(beton.num_samples))
    return cache_features(probe, split, beton, VIEW, world).features.numpy()


def test_cached_features_are_the_backbones(root: Path) -> None:
    model, _ = checkpoint.load_model(root / "source")
    model.fc = torch.nn.Identity()
    model.eval()
    beton = open_beton(root / "train.beton")
    with torch.no_grad(), one_core():
        rows = [
            model(normalise(batch.images))[0].numpy()
            for batch in BetonLoader(beton).epoch([np.array([i]) for i in range(beton.num_samples)], VIEW)
        ]
        features = features_on_rank(World(), root)
    np.testing.assert_allclose(features, np.stack(rows), atol=1e-5)
    for on_rank in run_ranks(features_on_rank, 2, root):
        np.testing.assert_allclose(on_rank, features, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_probe_finds_the_same_cached_or_not(root: Path, tmp_path: Path, seed: int) -> None:
    """Its features are those of one view, so that where they come from decides their last bits alone."""
    content = {"seed": seed, "train": {"epochs": 12}}
    pixels, cached = (alone(root, tmp_path / f"{c}.json", "lp", {**content, "cached": c}) for c in (False, True))
    assert [pixels[key] for key in ("top1", "val_top1")] == [cached[key] for key in ("top1", "val_top1")]
    assert pixels["loss"] == pytest.approx(cached["loss"], rel=1e-4)
    curves = [
        [line["loss"] for line in read_jsonl(tmp_path / f"{c}.json.run" / "metrics.jsonl") if line["kind"] == "epoch"]
        for c in (False, True)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_finetuning_crops_as_it_is_told(root: Path, tmp_path: Path) -> None:
    _, job, _, _ = job_of(root, tmp_path / "a", "ff")
    assert job.view(16, 3) == TrainView(16, 0, 3, min_scale=0.08, flip=True)
    _, job, _, _ = job_of(root, tmp_path / "b", "ff", {"min_scale": 0.5, "flip": False})
    assert job.view(16, 3) == TrainView(16, 0, 3, min_scale=0.5, flip=False)
    _, job, _, _ = job_of(root, tmp_path / "c", "lp")
    assert job.view(16, 3) == VIEW


def test_without_a_test_set_what_was_held_out_judges(root: Path, tmp_path: Path) -> None:
    with one_core():
        paths = {"checkpoint_path": root / "source", "train": root / "train.beton", "test": None}
        result = transfer(config_of("lp", {"cached": True}), **paths, out=tmp_path / "r.json", world=World())
    both = alone(root, tmp_path / "s.json", "lp", {"cached": True})
    assert result["val_top1"] == both["val_top1"] and result["num_test"] == 0
    assert both.keys() - result.keys() == {"top1", "top5", "loss"} and "test" not in result["inputs"]


def test_label_smoothing_reaches_the_cached_probe(root: Path, tmp_path: Path) -> None:
    for cached in (False, True):
        _, job, _, _ = job_of(root, tmp_path, "lp", {"cached": cached, "train": {"label_smoothing": 0.3}})
        assert job.task.label_smoothing == 0.3


# ---------------------------------------------------------------- the result

ARMS = [("lp", False), ("lp", True), ("ff", False)]


@pytest.mark.parametrize(("mode", "cached"), ARMS)
def test_the_test_set_is_read_once_and_the_epoch_chosen_without_it(
    root: Path, tmp_path: Path, mode: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[str, str, int]] = Counter()
    epoch = BetonLoader.epoch

    def counted(self: BetonLoader, batches: Any, view: Any) -> Any:
        read.update((self.beton.path.stem, type(view).__name__, i) for batch in batches for i in batch.tolist())
        return epoch(self, batches, view)

    monkeypatch.setattr(BetonLoader, "epoch", counted)
    result = alone(root, tmp_path / "r.json", mode, {"cached": cached})
    tests = {key: count for key, count in read.items() if key[0] == "test"}
    assert tests == {("test", "CentreView", i): 1 for i in range(CLASSES * PER_CLASS)}
    target = open_target(root / "train.beton", root / "test.beton", val_share=0.1, seed=0)
    trained = {i for name, view, i in read if name == "train" and view == "TrainView"}
    # A probe sees the centre of its images, and so do those that choose the epoch.
    assert trained == (set(target.fit.tolist()) if mode == "ff" else set())
    assert json.loads((tmp_path / "r.json").read_text()) == result
    lines = [line for line in read_jsonl(tmp_path / "r.json.run" / "metrics.jsonl") if line["kind"] == "epoch"]
    scores = [line["val_top1"] for line in lines]
    chosen = max(range(4), key=lambda i: (lines[i]["val_top1"], -lines[i]["val_loss"]))
    assert len(scores) == 4 and result["val_top1"] == max(scores) and result["epoch"] == 1 + chosen
    assert (result["num_train"], result["num_val"], result["num_test"]) == (52, 8, 60)
    assert (result["mode"], result["cached"], result["kind"]) == (mode, cached, "transfer")
    assert result["inputs"]["test"] == target.test.fingerprint
    assert not (tmp_path / "r.json.run" / "checkpoints").exists()


def test_a_cached_probe_learns(root: Path, tmp_path: Path) -> None:
    alone(root, tmp_path / "r.json", "lp", {"cached": True, "train": {"epochs": 40}})
    lines = [line for line in read_jsonl(tmp_path / "r.json.run" / "metrics.jsonl") if line["kind"] == "epoch"]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


@pytest.mark.parametrize(("mode", "cached"), ARMS[:2])
def test_two_ranks_find_the_same(root: Path, tmp_path: Path, mode: str, cached: bool) -> None:
    one = alone(root, tmp_path / "one.json", mode, {"cached": cached})
    both = run_ranks(transferred, 2, root, tmp_path / "two.json", mode, {"cached": cached})
    assert without_time(both[0]) == without_time(both[1])
    assert without_time(json.loads((tmp_path / "two.json").read_text())) == without_time(both[0])
    for key in ("top1", "top5", "val_top1"):
        assert both[0][key] == pytest.approx(one[key], abs=0.034)  # two test images
    assert both[0]["loss"] == pytest.approx(one["loss"], rel=1e-2)


@pytest.fixture(scope="module")
def tiny(root: Path) -> Path:
    """20 images of 4 classes are a target: 16 of them train, 4 choose the epoch."""
    folder = root / "tiny"
    folder.mkdir()
    for split in ("train", "test"):
        make_beton(folder / f"{split}.beton", kind="target", split=split, num_classes=CLASSES, per_class=5)
    (folder / "source").symlink_to(root / "source")
    return folder


def weights_after(world: World, root: Path, out: Path, mode: str, content: Content) -> tuple[dict[str, Any], list[int]]:
    """The weights of a short transfer on these ranks, and the samples that its steps took, all ranks together."""
    config = config_of(mode, content).suited(TrainedAt("resnet_tiny", 16, 16, 224 / 256))
    target = open_target(root / "train.beton", root / "test.beton", val_share=0.1, seed=0)
    torch.manual_seed(0)
    built, _ = build_module("resnet_tiny", root / "source", CLASSES, config)
    job, _ = make_job(config, built, target, {}, out, world)
    Fit(job, world).run()
    seen = [item for line in read_jsonl(out / "order.jsonl") for item in line["identifiers"]] if world.is_main else []
    return {name: value.numpy() for name, value in job.task.weights().items()}, seen


@pytest.mark.parametrize(("batch", "steps", "accumulate"), [(128, 1, 1), (9999, 1, 2), (7, 3, 1), (16, 1, 1)])
def test_no_sample_of_a_small_target_is_left_out(
    tiny: Path, tmp_path: Path, batch: int, steps: int, accumulate: int
) -> None:
    train = {"batch_size": batch, "accumulate": accumulate, "optimizer": "sgd", "lr": 0.1, "epochs": 2}
    content = {"train": train, "log": {"order": True, "tensorboard": False}}
    with one_core():
        alone, seen = weights_after(World(), tiny, tmp_path / "1", "lp", content)
    lines = list(read_jsonl(tmp_path / "1" / "order.jsonl"))
    assert len(lines) == 2 * steps and sorted(Counter(seen).values()) == [2] * 16
    for ranks in (2, 3):  # 16 samples, and 5 or 6 of them, are not divided evenly among 3
        for weights, _ in run_ranks(weights_after, ranks, tiny, tmp_path / str(ranks), "lp", content):
            for name, value in weights.items():
                assert np.allclose(value, alone[name], rtol=1e-4, atol=1e-6), (ranks, name)


def test_twenty_images_and_the_published_recipe(tiny: Path, tmp_path: Path) -> None:
    """With the recipe's batch of 128, on each mode; and too few samples for the ranks are told."""
    for mode in ("lp", "ff"):
        result = alone(tiny, tmp_path / f"{mode}.json", mode, {"train": {"batch_size": 128, "epochs": 2}})
        assert (result["num_train"], result["num_val"], result["num_test"]) == (16, 4, 20)
    with pytest.raises(UserError, match=r"batch_size 1: .* as few as 1, fewer than 1 ranks x 2 micro-batches"):
        alone(tiny, tmp_path / "bad.json", "lp", {"train": {"batch_size": 1, "accumulate": 2}})


def test_checkpoints_inside_epochs_change_no_choice(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = alone(root, tmp_path / "plain.json", "ff", {"train": {"lr": 1e-3}})
    busy = lambda **given: CheckpointConfig(**given, every_minutes=1e-9)  # noqa: E731
    monkeypatch.setattr(module, "CheckpointConfig", busy)
    often = alone(root, tmp_path / "often.json", "ff", {"train": {"lr": 1e-3}})
    assert without_time(often) == without_time(plain)


# ---------------------------------------------------------------- through the command line


def test_existing_results_and_force(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert command(root, out, "--cached") == EXIT_DONE
    before = out.read_bytes()
    assert command(root, out, "--cached") == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and "--force" in line and out.read_bytes() == before
    assert command(root, out, "--cached", "--force", "--set", "seed=1") == EXIT_DONE
    assert json.loads(out.read_text())["seed"] == 1


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR2 arrives after that step."""
    log_order = watch.log_order

    def signalled(fit: Fit, batch: Any) -> None:
        log_order(fit, batch)
        if fit.at.step == step:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(watch, "log_order", signalled)


@pytest.mark.parametrize(("mode", "more"), [("lp", ["--cached"]), ("ff", [])])
@pytest.mark.parametrize("step", [6, 8])  # inside the second epoch, and within a step of its end
def test_stopped_and_run_again(root: Path, tmp_path: Path, mode: str, more: list[str], step: int) -> None:
    assert command(root, tmp_path / "whole.json", *more, mode=mode) == EXIT_DONE
    with pytest.MonkeyPatch.context() as patched:
        stop_at(step, patched)
        assert command(root, tmp_path / "cut.json", *more, mode=mode) == EXIT_STOPPED
    assert not (tmp_path / "cut.json").exists()
    assert command(root, tmp_path / "cut.json", *more, mode=mode) == EXIT_DONE
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert without_time(cut) == without_time(whole)


def test_force_forgets_a_run_that_was_cut_off(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(6, patched)
        assert command(root, out, "--cached") == EXIT_STOPPED
    assert command(root, out, "--cached", "--set", "train.lr=0.5") == EXIT_BAD_INPUT
    assert "train.lr = 0.01, and now it is 0.5" in capsys.readouterr().err
    assert command(root, out, "--cached", "--set", "train.lr=0.5", "--force") == EXIT_DONE
