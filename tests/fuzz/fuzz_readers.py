"""The readers under test: for each its seeds, how they are mutated, and what must hold of what it returns."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_beton
import numpy as np
import torch
from fuzz_formats import CANARY, mutate_npz, mutate_safetensors, mutate_state
from fuzz_mutate import TEXTS, mutate_bytes, mutate_json, mutate_lines, scalar
from torch import nn

from dp4tl_dist.config import PRESETS, TrainConfig, load_config
from dp4tl_dist.data.subset import Subset, load_subset, save_subset
from dp4tl_dist.files import digest_file, make_meta
from dp4tl_dist.log import Metrics, read_jsonl, truncate_jsonl
from dp4tl_dist.models import build_model
from dp4tl_dist.pipeline import newest_meta, read_record
from dp4tl_dist.prune.select import combine, rank_groups, read_list
from dp4tl_dist.prune.votes_file import Votes, load_votes, save_votes
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.train import checkpoint

Files = dict[str, bytes]
Read = Callable[[Path], Iterator[None]]


@dataclass(frozen=True)
class Reader:
    name: str
    seeds: Callable[[Path], list[Files]]
    """Valid files, by name, made by the real writers in an empty folder."""
    mutate: Callable[[Random, Files, list[Files]], Files]
    read: Read
    """Reads the files of a folder; yields between parts that have a time limit of their own."""


def contents(files: list[Files], name: str) -> list[bytes]:
    return [item[name] for item in files if name in item]


# ---------------------------------------------------------------- votes and subset


def votes_seeds(folder: Path) -> list[Files]:
    rng, found = np.random.default_rng(0), []
    for sizes, groups in (((24,), 5), ((3, 9, 1), 4), ((1,), 1)):
        votes = np.stack([np.bincount(rng.integers(0, groups, size), minlength=groups) for size in sizes]).astype(
            np.int64
        )
        predictions = np.concatenate([np.repeat(np.arange(groups), row) for row in votes]).astype(np.int64)
        meta = make_meta("votes", config={"batch_size": 4}, inputs={"source": "ab" * 16})
        names = tuple(f"class {i}" for i in range(groups))
        sizes_array = np.array(sizes, np.int64)
        save_votes(folder / "x.npz", Votes(votes, rng.random(votes.shape), predictions, sizes_array, "lm", names, meta))
        found.append({"x.npz": (folder / "x.npz").read_bytes()})
    return found


def read_votes(folder: Path) -> Iterator[None]:
    found = load_votes(folder / "x.npz")
    assert found.votes.shape == found.affinity.shape == (len(found.target_sizes), len(found.classes))
    assert (
        np.array_equal(found.votes.sum(axis=1), found.target_sizes)
        and len(found.predictions) == found.target_sizes.sum()
    )
    assert found.predictions.min() >= 0 and found.predictions.max() < len(found.classes)
    assert isinstance(found.meta, dict) and found.votes.min() >= 0
    ranking = rank_groups(*combine(found.votes, found.affinity))
    assert np.array_equal(np.sort(ranking), np.arange(len(found.classes)))
    yield


def subset_seeds(folder: Path) -> list[Files]:
    found = []
    for indices, groups in (([0, 2, 3, 9, 11], [0, 4]), ([7], []), (list(range(40)), [1, 2, 3])):
        meta = make_meta("subset", seed=1, inputs={"source": "cd" * 16})
        save_subset(
            folder / "x.npz", Subset(np.array(indices, np.int64), np.array(groups, np.int64), 0.5, "random", meta)
        )
        found.append({"x.npz": (folder / "x.npz").read_bytes()})
    return found


def read_subset(folder: Path) -> Iterator[None]:
    found = load_subset(folder / "x.npz", beton=None)
    assert len(found.indices) and found.indices.min() >= 0 and (np.diff(found.indices) > 0).all()
    assert (np.diff(found.groups) > 0).all() and (not len(found.groups) or found.groups.min() >= 0)
    assert 0 <= found.ratio <= 1 and isinstance(found.meta, dict)
    yield


def mutate_arrays(rng: Random, files: Files, others: list[Files]) -> Files:
    return {"x.npz": mutate_npz(rng, files["x.npz"], contents(others, "x.npz"))}


# ---------------------------------------------------------------- checkpoint

STEP = "checkpoints/step_000000007"


def checkpoint_seeds(folder: Path) -> list[Files]:
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3, 2))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    own = {"cpu_rng": torch.get_rng_state(), "buffers": {"a": torch.arange(4)}, "losses": [0.5, 1.5]}
    config = {"model": {"arch": "resnet_tiny"}, "train": {"val_resolution": 32, "val_ratio": 0.875}}
    meta = make_meta("checkpoint", config=config, seed=0) | {"classes": ["a", "b", "c"], "step": 7}
    state = {"optimizer": optimizer.state_dict(), "ranks": [own]}
    found = []
    for dtype, val in ((torch.float32, {"top1": 0.5}), (torch.bfloat16, {"top1": 0, "loss": 2.5})):
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
        meta["val"] = val
        checkpoint.save(folder / STEP, weights=weights, state=state, meta=meta)
        found.append({f"{STEP}/{item.name}": item.read_bytes() for item in sorted((folder / STEP).iterdir())})
    return found


def mutate_checkpoint(rng: Random, files: Files, others: list[Files]) -> Files:
    """One of the three files; mostly with the digests made right again, as who means ill would do."""
    name = rng.choice(sorted(files))
    change = {".json": mutate_json, ".pt": mutate_state, ".safetensors": mutate_safetensors}[Path(name).suffix]
    changed = {**files, name: change(rng, files[name], contents(others, name))}
    if not name.endswith(".json") and rng.random() < 0.8:
        changed["resign"] = b""
    return changed


def read_checkpoint(folder: Path) -> Iterator[None]:
    step = folder / STEP
    if (folder / "resign").exists():
        meta = json.loads((step / "meta.json").read_text())
        meta["digests"] = {name: digest_file(step / name) for name in checkpoint.FILES}
        (step / "meta.json").write_text(json.dumps(meta))
    assert isinstance(checkpoint.readable(folder), dict)
    errors: list[Exception] = []
    parts: tuple[Callable[[], Any], ...] = (
        lambda: checkpoint.resolve(step), lambda: checkpoint.best(folder), lambda: checkpoint.load_model(folder),
        lambda: _check_state(checkpoint.load_state(step)),
        lambda: [tensor.double().sum().item() for tensor in checkpoint.load_weights(step).values()],
    )  # fmt: skip
    for part in parts:
        try:
            part()
        except ValueError as error:
            errors.append(error)
        yield
    for error in errors:
        raise error


def _check_state(state: Any) -> None:
    """Touch every byte of every tensor: one that lies about its size would read elsewhere."""
    assert isinstance(state, dict)
    stack: list[Any] = [state]
    for _ in range(1000):
        if not stack:
            return
        item = stack.pop()
        if isinstance(item, torch.Tensor) and item.layout == torch.strided and item.numel() < 1 << 20:
            if not item.is_meta:
                item.clone().contiguous().view(-1).tolist()
        elif isinstance(item, dict | list | tuple):
            stack.extend(item.values() if isinstance(item, dict) else item)


# ---------------------------------------------------------------- configs


RUN_TOML = """nproc = 1
seeds = [0, 1]
arms = ["dense", "lm@0.5", "random@0.25"]
compact = true
[source]
train = "synthetic:source/train"
val = "source val.beton"
[targets.pets]
train = "a.beton"
test = "b.beton"
[surrogate]
flip = true
[surrogate.train]
epochs = 4
lr = 0.5
[transfer]
modes = ["lp", "ff"]
lp = {epochs = 2}
"""
TRAIN_TOML = """seed = 3
[data]
train = "source é.beton"
min_scale = 0.25
[model]
arch = "resnet_tiny"
[train]
epochs = 4
batch_size = 64
lr = 1.5
optimizer = "adamw"
[engine]
device = "cpu"
timeout_s = 30.0
[checkpoint]
keep = 2
"""
OVERRIDES = ("train.lr=1", "seed=7", "data.train=x", "a.b=1", "train=1", "train.train.train=1", "=", "a", "", ".=1", "..=", "seed=[", "seed={",
             "train.lr=nan", "seed=1\n2", "seed=\x1b", "log.every=0", "log.every=9e9", "data.train='''", "[train].x=1")  # fmt: skip


def config_seeds(model: type[Any], texts: list[str]) -> Callable[[Path], list[Files]]:
    def make(folder: Path) -> list[Files]:
        found = [{"x.toml": text.encode()} for text in texts]
        for text in texts:
            (folder / "x.toml").write_text(text)
            found.append({"x.json": load_config(model, str(folder / "x.toml")).model_dump_json(indent=1).encode()})
        return found

    return make


def mutate_config(rng: Random, files: Files, others: list[Files]) -> Files:
    (name, content), changed = next(iter(files.items())), {}
    if rng.random() < 0.8:
        change = mutate_lines if name.endswith(".toml") else mutate_json
        changed[name] = change(rng, content, contents(others, name))
    if rng.random() < 0.3 or not changed:
        odd = [
            rng.choice((*OVERRIDES, f"{key}={scalar(rng)}"))
            for key in rng.choices(("seed", "train.lr", "data", "a.b"), k=2)
        ]
        odd += [".".join(["a"] * rng.choice((2, 2000))) + "=1"] if rng.random() < 0.1 else []
        changed["overrides.json"] = json.dumps(odd).encode()
    return {name: content, **changed}


def read_config(model: type[Any]) -> Read:
    def read(folder: Path) -> Iterator[None]:
        path = next(path for path in folder.iterdir() if path.name in ("x.toml", "x.json"))
        overrides = folder / "overrides.json"
        found = load_config(model, str(path), json.loads(overrides.read_text()) if overrides.exists() else [])
        assert isinstance(found, model)
        # What a run writes down and its continuation reads again.
        again = folder / "again.json"
        again.write_text(json.dumps(found.model_dump(mode="json")))
        assert load_config(model, str(again)) == found
        yield

    return read


# ---------------------------------------------------------------- records, lists, metrics


def record_seeds(folder: Path) -> list[Files]:
    done = {
        "name": "x",
        "key": "ab" * 16,
        "status": "done",
        "seconds": 1.5,
        "output": "cd",
        "argv": ["vote", "--out", "x"],
        "nproc": 2,
    }
    meta = make_meta("checkpoint", config={"model": {"arch": "a"}}) | {"seconds": 4.5, "digests": {"state.pt": "00"}}
    both = {"stages/x.json": done, f"{STEP}/meta.json": meta}
    return [{name: json.dumps(value).encode() for name, value in both.items()}]


def mutate_record(rng: Random, files: Files, others: list[Files]) -> Files:
    name = rng.choice(sorted(files))
    return {**files, name: mutate_json(rng, files[name], contents(others, name))}


def read_records(folder: Path) -> Iterator[None]:
    from types import SimpleNamespace

    graph: Any = SimpleNamespace(out=folder)
    stage: Any = SimpleNamespace(name="x", argv=("train",), output=folder)
    for found in (read_record(graph, stage), newest_meta(folder)):
        assert isinstance(found, dict)
    yield


LIST_CLASSES = ("ant", "bee", "12", "# odd", "two words", "é", "cat\tdog", *(f"class {i}" for i in range(40)))
LIST_LINES = ("ant", "1", "99", "12", "9" * 5000, "-1", "٣", "²", "# a", "bee # b", "", " ", "\x00", "\x1b[31m", "a" * 5000, "b" * 300_000,
              "\u2028", "x\ry", "é", "e\u0301", "ant,bee", "\ufeffant", "class 1\tx", *TEXTS)  # fmt: skip


def list_seeds(folder: Path) -> list[Files]:
    texts = ("ant\nbee # keep\n\n# no\n12\n", "0\n1\n2\n", "class 3\nclass 4", "two words\né\n")
    return [{"x.txt": text.encode()} for text in texts]


def mutate_list(rng: Random, files: Files, others: list[Files]) -> Files:
    return {"x.txt": mutate_lines(rng, files["x.txt"], contents(others, "x.txt"), LIST_LINES)}


def read_class_list(folder: Path) -> Iterator[None]:
    found = read_list(folder / "x.txt", LIST_CLASSES)
    assert len(found) and found.min() >= 0 and found.max() < len(LIST_CLASSES) and (np.diff(found) > 0).all()
    yield


def metrics_seeds(folder: Path) -> list[Files]:
    with Metrics(folder, step=0, tensorboard=False) as metrics:
        for step in range(1, 6):
            metrics.write("step", step=step, loss=1 / step, lr=0.5)
        metrics.write("epoch", step=5, top1=0.25, nothing=None)
    return [{"metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}]


def mutate_metrics(rng: Random, files: Files, others: list[Files]) -> Files:
    content = files["metrics.jsonl"]
    if rng.random() < 0.3:
        return {"metrics.jsonl": mutate_bytes(rng, content, [content])}
    rows = content.split(b"\n")
    for _ in range(rng.choice((1, 2))):
        i = rng.randrange(len(rows))
        rows[i] = mutate_json(rng, rows[i] or b"{}", [content])
    return {"metrics.jsonl": b"\n".join(rows)}


def read_metrics(folder: Path) -> Iterator[None]:
    path = folder / "metrics.jsonl"
    before = read_jsonl(path)
    assert all(isinstance(line, dict) for line in before)
    yield
    truncate_jsonl(path, 3)
    assert all(line["step"] <= 3 for line in read_jsonl(path))
    yield


RUN_TOMLS = [RUN_TOML, *(path.read_text() for path in sorted(PRESETS.glob("*.toml")) if "targets" in path.read_text())]
_ALL = (
    Reader("beton", fuzz_beton.seeds, fuzz_beton.mutate, fuzz_beton.read),
    Reader("votes", votes_seeds, mutate_arrays, read_votes),
    Reader("subset", subset_seeds, mutate_arrays, read_subset),
    Reader("checkpoint", checkpoint_seeds, mutate_checkpoint, read_checkpoint),
    Reader("train-config", config_seeds(TrainConfig, [TRAIN_TOML]), mutate_config, read_config(TrainConfig)),
    Reader("run-config", config_seeds(RunConfig, RUN_TOMLS), mutate_config, read_config(RunConfig)),
    Reader("record", record_seeds, mutate_record, read_records),
    Reader("list", list_seeds, mutate_list, read_class_list),
    Reader("metrics", metrics_seeds, mutate_metrics, read_metrics),
)
READERS = {reader.name: reader for reader in _ALL}


def check_nothing_ran() -> None:
    """No pickle in a file has done what it says, which is to make a folder here."""
    assert not Path(CANARY).exists(), "a pickle was run"
