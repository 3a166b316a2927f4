"""The readers under test: for each its seeds, how they are mutated, and what must hold of what it returns."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_beton
import fuzz_checkpoint
import fuzz_runs
import fuzz_scores
import numpy as np
from fuzz_checkpoint import STEP
from fuzz_formats import CANARY, mutate_npz
from fuzz_mutate import TEXTS, mutate_bytes, mutate_json, mutate_lines, scalar

from dp4tl_dist.config import PRESETS, TrainConfig, apply_overrides, load_config, read_toml, validate
from dp4tl_dist.contents import newest_meta
from dp4tl_dist.data.subset import Subset, load_subset, save_subset
from dp4tl_dist.files import make_meta
from dp4tl_dist.info import describe, render
from dp4tl_dist.log import Metrics, read_jsonl, truncate_jsonl
from dp4tl_dist.prune.select import combine, rank_groups, read_list
from dp4tl_dist.prune.votes_file import Members, Votes, load_votes, save_votes
from dp4tl_dist.recipes import TransferConfig, recipe
from dp4tl_dist.records import read_record
from dp4tl_dist.run_config import RunConfig

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
    names = ("cluster 0", "cluster 1")
    members = Members(np.array([0, 1, 1, 0, 0], np.int32), np.array([[0, 3], [2, -1]]))
    predictions = np.array([1, 1, 0])
    votes = np.array([[1, 2]])
    save_votes(
        folder / "x.npz", Votes(votes, votes / 2.0, predictions, np.array([3]), "fm", names, meta, members=members)
    )
    found.append({"x.npz": (folder / "x.npz").read_bytes()})
    closest = np.array([[0, 3], [2, -1]])
    save_votes(
        folder / "x.npz", Votes(votes, votes / 2.0, predictions, np.array([3]), "fm", names, meta, closest=closest)
    )
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
    if found.members:
        assigned, near = found.members.assignment, found.members.nearest
        assert len(assigned) and assigned.min() >= 0 and assigned.max() < len(found.classes) == len(near)
        assert near.size == 0 or (near.min() >= -1 and near.max() < len(assigned))
    if found.closest is not None:
        assert len(found.closest) == len(found.classes) and found.closest.min(initial=0) >= -1
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
OVERRIDES = (
    "train.lr=1", "seed=7", "data.train=x", "a.b=1", "train=1", "train.train.train=1", "=", "a", "", ".=1", "..=",
    "seed=[", "seed={", "train.lr=nan", "seed=1\n2", "seed=\x1b", "log.every=0", "log.every=9e9", "data.train='''",
    "[train].x=1", "train.epochs=0x" + "f" * 5000,
)  # fmt: skip


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


TRANSFER_TOML = """recipe = "ff-sgd"
val_share = 0.25
[train]
epochs = 3
lr = 0.5
[engine]
timeout_s = 30
"""


def transfer_seeds(folder: Path) -> list[Files]:
    return [{"x.toml": TRANSFER_TOML.encode()}, {"x.toml": b"cached = false\n[train]\nepochs = 2\n"}]


def read_transfer(folder: Path) -> Iterator[None]:
    overrides = folder / "overrides.json"
    given = json.loads(overrides.read_text()) if overrides.exists() else []
    content = apply_overrides(read_toml(folder / "x.toml"), given)
    found = validate(TransferConfig, recipe("ff", content), source="x.toml")
    # What a result's meta holds makes the same transfer again.
    assert validate(TransferConfig, json.loads(json.dumps(found.model_dump(mode="json"))), source="again") == found
    yield


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
LIST_LINES = (
    "ant", "1", "99", "12", "9" * 5000, "-1", "٣", "²", "# a", "bee # b", "", " ", "\x00", "\x1b[31m", "a" * 5000,
    "b" * 300_000, "\u2028", "x\ry", "é", "e\u0301", "ant,bee", "\ufeffant", "class 1\tx", *TEXTS,
)  # fmt: skip


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


# ---------------------------------------------------------------- what `dp4tl info` shows


def info_seeds(folder: Path) -> list[Files]:
    """Something of every kind; the last of its names is what is asked about."""
    found = [
        *fuzz_beton.seeds(folder)[2:3],
        *votes_seeds(folder)[:2],
        *subset_seeds(folder)[:1],
        *fuzz_scores.scores_seeds(folder)[:1],
    ]
    found += [
        {name: files[name]} for files in fuzz_checkpoint.seeds(folder)[:1] for name in files if name.endswith(".json")
    ]
    found += [{"stages/x.json": record_seeds(folder)[0]["stages/x.json"]}]
    result = make_meta("transfer", seed=0) | {"top1": 0.5, "classes": ["a", "b\n"], "per_class": [1, 2] * 9}
    return [*found, {"x.json": json.dumps(result).encode()}]


def mutate_described(rng: Random, files: Files, others: list[Files]) -> Files:
    if "x.beton" in files:
        return fuzz_beton.mutate(rng, {"x.beton": files["x.beton"]} if rng.random() < 0.5 else files, [files])
    name = next(iter(files))
    change = mutate_npz if name.endswith(".npz") else mutate_json
    return {name: change(rng, files[name], [files[name]])}


def read_info(folder: Path) -> Iterator[None]:
    names = [path for path in folder.iterdir() if path.is_file() and path.name != "x.beton.json"]
    path = names[0] if names else folder / STEP if (folder / STEP / "meta.json").exists() else folder
    content = describe(path)
    text = render(content)
    assert text.replace("\n", "").isprintable() and json.dumps(content)
    yield


RUN_TOMLS = [RUN_TOML, *(path.read_text() for path in sorted(PRESETS.glob("*.toml")) if "targets" in path.read_text())]
_ALL = (
    Reader("beton", fuzz_beton.seeds, fuzz_beton.mutate, fuzz_beton.read),
    Reader("votes", votes_seeds, mutate_arrays, read_votes),
    Reader("subset", subset_seeds, mutate_arrays, read_subset),
    Reader("scores", fuzz_scores.scores_seeds, mutate_arrays, fuzz_scores.read_scores),
    Reader("clusters", fuzz_scores.clusters_seeds, mutate_arrays, fuzz_scores.read_clusters),
    Reader("losses", fuzz_scores.losses_seeds, mutate_arrays, fuzz_scores.read_losses),
    Reader("rows", fuzz_scores.rows_seeds, mutate_arrays, fuzz_scores.read_rows),
    Reader("checkpoint", fuzz_checkpoint.seeds, fuzz_checkpoint.mutate, fuzz_checkpoint.read),
    Reader("train-config", config_seeds(TrainConfig, [TRAIN_TOML]), mutate_config, read_config(TrainConfig)),
    Reader("run-config", config_seeds(RunConfig, RUN_TOMLS), mutate_config, read_config(RunConfig)),
    Reader("transfer-config", transfer_seeds, mutate_config, read_transfer),
    Reader("resume", fuzz_runs.resume_seeds, fuzz_runs.mutate_resume, fuzz_runs.read_resume),
    Reader("report", fuzz_runs.report_seeds, fuzz_runs.mutate_report, fuzz_runs.read_report),
    Reader("record", record_seeds, mutate_record, read_records),
    Reader("list", list_seeds, mutate_list, read_class_list),
    Reader("metrics", metrics_seeds, mutate_metrics, read_metrics),
    Reader("info", info_seeds, mutate_described, read_info),
)
READERS = {reader.name: reader for reader in _ALL}


def check_nothing_ran() -> None:
    """No pickle in a file has done what it says, which is to make a folder here."""
    assert not Path(CANARY).exists(), "a pickle was run"
