"""Whose a training's folder is, and what `--force` does with the run that is there: it is set aside until the one that
replaces it is complete."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dp4tl_dist.data.losses import NAME
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import LOCK, folder_lock, keep_inputs
from dp4tl_dist.inputs import check_replaceable
from dp4tl_dist.log import say
from dp4tl_dist.train.checkpoint import resolve
from dp4tl_dist.train.loss_log import WORKING
from dp4tl_dist.train.owner import OWNER

OWN = ("checkpoints", "metrics.jsonl", "order.jsonl", "config.json", OWNER, NAME, WORKING)
"""What a run leaves in its folder, beside TensorBoard's files."""
REPLACED = ".replaced"
"""In a run's folder: the run that this one is to replace, until it is complete."""
MOVING = ".replaced.moving"
"""The same while its files are moved there."""


@contextlib.contextmanager
def claimed(out: Path, *, force: bool, inputs: Sequence[str] = ()) -> Iterator[None]:
    """Hold a run folder for this process: a run's own (to go on), an empty one, or with `force` any.

    Called once all inputs are known to be good, so that a refused run leaves no folder behind. The run that `force`
    replaces is removed when the block ends without an error.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out names the run's folder")
    items = [item.name for item in out.iterdir()] if out.is_dir() else []
    # What a run leaves that ended before its first line and its first checkpoint is its own as well: it had the lock.
    own = (*OWN, "tensorboard") if LOCK in items else ("tensorboard",)
    foreign = [name for name in items if not name.startswith(".") and name not in own]
    run = any(name in items for name in ("checkpoints", "metrics.jsonl", MOVING))
    if foreign and not run and not force:
        raise UserError(f"{out} is not empty and holds no run: choose another --out, or --force to use it")
    for name in OWN:
        check_replaceable(out / name, "a folder" if name == "checkpoints" else "a file")
    if force:
        keep_inputs([out / name for name in (*OWN, REPLACED)], inputs)
    with folder_lock(out):
        _put_back(out)
        if force:
            set_aside(out)
        yield
        shutil.rmtree(out / REPLACED, ignore_errors=True)


def set_aside(out: Path) -> None:
    """Put the run of a folder where it stays until the one that replaces it is complete.

    One that was itself to replace another, and never came to its end, is removed: the other one stays.
    """
    there = [out / name for name in OWN if (out / name).exists()]
    replaced = out / REPLACED
    if replaced.is_dir() and not _is_complete(out):
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if not there:
        return
    (out / MOVING).mkdir()
    for path in there:
        path.rename(out / MOVING / path.name)
    shutil.rmtree(replaced, ignore_errors=True)
    (out / MOVING).rename(replaced)
    say(f"{out}: the run that is there is kept in {replaced} until the one that replaces it is complete")


def _put_back(out: Path) -> None:
    """Undo a setting aside that was cut off."""
    moving = out / MOVING
    if moving.is_dir():
        for path in moving.iterdir():
            path.rename(out / path.name)
        moving.rmdir()


def _is_complete(out: Path) -> bool:
    try:
        return bool(resolve(out))
    except UserError:
        return False
