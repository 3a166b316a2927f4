"""One truth for each side: what a network is trained at decides where it is validated, votes and is transferred at."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_factory import make_beton

from dp4tl_dist.cli import main
from dp4tl_dist.config import PRESETS, OptimConfig, TrainConfig, find_config, load_config, read_toml, validate
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.models import ARCHITECTURES, check_arch
from dp4tl_dist.prune.votes_file import load_votes
from dp4tl_dist.recipes import Mode, TransferConfig, recipe
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.schedule import Plan
from dp4tl_dist.sides import TrainedAt, misfit, start_side, trained_at, transfer_side, val_side
from dp4tl_dist.train import checkpoint

SIDES = [8, 16, 24, 32, 48, 64, 96, 112, 128, 160, 176, 192, 208, 224, 256, 288, 384, 512]
RUN = {"source": {"train": "a"}, "targets": {"t": {"train": "b", "test": "c"}}}
PUBLISHED = sorted(path.stem for path in PRESETS.glob("*.toml") if not path.stem.startswith("demo"))
Content = dict[str, Any]


def transfer_config(mode: Mode, train: Content, network: TrainedAt) -> TransferConfig:
    return validate(TransferConfig, recipe(mode, {"train": train}), source="x").suited(network)


# ---------------------------------------------------------------- the rule


def test_the_published_sides() -> None:
    assert (start_side(192, 32), val_side(192), transfer_side(192)) == (160, 256, 224)
    assert (val_side(32), transfer_side(32), start_side(32, 32)) == (32, 32, 0)
    assert (val_side(224), transfer_side(224), val_side(224, "vit_b_16")) == (256, 224, 224)


@pytest.mark.parametrize("side", SIDES)
def test_what_follows_always_fits(side: int) -> None:
    for arch in (*ARCHITECTURES, "timm:vit_tiny_patch16_224"):
        for found in (val_side(side, arch), transfer_side(side, arch)):
            assert found >= side and not misfit("x", found, side)
            assert found % 32 == 0 or found == side
    assert 0 <= start_side(side, 32) < side
    for far in (side // 2, 2 * side):
        assert misfit("--resolution", far, side).startswith(f"--resolution {far} px does not fit")


@pytest.mark.parametrize("preset", ["", *PUBLISHED])
def test_resolution_and_epochs_alone_make_a_config(preset: str) -> None:
    """In a training config, on every preset: what is not said follows, and fits."""
    base = read_toml(find_config(preset)) if preset else {}
    own = base.get("train", {}).keys() & {"peak_epoch", "val_resolution"}  # what a preset sets for itself
    for side in [224] if preset == "vit-b16" else SIDES:
        for epochs in (1, 2, 3, 5, 16, 90):
            given = {"epochs": epochs, "resolution": side}
            train = {**{key: value for key, value in base.get("train", {}).items() if key not in own}, **given}
            config = validate(TrainConfig, {**base, "train": train}, source="x")
            optim, plan = config.train, Plan(100 * config.train.batch_size, config.train)
            check_arch(config.model.arch, (optim.resolution, optim.val_resolution))
            assert not misfit("x", optim.val_resolution, side)
            assert plan.side(epochs - 1) == optim.resolution == side
            assert optim.peak_epoch <= epochs


def test_published_length_is_as_it_was() -> None:
    optim = OptimConfig(ramp=True)
    assert (optim.epochs, optim.peak_epoch, optim.ramp_start, optim.ramp_end) == (16, 2, 11, 13)
    assert (optim.start_resolution, optim.resolution, optim.val_resolution) == (160, 192, 256)
    assert OptimConfig(start_resolution=128).ramp_end == 13  # who sets a start wants a ramp
    told = OptimConfig(peak_epoch=0, val_resolution=40)
    assert (told.peak_epoch, told.val_resolution) == (0, 40)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"start_resolution": 160, "resolution": 32}, "start_resolution 160 is above resolution 32"),
        ({"start_resolution": 16, "ramp_start": 1, "ramp_end": 20}, "ramp_end 20.0 is past the last epoch 16"),
        ({"epochs": 1, "peak_epoch": 2}, "peak_epoch 2.0 is past the last epoch 1"),
        ({"resolution": "big"}, "train.resolution: Input should be a valid integer"),
    ],
)
def test_what_cannot_be(train: Content, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        validate(TrainConfig, {"train": train}, source="x")
    assert "more)" not in str(caught.value)  # what would have followed is no fault of its own


def test_networks_of_one_size_decide() -> None:
    for table in (
        validate(TrainConfig, {"model": {"arch": "vit_b_16"}}, source="x"),
        validate(RunConfig, {**RUN, "pretrain": {"model": {"arch": "vit_b_16"}}}, source="x").pretrain,
        validate(InfluenceConfig, {"source": "a", "target": "b", "model": {"arch": "vit_b_16"}}, source="x"),
    ):
        assert (table.train.resolution, table.train.val_resolution) == (224, 224)
    timm = validate(TrainConfig, {"model": {"arch": "timm:x"}, "train": {"resolution": 96}}, source="x").train
    assert (timm.resolution, timm.val_resolution) == (96, 96)


# ---------------------------------------------------------------- a transfer


@pytest.mark.parametrize("mode", ["lp", "ff"])
@pytest.mark.parametrize("side", SIDES)
def test_a_transfer_follows_the_checkpoint_unless_told(mode: Mode, side: int) -> None:
    network = TrainedAt("resnet18", side, val_side(side), 0.75)
    free = transfer_config(mode, {}, network)
    assert free.train.resolution == free.train.val_resolution == transfer_side(side) and free.train.val_ratio == 0.75
    assert not free.misfits(network)
    for given in ({"resolution": side * 4}, {"resolution": side * 4, "val_resolution": side * 4, "val_ratio": 1.0}):
        told = transfer_config(mode, given, network)
        assert (told.train.resolution, told.train.val_resolution) == (side * 4, side * 4)
        assert len(told.misfits(network)) == 1
    only = transfer_config(mode, {"val_resolution": side * 4}, network)
    assert only.train.val_resolution == side * 4
    assert only.train.resolution == (side * 4 if mode == "lp" else transfer_side(side))
    assert len(only.misfits(network)) == 1
    assert validate(TransferConfig, free.model_dump(), source="x") == free


def test_a_ramp_of_finetuning_follows_too() -> None:
    train = transfer_config("ff", {"ramp": True}, TrainedAt("resnet18", 192, 256, 0.875)).train
    assert (train.start_resolution, train.resolution) == (192, 224)


def test_a_probe_has_one_view() -> None:
    for content, words in (
        ({"train": {"resolution": 32, "val_resolution": 64}}, "train.resolution 32 is not train.val_resolution 64"),
        ({"min_scale": 0.5}, "min_scale is for --mode ff"),
        ({"flip": False}, "flip is for --mode ff"),
    ):
        with pytest.raises(UserError, match=words):
            recipe("lp", content)
        recipe("ff", content)


def test_a_checkpoint_that_does_not_say(tmp_path: Path) -> None:
    good = {"config": {"model": {"arch": "resnet18"}, "train": {"resolution": 8, "val_resolution": 8, "val_ratio": 1}}}
    assert trained_at(good, tmp_path) == TrainedAt("resnet18", 8, 8, 1.0)
    for key, value in (("resolution", "8"), ("resolution", 0), ("val_resolution", True), ("val_ratio", 2),
                       ("val_ratio", None), ("resolution", 1 << 40)):  # fmt: skip
        bad = {"config": {**good["config"], "train": {**good["config"]["train"], key: value}}}
        with pytest.raises(UserError, match="it is damaged"):
            trained_at(bad, tmp_path)
    for bad in ({}, {"config": None}, {"config": {"model": {"arch": "x"}}}, {"config": {"train": {}, "model": {}}}):
        with pytest.raises(UserError, match="lacks"):
            trained_at(bad, tmp_path)


# ---------------------------------------------------------------- the whole path, through the command line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and a target, and a surrogate whose config says nothing of sides but train.resolution = 16."""
    root = tmp_path_factory.mktemp("sides")
    for name, kind, split in (("source", "source", "train"), ("val", "source", "val"), ("train", "target", "train"),
                              ("test", "target", "test")):  # fmt: skip
        make_beton(root / f"{name}.beton", kind=kind, split=split)
    config = {
        "data": {"train": str(root / "source.beton"), "val": str(root / "val.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.05, "resolution": 16},
        "engine": {"device": "cpu"},
        "log": {"tensorboard": False},
    }
    (root / "config.json").write_text(json.dumps(config))
    assert main(["train", "--config", str(root / "config.json"), "--out", str(root / "run")]) == EXIT_DONE
    return root


def vote(root: Path, out: Path, *more: str) -> int:
    target, surrogate = root / "train.beton", root / "run"
    return main(["vote", "--method", "lm", "--surrogate", str(surrogate), "--target", str(target), "--out", str(out),
                 *more])  # fmt: skip


def transfer(root: Path, out: Path, *more: str, test: str = "test") -> int:
    return main(["transfer", "--checkpoint", str(root / "run"), "--train", str(root / "train.beton"), "--test",
                 str(root / f"{test}.beton"), "--mode", "lp", "--cached", "--out", str(out), "--set", "train.epochs=1",
                 "--set", "train.batch_size=4", "--set", "engine.device=cpu", *more])  # fmt: skip


def test_one_key_decides_in_training_voting_and_transfer(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = checkpoint.read_meta(checkpoint.resolve(root / "run"))
    assert trained_at(meta, root) == TrainedAt("resnet_tiny", 16, 16, 0.875)
    assert meta["config"]["train"]["peak_epoch"] == 0.125
    assert vote(root, tmp_path / "v.npz") == transfer(root, tmp_path / "r.json") == EXIT_DONE
    config = load_votes(tmp_path / "v.npz").meta["config"]
    assert (config["resolution"], config["ratio"]) == (16, 0.875)
    found = json.loads((tmp_path / "r.json").read_text())["config"]["train"]
    assert (found["resolution"], found["val_resolution"], found["val_ratio"]) == (16, 16, 0.875)
    assert "warning" not in capsys.readouterr().err


def test_what_is_set_and_does_not_fit_is_warned_of_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = ["--set", "train.val_resolution=64"]
    train = ["train", "--config", str(root / "config.json"), "--out", str(tmp_path / "run"), *far]
    calls = (
        (lambda: main(train), "run: train.val_resolution 64 px does not fit a network that is trained at 16 px"),
        (lambda: vote(root, tmp_path / "v.npz", "--resolution", "64"), "--resolution 64 px does not fit"),
        (lambda: transfer(root, tmp_path / "r.json", *far), "r: train.resolution 64 px does not fit"),
    )
    for call, words in calls:
        assert call() == EXIT_DONE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ") and words in line


def test_a_test_set_that_was_trained_on_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".beton", ".beton.json", ".beton.rows"):
        (root / f"copy{suffix}").write_bytes((root / f"train{suffix}").read_bytes())
    for test in ("train", "copy"):
        assert transfer(root, tmp_path / "r.json", test=test) == EXIT_BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{test}.beton holds the samples of" in line and not list(tmp_path.iterdir())
    for test in ("b", "./b", "x/../b"):
        with pytest.raises(UserError, match=r"targets\.t: train and test are the same, b"):
            validate(RunConfig, {**RUN, "targets": {"t": {"train": "b", "test": test}}}, source="x")


# ---------------------------------------------------------------- presets in a run's config


def test_a_run_trains_by_presets() -> None:
    config = validate(
        RunConfig,
        {**RUN, "surrogate": {"preset": "resnet18-surrogate"}, "surrogates": {"v": {"preset": "vit-b16"}},
         "pretrain": {"preset": "lm-adv", "min_scale": 0.25, "train": {"batch_size": 512}}},
        source="x",
    )  # fmt: skip
    for table, name, changed in (
        (config.surrogate, "resnet18-surrogate", {}),
        (config.surrogates["v"], "vit-b16", {}),
        (config.pretrain, "lm-adv", {"batch_size": 512}),
    ):
        whole = load_config(TrainConfig, name)
        assert (table.model, table.task) == (whole.model, whole.task)
        assert table.train.model_dump() == {**whole.train.model_dump(), **changed}
        assert table.preset == ""  # what is recorded is what it came to
    assert config.pretrain.min_scale == 0.25
    # Other sides of a preset fit its resolution: they follow where another one is given, and do not where they are.
    for name in ("resnet18-surrogate-fast", "resnet18-surrogate", "resnet101", "moco-resnet101"):
        for side in (32, 224):
            for more in ({}, {"val_resolution": 64}):
                given = [f"train.{key}={value}" for key, value in {"resolution": side, **more}.items()]
                pretrain = {"preset": name, "train": {"resolution": side, **more}}
                whole = load_config(TrainConfig, name, given).train
                assert validate(RunConfig, {**RUN, "pretrain": pretrain}, source="x").pretrain.train == whole
                assert whole.val_resolution == more.get("val_resolution", val_side(side))
                assert whole.start_resolution in (0, start_side(side, whole.resolution_step))
    assert validate(RunConfig, config.model_dump(mode="json"), source="x") == config
    for table, words in (
        ({"preset": "zero1"}, "sets 'engine', which is the whole run's"),
        ({"preset": "resnet1001"}, "no preset is called 'resnet1001'"),
        ({"preset": "demo"}, "unknown key 'arms'"),
        ({"preset": "resnet101", "train": {"lrr": 1}}, r"unknown key 'surrogate\.train\.lrr'"),
        ({"preset": 3}, r"surrogate\.preset"),
    ):
        with pytest.raises(UserError, match=words):
            validate(RunConfig, {**RUN, "surrogate": table}, source="x")
