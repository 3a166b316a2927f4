"""MoCo v2: loss and queue against a slow oracle, ranks against one, resumes bit-equal, and what its checkpoint is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_factory import make_beton
from numpy.typing import NDArray
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from dp4tl_dist.cli import main
from dp4tl_dist.config import EngineConfig, MocoConfig, OptimConfig, TrainConfig
from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.errors import EXIT_DONE, EXIT_STOPPED, Stopped, UserError
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.models import build_model, normalise
from dp4tl_dist.train import checkpoint, knn
from dp4tl_dist.train.engine import DDPEngine
from dp4tl_dist.train.moco import KEY, QUERY, Moco, contrast
from dp4tl_dist.train.supervised import train
from dp4tl_dist.train.views import augmented
from dp4tl_dist.world import World

SIDE, CANVAS = 12, 16
HOW = MocoConfig(queue=24, momentum=0.9, dim=5)


class Flat(nn.Module):
    """A network without batch norm, so that ranks make no difference but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 10), nn.Tanh())
        self.fc = nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(images))
        return logits


def batch_of(identifiers: NDArray[np.int64]) -> Batch:
    """Noise that an image's identifier sets."""
    images = np.stack([
        np.random.default_rng(int(i)).integers(0, 256, (3, CANVAS, CANVAS), dtype=np.uint8) for i in identifiers
    ])  # fmt: skip
    return Batch(torch.from_numpy(images), torch.from_numpy(identifiers % 4), torch.from_numpy(identifiers))


def steps(world: World, num_steps: int, *, parts: int = 1, model: nn.Module | None = None) -> tuple[Moco, list[float]]:
    """A task after some steps over this rank's parts of global batches of 8, and its losses."""
    task = Moco(model or Flat(), HOW, world, seed=5, batch_size=8, parts=parts)
    optim = OptimConfig(batch_size=8, lr=0.1, weight_decay=1e-4, accumulate=parts)
    engine, losses, share = DDPEngine(world, task, optim, EngineConfig()), [], 8 // world.num_ranks
    for step in range(num_steps):
        mine = np.arange(8 * step, 8 * step + 8)[world.rank * share : (world.rank + 1) * share]
        losses.append(float(engine.step(batch_of(mine), lr=0.1)))
    task._enqueue()
    return task, losses


def unit(rows: Tensor) -> NDArray[np.float64]:
    values = rows.detach().double().numpy()
    return values / np.sqrt((values**2).sum(axis=1, keepdims=True))


def test_loss_and_queue_against_a_slow_oracle() -> None:
    """Sample by sample, in float64, with a queue that is a plain list; five steps wrap a queue of three batches."""
    found, losses = steps(World(), 5)
    task, _ = steps(World(), 0)
    query, key = task.module, task.key
    optimizer = torch.optim.SGD(query.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    queue = [row.double().numpy() for row in task.queue]
    slow = {name: value.clone() for name, value in key.named_parameters()}
    for step in range(5):
        batch = batch_of(np.arange(8 * step, 8 * step + 8))
        for name, value in query.named_parameters():
            slow[name] = 0.9 * slow[name] + 0.1 * value.detach()
        key.load_state_dict(slow, strict=True)
        views = [
            normalise(augmented(batch.images, batch.identifiers, side=SIDE, seed=5, epoch=0, view=view, how=HOW))
            for view in (QUERY, KEY)
        ]
        with torch.no_grad():
            keys = unit(key(views[1]))
        queries = query(views[0])
        loss = 0.0
        for q, k in zip(unit(queries), keys, strict=True):
            scores = np.array([q @ k, *(q @ other for other in queue)]) / 0.2
            loss -= (scores[0] - np.log(np.exp(scores).sum())) / 8
        assert losses[step] == pytest.approx(loss, abs=1e-5)
        negatives = torch.from_numpy(np.stack(queue)).float()
        normal = functional.normalize(queries, dim=1)
        logits = torch.cat([(normal * torch.from_numpy(keys).float()).sum(1, keepdim=True), normal @ negatives.T], 1)
        functional.cross_entropy(logits / 0.2, torch.zeros(8, dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        start = 8 * step % 24
        queue[start : start + 8] = list(keys)
    np.testing.assert_allclose(found.queue.numpy(), np.stack(queue), atol=1e-5)
    assert found.pointer == 40 % 24
    for (name, ours), theirs in zip(found.module.named_parameters(), query.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), atol=1e-5, err_msg=name)


def test_only_the_query_encoder_has_gradients() -> None:
    task = Moco(build_model("resnet_tiny", 4), HOW, World(), seed=0, batch_size=8)
    before = {name: value.clone() for name, value in task.key.state_dict().items() if "running" not in name}
    task(batch_of(np.arange(8)))["loss"].backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in task.module.parameters())
    assert all(value.grad is None and not value.requires_grad for value in task.key.parameters())
    assert not task.queue.requires_grad
    after = task.key.state_dict()
    moved = [
        name for name, value in before.items() if "num_batches" not in name and not torch.equal(value, after[name])
    ]
    assert moved == []  # it follows the query encoder, which has made no step yet


def test_the_key_encoder_follows() -> None:
    task, _ = steps(World(), 1)
    start, query = steps(World(), 0)[0], dict(task.module.named_parameters())
    task._follow()
    for name, value in task.key.named_parameters():
        expected = 0.9 * dict(start.key.named_parameters())[name] + 0.1 * query[name]
        torch.testing.assert_close(value, expected.detach())


def on_ranks(world: World) -> tuple[list[float], NDArray[np.float32], NDArray[np.float32]]:
    task, losses = steps(world, 6)
    weights = torch.cat([value.detach().flatten() for value in task.module.parameters()])
    return losses, weights.numpy(), task.queue.numpy()


def test_one_and_two_ranks_take_the_same_steps() -> None:
    alone, (first, second) = on_ranks(World()), run_ranks(on_ranks, 2)
    np.testing.assert_allclose((np.array(first[0]) + second[0]) / 2, alone[0], atol=2e-6)
    for ours, theirs, single in zip(first[1:], second[1:], alone[1:], strict=True):
        assert np.array_equal(ours, theirs)
        np.testing.assert_allclose(ours, single, atol=2e-5)


def test_micro_batches_make_the_same_step() -> None:
    whole, parts = steps(World(), 4), steps(World(), 4, parts=2)
    np.testing.assert_allclose(parts[1], whole[1], atol=2e-6)
    torch.testing.assert_close(parts[0].queue, whole[0].queue, atol=2e-5, rtol=0)


class Means(nn.Module):
    """Its batch norm shows which samples were together: outputs depend on the mean of the part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        values = images.flatten(1).double().mean(dim=1, keepdim=True)
        return torch.cat([values - values.mean(), torch.ones_like(values)], dim=1).float()


def shuffled_keys(world: World) -> tuple[NDArray[np.float32], list[int]]:
    """The keys of a global batch of 8, and whose views this rank computed."""
    seen: list[int] = []
    task = Moco(Flat(), HOW, world, seed=5, batch_size=8)
    task.module = task.key = Means()
    task._place(torch.device("cpu"))
    view = task._view

    def watched(images: Tensor, identifiers: Tensor, number: int) -> Tensor:
        seen.extend(identifiers.tolist())
        return view(images, identifiers, number)

    task._view = watched  # type: ignore[method-assign]
    share = 8 // world.num_ranks
    mine = np.arange(8)[world.rank * share : (world.rank + 1) * share]
    _, keys = task._keys(batch_of(mine))
    return keys.numpy(), seen


def test_keys_are_normalised_among_samples_of_other_ranks() -> None:
    (keys, first), (same, second) = run_ranks(shuffled_keys, 2)
    assert np.array_equal(keys, same) and sorted(first + second) == list(range(8))
    assert set(first) not in ({0, 1, 2, 3}, {4, 5, 6, 7})
    whole = batch_of(np.arange(8))
    views = augmented(whole.images, whole.identifiers, side=SIDE, seed=5, epoch=0, view=KEY, how=HOW)
    for part in (first, second):
        expected = functional.normalize(Means()(normalise(views[part])), dim=1)
        np.testing.assert_allclose(keys[part], expected.numpy(), atol=1e-5)


def test_groups_are_normalised_one_at_a_time() -> None:
    how = HOW.model_copy(update={"bn_groups": 4})
    task = Moco(Flat(), how, World(), seed=5, batch_size=8)
    sizes: list[int] = []
    task.key.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    task(batch_of(np.arange(8)))
    assert sizes == [2, 2, 2, 2]


def test_samples_that_were_left_out_add_nothing() -> None:
    task, batch = steps(World(), 0)[0], batch_of(np.arange(8))
    labels = batch.labels.clone()
    labels[3:] = IGNORED
    part = task(batch._replace(labels=labels))["loss"]
    again, _ = steps(World(), 0)
    queries = functional.normalize(again.forward(again._view(batch.images, batch.identifiers, QUERY)), dim=1)
    keys, _ = again._keys(batch)
    each = contrast(queries, keys, again.queue, temperature=0.2)
    torch.testing.assert_close(part, each[:3].sum() / 8)


# ---------------------------------------------------------------- the kNN probe


def test_knn_against_a_slow_oracle() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 90)
    rows = rng.normal(size=(7, 6))[labels] + rng.normal(size=(90, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    right = five = 0
    for i in range(90):
        others = sorted((j for j in range(90) if j != i), key=lambda j: -rows[i] @ rows[j])[:10]
        votes = np.zeros(7)
        for j in others:
            votes[labels[j]] += np.exp((rows[i] @ rows[j] - 1) / 0.07)
        order = np.argsort(-votes, kind="stable")
        right, five = right + (order[0] == labels[i]), five + (labels[i] in order[:5])
    found = knn.score(torch.from_numpy(rows).float(), torch.from_numpy(labels), neighbours=10)
    assert found.top1 == pytest.approx(right / 90) and found.top5 == pytest.approx(five / 90)
    assert 0.2 < found.top1 < 1 and found.loss > 0 and found.num_samples == 90


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moco")
    make_beton(root / "train.beton", num_classes=4, per_class=12)
    make_beton(root / "val.beton", split="val", num_classes=4, per_class=5)
    for split, name in (("train", "target"), ("test", "target-test")):
        make_beton(root / f"{name}.beton", kind="target", split=split, num_classes=3, per_class=6)
    return root


def config_of(root: Path, **more: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "seed": 3, "data": {"train": str(root / "train.beton"), "val": str(root / "val.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"}, "task": {"kind": "moco", "moco": {"queue": 32, "dim": 16, "momentum": 0.9}},
        "train": {"epochs": 3, "batch_size": 8, "lr": 0.05, "schedule": "cosine", "peak_epoch": 0, "resolution": 16,
                  "val_resolution": 16},
        "engine": {"device": "cpu", "timeout_s": 30}, "log": {"every": 2, "tensorboard": False, "order": True},
        "checkpoint": {"every_minutes": 0}, **more,
    })  # fmt: skip


def run(world: World, root: Path, out: Path, stop_at: int | None = None) -> int:
    """Train; with `stop_at`, as if a signal had come in that step. Returns the exit code."""
    from dp4tl_dist.train.signals import Agreement

    after, count = Agreement.after_step, 0

    def counted(self: Agreement) -> tuple[bool, bool]:
        nonlocal count
        count += 1
        return (True, False) if count == stop_at else after(self)

    Agreement.after_step = counted  # type: ignore[method-assign]
    try:
        train(config_of(root), out=out, world=world)
    except Stopped:
        return EXIT_STOPPED
    finally:
        Agreement.after_step = after  # type: ignore[method-assign]
    return EXIT_DONE


def run_once(world: World, root: Path, out: Path) -> int:
    return run(world, root, out)


def run_twice(world: World, root: Path, out: Path) -> list[int]:
    return [run(world, root, out, stop_at=8), run(world, root, out)]


def result(out: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[Any]]:
    """Weights, the task's own state and the losses and validations of a finished run."""
    folder = checkpoint.resolve(out)
    lines = [
        {name: value for name, value in line.items() if name not in ("images_per_s", "data_wait", "seconds")}
        for line in read_jsonl(out / "metrics.jsonl")
    ]
    return checkpoint.load_weights(folder), checkpoint.load_state(folder)["task"], lines


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    else:
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stopped_run_ends_bit_equal(root: Path, tmp_path: Path, num_ranks: int) -> None:
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    if num_ranks == 1:
        torch.set_num_threads(1)
        assert run(World(), root, whole) == EXIT_DONE
        assert run_twice(World(), root, twice) == [EXIT_STOPPED, EXIT_DONE]
    else:
        assert run_ranks(run_once, 2, root, whole) == [EXIT_DONE] * 2
        assert run_ranks(run_twice, 2, root, twice) == [[EXIT_STOPPED, EXIT_DONE]] * 2
    (weights, task, lines), (again, other, more) = result(whole), result(twice)
    assert_same(weights, again)
    assert_same(task, other)
    assert [line for line in more if line["kind"] != "resume"] == lines
    assert task["pointer"] == 18 * 8 % 32 and task["calls"] == 18


def test_the_checkpoint_is_a_plain_network(root: Path, tmp_path: Path) -> None:
    """transfer, cluster, fm votes and a supervised run take it; lm votes need a head, and say so."""
    out = tmp_path / "run"
    assert run(World(), root, out) == EXIT_DONE
    weights, task, lines = result(out)
    plain = build_model("resnet_tiny", 4).state_dict()
    assert weights.keys() == {name for name in plain if not name.startswith("fc.")}
    assert task["head"].keys() == {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}
    assert all(0 <= line["val_top1"] <= 1 for line in lines if line["kind"] == "epoch")
    recipe = {"train": {"epochs": 1, "batch_size": 8, "resolution": 16, "val_resolution": 16},
              "engine": {"device": "cpu"}}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    target, test, source = (str(root / f"{name}.beton") for name in ("target", "target-test", "train"))

    def dp4tl(*argv: object) -> int:
        return main([str(item) for item in argv])

    for mode in ("lp", "ff"):
        assert dp4tl("transfer", "--checkpoint", out, "--train", target, "--test", test, "--mode", mode,
                     "--config", tmp_path / "recipe.json", "--out", tmp_path / f"{mode}.json") == 0  # fmt: skip
    common = ("--surrogate", out, "--source", source, "--device", "cpu", "--out")
    assert dp4tl("cluster", "--clusters", 3, *common, tmp_path / "c.npz") == 0
    vote = ("vote", "--target", target, *common)
    assert dp4tl(*vote, tmp_path / "v.npz", "--method", "fm", "--clusters", tmp_path / "c.npz") == 0
    assert dp4tl(*vote, tmp_path / "w.npz", "--method", "lm") == 2 and not (tmp_path / "w.npz").exists()
    table = {"task": {"kind": "supervised"}, "model": {"arch": "resnet_tiny", "init": str(out)}}
    table["train"] = {**recipe["train"], "peak_epoch": 0}
    train(config_of(root, **table), out=tmp_path / "tuned", world=World())
    assert checkpoint.load_weights(checkpoint.resolve(tmp_path / "tuned")).keys() == plain.keys()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"queue": 20}, "task.moco.queue 20 is not divisible by train.batch_size 8"),
        ({"queue": 32, "bn_groups": 3}, "task.moco.bn_groups 3 does not divide the 8 samples of a rank"),
    ],
)
def test_bad_input(root: Path, tmp_path: Path, table: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train(config_of(root, task={"kind": "moco", "moco": table}), out=tmp_path / "run", world=World())
    assert not (tmp_path / "run").exists()
