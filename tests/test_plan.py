"""What a run's plan accepts can be carried out; what cannot be is told before anything is made, changed or removed."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_runs import Draw, first_steps, make_place, told

from dp4tl_dist import pipeline
from dp4tl_dist.config import validate
from dp4tl_dist.errors import UserError
from dp4tl_dist.plan import check_plan
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("plan"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TRAIN = {"batch_size": 4, "resolution": 16, "val_resolution": 16, "epochs": 3, "peak_epoch": 1}


def content_of(place: Path) -> dict[str, Any]:
    stage = {"model": {"arch": "resnet_tiny"}, "train": TRAIN}
    return {
        "source": {"train": str(place / "source.beton"), "val": str(place / "val.beton")},
        "targets": {"t": {"train": str(place / "t20-train.beton"), "test": str(place / "t20-test.beton")}},
        "arms": ["dense", "lm@0.4"], "surrogate": stage, "pretrain": stage, "engine": {"device": "cpu"},
        "transfer": {"cached": True, "lp": {"resolution": 16, "val_resolution": 16}},
    }  # fmt: skip


def changed(place: Path, change: dict[str, Any]) -> dict[str, Any]:
    """The config that holds, with values at dotted keys; "PLACE/" stands for where the data are."""
    content = content_of(place)
    for dotted, value in change.items():
        here, (*tables, last) = content, dotted.split(".")
        for key in tables:
            here[key] = dict(here.get(key, {}))
            here = here[key]
        here[last] = value.replace("PLACE", str(place)) if isinstance(value, str) else value
    return content


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


CASES: list[tuple[dict[str, Any], str]] = [
    ({"pretrain.model.arch": "resnet999"}, "pretrain.model.arch: unknown architecture 'resnet999'"),
    ({"pretrain.train.batch_size": 17}, "pretrain-lm@0.4-t-s0: pretrain.train.batch_size 17 is larger than the 16"),
    ({"surrogate.train.batch_size": 41}, "surrogate.train.batch_size 41 is larger than the 40"),
    ({"nproc": 3}, "surrogate.train.batch_size 4 is not divisible by 3 ranks"),
    ({"pretrain.train.accumulate": 3}, "pretrain.train.batch_size 4 is not divisible by 1 ranks x 3 micro-batches"),
    ({"transfer.lp.lr": "fast"}, "transfer.lp.lr: "),
    ({"transfer.lp.epoch": 3}, "unknown key 'transfer.lp.epoch'"),
    ({"transfer.lp.peak_epoch": 99}, "peak_epoch 99.0 is past the last epoch"),
    ({"transfer.val_share": 1.0}, "transfer.val_share"),
    ({"transfer.lp.batch_size": 1, "transfer.lp.accumulate": 2}, "transfer.lp.batch_size 1: of 16 training samples"),
    ({"targets.t.test": "PLACE/gone.beton"}, "gone.beton"),
    ({"targets.t.train": "PLACE/broken", "targets.t.test": "PLACE/broken-test"}, "a broken link"),
    ({"targets.t.test": "PLACE/t6-test.beton"}, "t6-test.beton has other classes than"),
    ({"targets.t.train": "PLACE/ones-train.beton", "targets.t.test": "PLACE/ones-test.beton"}, "no class with two"),
    ({"surrogate.task.kind": "moco", "surrogate.task.moco.queue": 64}, "trained without labels and knows no classes"),
    ({"arms": ["el2n@0.5"], "surrogate.task.kind": "moco", "surrogate.task.moco.queue": 64}, "has no outputs"),
    ({"arms": ["cld@0.5"], "surrogate.task.kind": "moco", "surrogate.task.moco.queue": 64}, "log.sample_losses"),
    ({"arms": ["cld@0.5"], "surrogate.train.epochs": 2}, "the run has 2 validated epochs"),
    ({"arms": ["cld@0.5"], "source.val": ""}, "the run has 0 validated epochs"),
    ({"pretrain.task.kind": "moco", "pretrain.task.moco.queue": 63}, "pretrain.task.moco.queue 63 is not divisible"),
    ({"pretrain.task.kind": "moco", "pretrain.task.moco.queue": 64, "pretrain.task.moco.bn_groups": 3}, "bn_groups 3"),
    ({"pretrain.model.init": "PLACE/nowhere"}, "nowhere is not there"),
    ({"pretrain.model.arch": "vit_b_16"}, "vit_b_16 takes 224 px only, not 16"),
    ({"pretrain.train.batch_size": 1}, "cannot train on 1 images of 16 px at a time"),
    ({"source.val": "PLACE/val4.beton"}, "val4.beton has other classes than"),
    ({"source.train": "torchvision:cifar10/train"}, "torchvision:cifar10/train is none of what a run reads"),
    ({"source.train": "PLACE/sorce"}, "sorce is not a folder"),
    ({"source.train": "PLACE/none.beton"}, "none.beton"),
    ({"source.train": "synthetic:source/trian"}, "no part source trian"),
    ({"targets.t.train": "PLACE/empty"}, "holds no images"),
    ({"targets.t.test": "PLACE/t20-train.beton"}, "train and test are the same"),
    ({"targets.t.train": "PLACE/images", "targets.t.test": "PLACE/images"}, "train and test are the same"),
    ({"write.max_side": 4, "targets.t.train": "PLACE/images"}, "max_side 4 is not possible"),
    ({"seeds": [2**63]}, "seed"),
    ({"arms": ["influence@0.5"], "influence.masks": 4}, "masks"),
    ({"arms": ["influence@0.5"], "influence.masks": 32, "influence.model.arch": "resnet_tiny",
      "influence.train": {**TRAIN, "batch_size": 17}}, "influence.train.batch_size 17 is larger than the 16"),
    ({"arms": ["influence@0.5"], "influence.masks": 32, "influence.model.arch": "resnet_tiny",
      "influence.train": TRAIN, "influence.lp": {"lr": "fast"}}, "influence.lp: train.lr"),
    ({"arms": ["influence@0.5"], "influence.masks": 32, "influence.model": {"arch": "resnet_tiny"},
      "influence.train": TRAIN, "influence.model.init": "PLACE/nowhere"}, "nowhere is not there"),
    ({"arms": ["fm@0.5"], "clusters.count": 99}, "--clusters 99 is not between 1 and the 40 samples"),
    ({"arms": ["lm@0.4+steps"], "pretrain.train.steps": 3}, "both say how long to train"),
]  # fmt: skip
if not torch.cuda.is_available():
    CASES.append(({"engine.device": "cuda"}, "torch sees no GPU here"))
CASES += [
    ({key: value}, f"{name} is not installed")
    for name, key, value in (
        ("deepspeed", "engine.kind", "deepspeed"),
        ("timm", "pretrain.model.arch", "timm:resnet18"),
    )
    if importlib.util.find_spec(name) is None
]


@pytest.mark.parametrize(("change", "says"), CASES, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_is_told_before_anything_is_touched(
    place: Path, tmp_path: Path, change: dict[str, Any], says: str, dry_run: bool
) -> None:
    """Of a run folder that is full of finished outputs."""
    out = tmp_path / "run"
    for stage in Graph(validate(RunConfig, content_of(place), source="test"), out).stages.values():
        for path in (stage.output, *stage.also, out / "stages" / f"{stage.name}.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("finished, and worth hours")
    before = tree(out)
    with pytest.raises(UserError) as caught:
        pipeline.run(validate(RunConfig, changed(place, change), source="test"), out=out, dry_run=dry_run)
    assert says in str(caught.value) and told(caught.value)
    assert tree(out) == before


FINE: list[dict[str, Any]] = [
    {}, {"nproc": 2}, {"transfer.lp.batch_size": 9999}, {"transfer.lp.batch_size": 3}, {"compact": True},
    {"targets.t.train": "PLACE/broken", "targets.t.test": "PLACE/broken-test", "write.skip_bad": True},
    {"pretrain.train.batch_size": 16}, {"arms": ["lm@auto", "random@auto", "random-samples@auto"]},
    {"arms": ["cld@0.5", "lm+forgetting@0.5", "retrieval-joint@0.5", "random+herding@0.5"]},
    {"engine.activation_checkpointing": True}, {"pretrain.task.kind": "moco", "pretrain.task.moco.queue": 64},
]  # fmt: skip


@pytest.mark.parametrize("change", FINE, ids=str)
def test_what_can_be(place: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = validate(RunConfig, changed(place, change), source="test")
    check_plan(Graph(config, tmp_path / "run"), ranks=lambda stage: config.nproc if stage.distributed else 1)


@pytest.mark.parametrize("part", range(4))
def test_what_the_plan_accepts_can_be_carried_out(place: Path, tmp_path: Path, part: int) -> None:
    accepted = 0
    for seed in range(50 * part, 50 * part + 50):
        out = tmp_path / str(seed)
        try:
            config = validate(RunConfig, Draw(seed, place).config(), source="config")
            check_plan(Graph(config, out), ranks=lambda stage, nproc=config.nproc: nproc if stage.distributed else 1)  # type: ignore[misc]
        except UserError as error:
            assert told(error), seed
            assert not out.exists()
            continue
        try:
            first_steps(config, out)
        except Exception as error:
            raise AssertionError(f"seed {seed} was accepted, and then: {type(error).__name__}: {error}") from error
        accepted += 1
        shutil.rmtree(out, ignore_errors=True)
    assert accepted >= 5  # most draws are refused
