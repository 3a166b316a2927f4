"""Files from outside are data: opened only where they are plain files, read only so far, parsed in bounded time.

A FIFO waits for a writer, a device may have no end, and some do something when they are opened.
"""

import errno
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from dp4tl_dist.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
# What Python's parser is given: its time grows with the square of a key's parts and of its tables' depth.
MAX_PARTS, MAX_DEPTH, MAX_ITEMS = 16, 32, 20_000
# Strings and comments, closed or not; what is left are keys, numbers and marks. One or two quotes that a
# long string ends with stand before the three that close it: left over, they would open a string that hides the rest.
TEXT = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"{3,5}|\Z)' + r"|'''.*?(?:'{3,5}|\Z)" + r'|"(?:[^"\\\n]|\\.)*"?' + r"|'[^'\n]*'?|#[^\n]*",
    re.DOTALL,
)
MARK = re.compile(r"[\[\]{}]")
PART = re.compile(r"[=,\[\]{}\n]")


def check_plain(path: Path) -> None:
    """Refuse what is there, but is no plain file; links are followed. Raises OSError for what is not there."""
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind in KINDS:
        raise UserError(f"{path} is {KINDS[kind]}, and a file is needed here")


def check_replaceable(path: Path, *kinds: str) -> None:
    """Refuse an output's place where something else lies than the `kinds` ("a file" where none is named): a rename
    would put a file where a device was, or take a FIFO from its readers. A link counts as what it leads to."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing is there, or the writer tells what keeps it from being looked at
        return
    wanted, kind = kinds or ("a file",), "a file" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no file")
    if kind not in wanted:
        found = f"is a link that leads to {kind}" if path.is_symlink() else f"is {kind}"
        raise UserError(f"{path} {found}, and only {' or '.join(wanted)} is replaced here: choose another --out")


def open_plain(path: Path) -> BinaryIO:
    """`path`, opened for reading. What is no plain file is a UserError, at once; OSError as usual."""
    check_plain(path)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO that took its place is no wait either
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a plain file any more, and one is needed here")
    return os.fdopen(handle, "rb")


def read_plain(path: Path, *, limit: int) -> bytes:
    """All of a plain file of at most `limit` bytes; OSError (EFBIG) where it is longer."""
    with open_plain(path) as file:
        # As much as there is, and a byte more for what grows meanwhile: `read` sets aside all that it is asked for.
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return data


def read_text(path: Path, *, limit: int) -> str:
    """All of a UTF-8 text, with or without a byte order mark. OSError and UnicodeDecodeError as usual."""
    return read_plain(path, limit=limit).decode("utf-8-sig")


def parse_toml(text: str) -> dict[str, Any]:
    """`text` as TOML. ValueError (or RecursionError) where it is not, or has no shape of a config.

    Time is linear in the text's length, and memory too.
    """
    bare = TEXT.sub("_", text)
    _at_most(MAX_ITEMS, sum(bare.count(mark) for mark in "=[{.,"), "keys, tables and values")
    _at_most(MAX_PARTS, max(part.count(".") for part in PART.split(bare)) + 1, "parts of a key")
    depth = deepest = 0
    for mark in MARK.finditer(bare):
        depth = max(0, depth + (1 if mark[0] in "[{" else -1))
        deepest = max(deepest, depth)
    _at_most(MAX_DEPTH, deepest, "levels")
    return tomllib.loads(text)


def _at_most(limit: int, count: int, what: str) -> None:
    if count > limit:
        raise ValueError(f"{count} {what}, and a config has at most {limit}")
