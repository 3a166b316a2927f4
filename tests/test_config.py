"""Configs: what is unknown or out of range is refused in one line, and presets and recipes are the published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dp4tl_dist.config import PRESETS, OptimConfig, TrainConfig, apply_overrides, find_config, load_config, validate
from dp4tl_dist.errors import UserError
from dp4tl_dist.models import check_arch
from dp4tl_dist.recipes import RECIPES, TransferConfig, recipe
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.sides import TrainedAt


def refused(model: Any, content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        validate(model, content, source="a.toml")
    text = str(caught.value)
    assert "\n" not in text and text.startswith("a.toml: ")
    return text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "content", "where", "known"),
    [
        (TrainConfig, {"sede": 1}, "'sede'", "checkpoint, data, engine, log, model, seed, task, train"),
        (TrainConfig, {"train": {"epoch": 1}}, "'train.epoch'", ", ".join(sorted(OptimConfig.model_fields))),
        (RunConfig, {"source": {"train": "a"}, "targets": {"t": {"train": "a", "test": "b", "val": "c"}}},
         "'targets.t.val'", "test, train"),
        (RunConfig, {"source": {"train": "a"}, "targets": {"train": {"train": "a", "test": "b", "val": "c"}}},
         "'targets.train.val'", "test, train"),
        (RunConfig, {"source": {"train": "a"}, "targets": {"t": {"train": "a", "test": "b"}},
                     "pretrain": {"train": {"lrr": 1}}}, "'pretrain.train.lrr'", "lr, momentum"),
        (TransferConfig, {"train": {"step": 1}}, "'train.step'", "accumulate, batch_size"),
    ],
)  # fmt: skip
def test_unknown_keys_list_the_known_ones(model: Any, content: dict[str, Any], where: str, known: str) -> None:
    text = refused(model, content)
    assert f"unknown key {where}" in text and "known here are" in text and known in text


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("train", "lr", 0), ("train", "lr", float("nan")), ("train", "lr", "fast"), ("train", "epochs", 0),
        ("train", "epochs", 1.5), ("train", "batch_size", -1), ("train", "schedule", "step"),
        ("train", "optimizer", "lamb"), ("train", "momentum", 1.0), ("train", "label_smoothing", 1.0),
        ("train", "weight_decay", -1e-4), ("train", "val_ratio", 1.5), ("train", "accumulate", 0),
        ("data", "min_scale", 0.0), ("data", "num_workers", -1), ("data", "flip", "maybe"),
        ("engine", "device", "tpu"), ("engine", "timeout_s", 0), ("checkpoint", "keep", 0), ("log", "every", 0),
    ],
)  # fmt: skip
def test_values_out_of_range(table: str, key: str, value: Any) -> None:
    assert f"{table}.{key}" in refused(TrainConfig, {table: {key: value}})


@pytest.mark.parametrize(
    "content",
    [
        {"seed": -1}, {"seed": 2**63}, {"train": 3}, {"train": {"epochs": 2, "peak_epoch": 3}},
        {"train": {"start_resolution": 160, "ramp_start": 5, "ramp_end": 4}},
    ],
)  # fmt: skip
def test_what_does_not_go_together(content: dict[str, Any]) -> None:
    refused(TrainConfig, content)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_transfer_seed_out_of_range(seed: int) -> None:
    assert "seed" in refused(TransferConfig, recipe("lp", {"seed": seed}))


def test_several_errors_are_counted() -> None:
    assert "(and 1 more)" in refused(TrainConfig, {"train": {"lr": 0, "epochs": 0}})


def test_configs_are_frozen() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.train.lr = 1


# ---------------------------------------------------------------- files and overrides


def test_toml_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("seed = 1\n[train\nlr = 2\n")
    with pytest.raises(UserError, match=r"a\.toml is not valid TOML: .*line 2"):
        load_config(TrainConfig, str(path))
    path.write_bytes(b"seed = \xff")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(TrainConfig, str(path))
    with pytest.raises(UserError, match=r"none\.toml"):
        load_config(TrainConfig, str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_config(TrainConfig, str(tmp_path))
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UserError, match="is larger than"):
        load_config(TrainConfig, str(path))


def test_a_resolved_json_config_reads_back(tmp_path: Path) -> None:
    config = validate(TrainConfig, {"seed": 4, "train": {"lr": 0.25}, "data": {"train": "a b.beton"}}, source="x")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(TrainConfig, str(path)) == config
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a table"):
        load_config(TrainConfig, str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(TrainConfig, str(path))


def test_names_of_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("resnet101") == PRESETS / "resnet101.toml"
    with pytest.raises(UserError, match=r"'resnet1001'.*demo, .*resnet18-surrogate, resnet18-surrogate-fast, vit-b16"):
        find_config("resnet1001")
    (tmp_path / "resnet101").touch()  # a file of that name comes first
    assert find_config("resnet101") == Path("resnet101")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=3", 3), ("a.b=0.5", 0.5), ("a.b=true", True), ("a.b=5e-5", 5e-5), ('a.b="3"', "3"),
        ("a.b=x y.beton", "x y.beton"), ("a.b='it=1'", "it=1"), ("a.b=p=q", "p=q"), ("a.b=", ""),
        ("a.b=[1, 2]", [1, 2]), ("a.b={c = 1}", {"c": 1}),
        (' a.b = 7', 7), ('a.b="Grüße"', "Grüße"), ("a.b=/p/it's \"x\"", "/p/it's \"x\""),
    ],
)  # fmt: skip
def test_values_of_overrides(override: str, value: Any) -> None:
    assert apply_overrides({"a": {"b": 0, "k": 1}}, [override]) == {"a": {"b": value, "k": 1}}


def test_overrides_nest_and_leave_their_input_alone() -> None:
    content = {"a": {"b": {"c": 1}}}
    assert apply_overrides(content, ["a.b.d=2", "e.f.g=3", "a.b.d=4"]) == {
        "a": {"b": {"c": 1, "d": 4}},
        "e": {"f": {"g": 3}},
    }
    assert content == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "a.=1"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(UserError, match="not of the form"):
        apply_overrides({}, [override])


def test_an_override_below_a_value() -> None:
    with pytest.raises(UserError, match="'seed' is a value"):
        apply_overrides({"seed": 1}, ["seed.x=1"])


# ---------------------------------------------------------------- the published recipes

SURROGATE = {
    "epochs": 16, "batch_size": 1024, "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 5e-5,
    "label_smoothing": 0.0, "schedule": "triangular", "peak_epoch": 2, "start_resolution": 160, "resolution": 192,
    "ramp_start": 11, "ramp_end": 13, "resolution_step": 32, "val_resolution": 256, "val_ratio": 224 / 256,
}  # fmt: skip
VIT = {
    "epochs": 100, "batch_size": 400, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.3, "label_smoothing": 0.11,
    "schedule": "cosine", "peak_epoch": 10, "resolution": 224, "start_resolution": 0, "val_resolution": 224,
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "arch", "published"),
    [
        ("resnet18-surrogate", "resnet18", SURROGATE),
        ("resnet101", "resnet101", {**SURROGATE, "batch_size": 256}),
        ("lm-adv", "resnet101", {**SURROGATE, "batch_size": 256}),
        ("zero1", "resnet101", {**SURROGATE, "batch_size": 256}),
        ("vit-b16", "vit_b_16", VIT),
    ],
)
def test_presets_are_as_published(preset: str, arch: str, published: dict[str, Any]) -> None:
    config = load_config(TrainConfig, preset)
    optim = config.train
    assert config.model.arch == arch
    assert {key: getattr(optim, key) for key in published} == published
    check_arch(arch, (optim.resolution, optim.start_resolution or optim.resolution, optim.val_resolution))
    assert config.data.min_scale == 0.08 and config.data.flip


def test_the_readmes_run_is_as_published(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (tmp_path / "pets.toml").write_text("# pets.toml" + text.partition("# pets.toml")[2].partition("```")[0])
    config = load_config(RunConfig, str(tmp_path / "pets.toml"))
    for table, arch, published in (
        (config.surrogate, "resnet18", SURROGATE),
        (config.pretrain, "resnet101", {**SURROGATE, "batch_size": 256}),
    ):
        assert table.model.arch == arch and {key: getattr(table.train, key) for key in published} == published
    assert not config.transfer.lp


def test_objectives_and_engines_of_presets() -> None:
    task = load_config(TrainConfig, "lm-adv").task
    assert (task.kind, task.adversarial.steps, task.adversarial.fast) == ("adversarial", 3, "none")
    assert task.adversarial.eps == 3 / 255 and task.adversarial.step_size == pytest.approx(2 / 255, rel=1e-12)
    engine = load_config(TrainConfig, "zero1").engine
    assert (engine.kind, engine.zero) == ("deepspeed", 1)
    assert load_config(TrainConfig, "resnet101").engine.kind == "ddp"


def test_every_preset_loads() -> None:
    for path in PRESETS.glob("*.toml"):
        load_config(RunConfig if path.stem.startswith("demo") else TrainConfig, path.stem)
        head = path.read_text().split("\n\n")[0]
        assert all(word in head for word in ("# command:", "# hardware:"))
    assert load_config(RunConfig, "demo", ["seeds=[0, 1]", "nproc=2"]).seeds == (0, 1)


def test_transfer_recipes_are_as_published() -> None:
    common = {"batch_size": 128, "schedule": "cosine", "peak_epoch": 0, "resolution": 224, "val_resolution": 224,
              "val_ratio": 224 / 256}  # fmt: skip
    table = {
        "lp": {**common, "epochs": 50, "optimizer": "adam", "lr": 0.01, "weight_decay": 0},
        "ff": {**common, "epochs": 200, "optimizer": "adam", "lr": 1e-4, "weight_decay": 0},
        "ff-sgd": {**common, "epochs": 200, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9},
    }
    assert RECIPES.keys() == table.keys()
    for name, published in table.items():
        mode = "lp" if name == "lp" else "ff"
        config = validate(TransferConfig, recipe(mode, {"recipe": name}), source="x")  # type: ignore[arg-type]
        config = config.suited(TrainedAt("resnet101", 192, 256, 224 / 256))
        assert {key: getattr(config.train, key) for key in published} == published
        assert config.recipe == name


def test_a_recipe_is_the_base_of_what_is_given() -> None:
    content = {"train": {"epochs": 3}, "seed": 2}
    merged = recipe("ff", content)
    assert merged == {"seed": 2, "recipe": "ff", "train": {**RECIPES["ff"], "epochs": 3}}
    assert content == {"train": {"epochs": 3}, "seed": 2}
    for mode, wrong in (
        ("lp", {"recipe": "ff"}),
        ("ff", {"recipe": "lp"}),
        ("ff", {"cached": True}),
        ("lp", {"recipe": "x"}),
    ):
        with pytest.raises(UserError):
            recipe(mode, wrong)  # type: ignore[arg-type]


def test_a_recipe_of_the_wrong_shape() -> None:
    for content in ({"train": 3}, {"recipe": ["lp"]}):
        with pytest.raises(UserError):
            validate(TransferConfig, recipe("lp", content), source="a.toml")
