"""Files and folders that are complete or absent, and what a writer leaves that was killed: nothing, once it runs again.

A writer holds a lock on its temporary for as long as it lives. Whoever writes the same output next removes those that
nobody holds. A lock need not reach other machines, so one of another machine is left alone until it is a day old.
"""

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dp4tl_dist.errors import UserError
from dp4tl_dist.inputs import check_replaceable

NODE = f"{zlib.crc32(socket.gethostname().encode()):08x}"
TEMPORARY = re.compile(r"\.([0-9a-f]{8})[0-9a-f]{8}\.tmp")
OF_ANOTHER_NODE_S = 24 * 3600.0


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary beside `path`; on success fsync it and rename it to `path`, otherwise remove it.

    What earlier writers of `path` left is removed first. UserError where it cannot be written, or what is there is no
    file.
    """
    with atomic_files([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `atomic_file` for files that belong together: all are written before the first takes its place.

    Whenever the process ends, no old one lies beside a new one: the first is the old or the new one, and the others are
    absent until it is the new one.
    """
    for path in paths:
        check_replaceable(path)
    try:
        with contextlib.ExitStack() as held:
            temporaries = [held.enter_context(_held(path, folder=False)) for path in paths]
            yield temporaries
            for temporary in temporaries:
                with open(temporary, "rb") as handle:
                    os.fsync(handle.fileno())
            _take_places(paths, temporaries)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise UserError(
            f"cannot write {paths[0]} ({error.strerror}): free some space or choose another place"
        ) from error


def _take_places(paths: Sequence[Path], temporaries: Sequence[Path]) -> None:
    """The steps are made durable in their order, for a machine that stops may keep a later rename and lose an older."""
    for path in paths[1:]:
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
    for path, temporary in zip(paths, temporaries, strict=True):
        temporary.replace(path)
        fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_file` for a folder; OSError where it cannot be written, UserError where what is there is no folder.
    An older folder of that name is removed once the new one is in its place."""
    check_replaceable(path, "a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path, folder=True) as temporary:
        yield temporary
        for item in temporary.iterdir():
            with open(item, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temporary)
        old = _temporary(path)
        if path.exists():
            path.rename(old)
        temporary.replace(path)
        fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what writers of `path` left that were killed; what a living one holds stays."""
    for item in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = TEMPORARY.fullmatch(item.name.removeprefix(f".{path.name}"))
        if found and _abandoned(item, found[1]):
            _remove(item)


def check_writable(folder: Path) -> None:
    """OSError where no file can be made in `folder`. Leaves none, however this ends."""
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _held(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new temporary of `path`, held for the block; removed after it, unless it was renamed."""
    sweep(path)
    temporary, handle = _make(path, folder=folder)
    try:
        yield temporary
    finally:
        os.close(handle)
        _remove(temporary)


def _make(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new temporary, and the handle that holds its lock."""
    while True:
        temporary = _temporary(path)
        if folder:
            temporary.mkdir()
            handle = os.open(temporary, os.O_RDONLY)
        else:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # some file systems know no locks: then nobody takes it for abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # swept away between its making and its lock: make another
            if os.path.samestat(temporary.stat(), os.fstat(handle)):
                return temporary, handle
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{NODE}{secrets.token_hex(4)}.tmp")


def _abandoned(item: Path, node: str) -> bool:
    """Whether nobody writes a temporary any more."""
    try:
        handle = os.open(item, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return node == NODE or time.time() - os.fstat(handle).st_mtime > OF_ANOTHER_NODE_S
        finally:
            os.close(handle)
    except OSError:  # it is held, or it is gone
        return False


def _remove(item: Path) -> None:
    if item.is_dir():
        shutil.rmtree(item, ignore_errors=True)
        return
    with contextlib.suppress(OSError):  # on a read-only file system even removing what is not there is an error
        item.unlink()
