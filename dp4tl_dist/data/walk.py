"""What lies under a folder of images: one walk for `write` and for the run's key, so that the one follows the other.

Links are followed, and a folder that was met before in the same class is not entered again: loops of links end.
"""

import errno
import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dp4tl_dist.errors import UserError

HIDDEN = "hidden"
SYSTEM = "of the system (@eaDir, Thumbs.db, ...)"
SPECIAL = "pipes, sockets or devices"
MET_BEFORE = "folders met before by another link"
SYSTEM_NAMES = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "lost+found",
     "system volume information", "thumbs.db"}
)  # fmt: skip

Place = tuple[int, int]
"""A folder's device and inode: what stays the same by whatever links it is reached."""


class Found(NamedTuple):
    path: Path
    """As it was reached; links are not resolved."""
    status: os.stat_result | None
    """Of the regular file that it leads to; None where it leads nowhere."""
    fault: str
    """Why it leads nowhere, in words."""


@dataclass(frozen=True)
class Tree:
    """A folder of class folders, unjudged."""

    loose: list[Found]
    """The files of the folder itself, by name."""
    folders: dict[str, list[Found]]
    """The files under each folder in it, by path; folders by name."""
    left_out: Counter[str]
    """How many names were left out, by reason."""


def scan(images: Path) -> Tree:
    """All files below `images`. Nothing but folders is opened. Raises UserError for a folder that cannot be read."""
    above = {_place(path.stat()) for path in (images.resolve(), *images.resolve().parents)}
    left_out: Counter[str] = Counter()
    loose, tops = _entries(images, left_out)
    folders: dict[str, list[Found]] = {}
    for top, place in tops:
        if place in above:
            left_out[MET_BEFORE] += 1
        else:
            folders[top.name] = _below(top, place, above, left_out)
    return Tree(loose, folders, left_out)


def _below(top: Path, place: Place, above: set[Place], left_out: Counter[str]) -> list[Found]:
    """The files at any depth, by path. Of two ways to a folder the first by name counts."""
    met, pending, files = set(above), [(top, place)], []
    while pending:
        folder, place = pending.pop()
        if place in met:
            left_out[MET_BEFORE] += 1
            continue
        met.add(place)
        found, deeper = _entries(folder, left_out)
        files += found
        pending += reversed(deeper)
    return sorted(files, key=lambda found: found.path)


def _entries(folder: Path, left_out: Counter[str]) -> tuple[list[Found], list[tuple[Path, Place]]]:
    """Files and folders, each by name."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror}): change its permissions") from error
    files: list[Found] = []
    folders: list[tuple[Path, Place]] = []
    for path in paths:
        name = path.name
        if name.startswith(".") or name.lower() in SYSTEM_NAMES:
            left_out[HIDDEN if name.startswith(".") else SYSTEM] += 1
            continue
        try:
            status = path.stat()
        except OSError as error:
            is_broken = error.errno == errno.ENOENT and path.is_symlink()
            fault = "a broken link" if is_broken else f"{error.strerror or error}"
            files.append(Found(path, None, fault))
            continue
        if stat.S_ISREG(status.st_mode):
            files.append(Found(path, status, ""))
        elif not stat.S_ISDIR(status.st_mode):
            left_out[SPECIAL] += 1
        else:
            folders.append((path, _place(status)))
    return files, folders


def _place(status: os.stat_result) -> Place:
    return status.st_dev, status.st_ino


def listing_digest(images: Path) -> str:
    """A digest of the names, sizes and times of all files that `scan` finds: cheap, and it changes when an image does.

    The time of the last change of a file's inode is among them: no tool that puts the old time of modification back can
    hide an edit, nor can two files of one size that change places. New permissions count as a change, too.
    """
    digest, tree = hashlib.blake2b(digest_size=16), scan(images)
    for name, files in (("", tree.loose), *tree.folders.items()):
        digest.update(os.fsencode(name) + b"\0")
        for found in files:
            status = found.status
            numbers = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}" if status else found.fault
            digest.update(os.fsencode(found.path.relative_to(images)) + f"\0{numbers}\0".encode())
    return digest.hexdigest()
