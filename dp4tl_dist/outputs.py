"""How a stage's outputs take their place: made beside it, and swapped in once they are complete.

What is finished is never removed before its replacement is there. An unfinished try keeps the key that it was made
under; it is gone on with under that key alone, and put aside while the stage is tried under another one.
"""

import glob
import os
import shutil
from pathlib import Path

from dp4tl_dist.atomic import fsync_folder
from dp4tl_dist.errors import UserError
from dp4tl_dist.inputs import check_replaceable
from dp4tl_dist.stage import Stage

KEY = ".key"


def has_try(stage: Stage, key: str) -> bool:
    """Whether an unfinished try of the stage under this key can be gone on with."""
    return key_of(stage.beside) == key or put_aside(stage, key).is_dir()


def open_beside(stage: Stage, key: str) -> None:
    """Make the folder that the stage works in, or find it as the last try under this key left it.

    A file that the try had made is removed, as a verb refuses to replace one; a folder is continued. UserError where
    nothing can be written.
    """
    beside = stage.beside
    try:
        if beside.exists() and (other := key_of(beside)) != key:
            shutil.rmtree(put_aside(stage, other), ignore_errors=True)
            beside.rename(put_aside(stage, other))
        if not beside.exists() and put_aside(stage, key).exists():
            put_aside(stage, key).rename(beside)
        beside.mkdir(parents=True, exist_ok=True)
        if key_of(beside) != key:
            (beside / KEY).write_text(key)
        for path in map(stage.unfinished, stage.outputs):
            if path.is_file() or path.is_symlink():
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {beside} ({error.strerror}): free some space or choose another --out") from error


def take_place(stage: Stage) -> None:
    """Move what is in the stage's folder to where it belongs. Cut off at any point, it goes on where it stood."""
    if not stage.beside.is_dir():
        return
    for new in sorted(stage.beside.iterdir()):
        if new.name.startswith("."):
            continue
        place = stage.output.with_name(new.name)
        if place.is_dir() or (place.exists() and new.is_dir()):  # only a file is replaced by a single rename
            old = replaced(place)
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        new.replace(place)
    fsync_folder(stage.output.parent)


def tidy(stage: Stage, key: str) -> None:
    """Remove what swapping leaves of a stage that is done under `key`. A try under another key stays."""
    for place in places(stage):
        old = replaced(place)
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if key_of(stage.beside) == key:
        shutil.rmtree(stage.beside)


def forget_tries(stage: Stage) -> None:
    """Remove the tries that were put aside: the stage has finished since."""
    for old in stage.output.parent.glob(f".{glob.escape(stage.output.name)}.*.new"):
        shutil.rmtree(old, ignore_errors=True)


def places(stage: Stage) -> list[Path]:
    """All that a stage may leave: its outputs, and the folder that `transfer` and `influence` work in."""
    inside = [path for path in stage.also if path.is_relative_to(stage.output)]
    return [*(path for path in stage.outputs if path not in inside), stage.output.with_name(f"{stage.output.name}.run")]


def refuse_links(stage: Stage) -> None:
    """UserError where a link, which leads to what this run did not make, a FIFO or a device is in an output's place."""
    for path in places(stage):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, and {stage.name} has to replace it: remove the link first")
        check_replaceable(path, "a file", "a folder")


def refuse_foreign(stage: Stage) -> None:
    """Refuse what lies in the place of a stage's outputs though the stage never made any: UserError."""
    found = next((path for path in places(stage) if os.path.lexists(path)), None)
    if found:
        raise UserError(
            f"{found} was not made by this run ({stage.name} has never finished here): move it away, or choose another "
            "--out"
        )


def key_of(folder: Path) -> str:
    """The key that a folder beside was made under; empty where that is not known."""
    try:
        return (folder / KEY).read_text()
    except (OSError, ValueError):
        return ""


def put_aside(stage: Stage, key: str) -> Path:
    """Where a try under `key` waits while the stage is tried under another one."""
    return stage.output.with_name(f".{stage.output.name}.{key[:16] or 'unknown'}.new")


def replaced(place: Path) -> Path:
    """Where a folder is for the moment in which another one takes its place."""
    return place.with_name(f".{place.name}.old")
