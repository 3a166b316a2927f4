"""`dp4tl influence`: brute force. Many small models, each trained on a random half of the classes and judged on the
target, in a store that any number of workers fill.

A row of the store is declared by its number alone: its mask follows from the seed. It is done when its file is there,
and in work while a process holds the lock of its folder. The kernel drops that lock when the process ends, however it
ends; the next worker goes on from the checkpoint that is left.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.config import DataConfig, LogConfig, TrainConfig, validate
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.subset import Subset, samples_of_groups, save_subset
from dp4tl_dist.errors import InUseError, UserError
from dp4tl_dist.files import folder_lock, make_meta, read_json, write_json
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.log import say
from dp4tl_dist.prune.influence import Influence, draw_mask, estimate, save_influence
from dp4tl_dist.recipes import TransferConfig, recipe
from dp4tl_dist.sides import TrainedAt
from dp4tl_dist.world import World


def influence(
    config: InfluenceConfig, *, out: Path, worker: tuple[int, int], world: World, force: bool = False
) -> bool:
    """Fill what rows are free, and write `out` once all are done. True where it is written.

    worker (i, n): the i-th of n, from 0; it begins at another row than the others do, and goes round.
    """
    if world.num_ranks > 1:
        raise UserError("influence trains each model on one rank: start several workers (--worker 0/4, ...) instead")
    source, target = open_beton(Path(config.source)), open_beton(Path(config.target))
    for beton in (source, target):
        beton.labels_for("influence")
    check_influence(config, source.class_sizes, target.class_sizes)
    store = out.with_name(out.name + ".run")
    replaced = out.with_name(f".{store.name}.replaced")
    if force and worker[0] == 0 and store.is_dir():
        if replaced.is_dir() and not concluded(store, out):  # it was itself to replace that, and never came to its end
            shutil.rmtree(store)
        else:
            shutil.rmtree(replaced, ignore_errors=True)
            store.rename(replaced)
            say(f"influence: the models that are there are kept in {replaced} until {out} is written anew")
    declare(store, config, source, target)
    for row in rows_of(config.masks, worker):
        with contextlib.suppress(InUseError):  # another worker has it
            fill(config, source, store, row, world)
    if not conclude(store, config, source, out):
        return False
    shutil.rmtree(replaced, ignore_errors=True)
    return True


def check_influence(config: InfluenceConfig, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
    """Raise UserError where some model cannot be trained or judged; source and target: sizes of their classes."""
    from dp4tl_dist.train.check import check_train, check_transfer

    if len(source) < 2:
        raise UserError(f"{config.source} has one class: there is nothing to tell apart")
    masks = all_masks(config, len(source))
    estimate(masks, np.zeros(config.masks))  # too few masks
    small, smallest = small_config(config, DataConfig()), int((masks * source).sum(axis=1).min())
    check_train(small, small.train, samples=smallest, num_classes=len(source), num_ranks=1)
    optim = config.train
    network = TrainedAt(config.model.arch, optim.resolution, optim.val_resolution, optim.val_ratio)
    check_transfer(probe_config(config).suited(network), network.arch, target, Path(config.target), num_ranks=1)


def fill(config: InfluenceConfig, source: Beton, store: Path, row: int, world: World) -> None:
    """Train and judge one model, unless it is done. InUseError where another process is at it."""
    done, work = row_path(store, row), store / "work" / f"{row:06d}"
    if not done.exists():
        with folder_lock(work):
            if not done.exists():  # another worker may have finished it meanwhile
                mask = draw_mask(source.num_classes, row, seed=config.seed)
                accuracy = measure(config, source, mask, work, world)
                write_json(done, {"row": row, "accuracy": accuracy})
                say(f"influence: model {row}: {100 * accuracy:.2f} %")
    for item in work.glob("*"):  # not the lock, which another worker may be looking at
        shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)


def rows_of(count: int, worker: tuple[int, int]) -> Iterator[int]:
    """All rows, from the start of the worker's own part on and round."""
    index, workers = worker
    first = index * count // workers
    return iter([*range(first, count), *range(first)])


def row_path(store: Path, row: int) -> Path:
    return store / "rows" / f"{row:06d}.json"


def concluded(store: Path, out: Path) -> bool:
    """Whether `out` was written from this store, and not from one before it."""
    try:
        return out.stat().st_mtime_ns >= (store / "store.json").stat().st_mtime_ns
    except OSError:
        return False


def all_masks(config: InfluenceConfig, num_classes: int) -> NDArray[np.bool_]:
    """(masks, classes)"""
    return np.stack([draw_mask(num_classes, row, seed=config.seed) for row in range(config.masks)])


def declare(store: Path, config: InfluenceConfig, source: Beton, target: Beton) -> None:
    """Say what the store is for, or check that it is for this. All workers declare the same."""
    free = {"masks", "source", "target", "num_workers"}  # files count by their content
    content = {
        "kind": "influence-store", "config": config.model_dump(mode="json", exclude=free),
        "inputs": {"source": source.fingerprint, "target": target.fingerprint},
    }  # fmt: skip
    path = store / "store.json"
    if not path.exists():
        write_json(path, content)
    found = read_json(path)
    if found != content:
        differ = [key for key in content if not isinstance(found, dict) or found.get(key) != content[key]]
        raise UserError(f"{store} holds models of another {' and '.join(differ)}: use another --out, or --force")


def measure(config: InfluenceConfig, source: Beton, mask: NDArray[np.bool_], work: Path, world: World) -> float:
    """Train one model on the classes of `mask` (classes,), and judge it on the target: an accuracy as a share of 1."""
    from dp4tl_dist.train.supervised import train

    groups = np.flatnonzero(mask).astype(np.int64)
    indices = samples_of_groups(source.labels, groups)
    meta = make_meta("subset", inputs={"source": source.fingerprint})
    save_subset(work / "subset.npz", Subset(indices, groups, 1 - len(groups) / len(mask), "half", meta))
    data = DataConfig(train=str(source.path), subset=str(work / "subset.npz"), min_scale=config.min_scale,
                      num_workers=config.num_workers)  # fmt: skip
    small = small_config(config, data)
    with contextlib.redirect_stdout(io.StringIO()):  # one line a model is enough
        train(small, out=work / "model", world=world)
        result = _probe(config, work, world)
    return float(result["val_top1"])


def small_config(config: InfluenceConfig, data: DataConfig) -> TrainConfig:
    """How each model is trained."""
    return TrainConfig(seed=config.seed, data=data, model=config.model, train=config.train, engine=config.engine,
                       log=LogConfig(tensorboard=False))  # fmt: skip


def probe_config(config: InfluenceConfig) -> TransferConfig:
    """How each model is judged."""
    # A probe on features that are there has no blocks to compute again.
    engine = {**config.engine.model_dump(mode="json"), "activation_checkpointing": False}
    content: dict[str, Any] = {"seed": config.seed, "val_share": config.val_share, "cached": True, "engine": engine}
    return validate(TransferConfig, recipe("lp", {**content, "train": config.lp}), source="influence.lp")


def _probe(config: InfluenceConfig, work: Path, world: World) -> dict[str, Any]:
    """The result of a linear probe on the target."""
    from dp4tl_dist.transfer import transfer

    # A choice must not know the test set: what counts is the part held out of training.
    return transfer(
        probe_config(config), checkpoint_path=work / "model", train=Path(config.target), test=None,
        out=work / "lp.json", world=world, force=True,
    )  # fmt: skip


def conclude(store: Path, config: InfluenceConfig, source: Beton, out: Path) -> bool:
    """Write the influences where all rows are done; else say how many are."""
    paths = [row_path(store, row) for row in range(config.masks)]
    done = [path for path in paths if path.exists()]
    if len(done) < len(paths):
        say(f"influence: {len(done)} of {len(paths)} models are done; the worker that finishes the last writes {out}")
        return False
    accuracy = np.array([float(read_json(path)["accuracy"]) for path in paths])
    masks = all_masks(config, source.num_classes)
    value, stderr = estimate(masks, accuracy)
    inputs = read_json(store / "store.json")["inputs"]
    meta = make_meta("influence", config=config.model_dump(mode="json"), seed=config.seed, inputs=inputs)
    save_influence(out, Influence(value, stderr, masks, accuracy, meta))
    best, worst = int(np.argmax(value)), int(np.argmin(value))
    say(
        f"{out}: {len(paths)} models; most helpful {source.classes[best]} ({_shown(value, stderr, best)}), "
        f"most harmful {source.classes[worst]} ({_shown(value, stderr, worst)})"
    )
    return True


def _shown(value: NDArray[np.float64], stderr: NDArray[np.float64], index: int) -> str:
    return f"{100 * value[index]:+.2f} +- {100 * stderr[index]:.2f} points"
