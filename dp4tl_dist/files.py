"""Self-describing files: written atomically, carrying `meta`, checked against their inputs when they are loaded.

Nothing here unpickles. Arrays travel as npz with `allow_pickle=False`, everything else as JSON.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import shlex
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist import __version__
from dp4tl_dist.errors import InUseError, UserError
from dp4tl_dist.inputs import check_plain, open_plain, read_text
from dp4tl_dist.machine import hardware
from dp4tl_dist.nodes import life
from dp4tl_dist.revisions import FORMATS, check_format
from dp4tl_dist.version import commit

MAX_JSON_BYTES = 64 << 20
MAX_ARRAY_BYTES = 64 << 30


# ---------------------------------------------------------------- atomic writes


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists (unless `force`) or whose folder cannot be made or written."""
    if path.exists() and not force:
        raise UserError(f"{path} exists: choose another --out or add --force to replace it")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out") from error
    probe = folder / f".{path.name}.{secrets.token_hex(4)}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): choose another --out") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success fsync it and rename it to `path`, otherwise remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise UserError(f"cannot write {path} ({error.strerror}): free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):  # on a read-only file system even removing what is not there is an error
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_file` for a folder: complete or absent. An older folder of that name is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for item in temporary.iterdir():
            with open(item, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The kernel drops the lock when the process ends, however it ends.

    An earlier life of this same job does not keep it: SLURM gave up the node that it may still run on, and whoever
    writes there looks for a successor first (train/owner.py).
    """
    own = life(os.environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): choose another --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            job, _, restarts = handle.read(100).partition(".")
            if not own or job != own.partition(".")[0] or int(restarts) >= int(own.partition(".")[2]):
                raise InUseError(f"{folder} is in use by another run: wait for it or choose another --out") from error
        handle.truncate(0)
        handle.write(own)
        handle.flush()
        yield


# ---------------------------------------------------------------- JSON


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. A missing, oversized or malformed one is a UserError."""
    try:
        return json.loads(read_text(path, limit=MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON ({error}): write it again") from error


# ---------------------------------------------------------------- meta and fingerprints


def make_meta(
    kind: str, *, config: Any = None, seed: int | None = None, inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What every artefact carries. `inputs` maps the name of each input to its fingerprint."""
    return {
        "kind": kind,
        **({"format": FORMATS[kind]} if kind in FORMATS else {}),
        "version": __version__,
        "commit": commit(),
        "command": shlex.join(["dp4tl", *sys.argv[1:]]),
        "config": config,
        "seed": seed,
        "inputs": dict(inputs or {}),
        "hardware": hardware(),
    }


def digest_file(path: Path) -> str:
    """blake2b of a whole file, as hex."""
    digest = hashlib.blake2b(digest_size=16)
    with open_plain(path) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_fingerprint(what: str, expected: str | None, actual: str, *, expected_from: Path, actual_from: Path) -> None:
    """Refuse `actual_from` where `expected_from` was made for another file, naming both sides."""
    if expected != actual:
        raise UserError(
            f"{expected_from} was made for another {what} ({expected or 'unknown'}) than {actual_from} ({actual}): "
            f"make it again from {actual_from}, or pass the {what} it was made for"
        )


# ---------------------------------------------------------------- npz


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write arrays and meta as one npz, atomically. The same content gives the same bytes."""
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, meta=np.array(json.dumps(meta, sort_keys=True)), **arrays)  # type: ignore[arg-type]


def load_npz(
    path: Path, kind: str, *, only: Collection[str] | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays (`only` those of these names) and the meta of an npz of that `kind`. Anything else is a UserError;
    sizes are checked first."""
    if not path.exists():
        raise UserError(f"{path} is not there: it should be a {kind} file (.npz)")
    try:
        check_plain(path)
        with zipfile.ZipFile(path) as archive:
            claimed = sum(item.file_size for item in archive.infolist())
            # npz members are stored uncompressed, so a larger claim than the file is a lie.
            if claimed > path.stat().st_size or claimed > MAX_ARRAY_BYTES:
                raise UserError(f"{path} claims {claimed} bytes of arrays, more than the file holds: write it again")
            members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            wanted = members.keys() if only is None else members.keys() & {"meta", *only}
            arrays = {name: _read_member(archive, members[name]) for name in wanted}
        meta = json.loads(str(arrays.pop("meta")))
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds on damaged files; all mean the same here
        raise UserError(f"{path} is not a readable {kind} file ({error or type(error).__name__})") from error
    if not isinstance(meta, dict) or meta.get("kind") != kind:
        found = meta.get("kind") if isinstance(meta, dict) else None
        raise UserError(f"{path} is a {found!r} file, and a {kind!r} file is needed here")
    check_format(path, kind, meta)
    return arrays, meta


def _read_member(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> NDArray[Any]:
    """One array of an npz. Its header is held against the member's size before anything of that size is allocated."""
    with archive.open(item) as member:
        major, _ = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        if math.prod(shape) * dtype.itemsize != item.file_size - member.tell():
            raise ValueError(f"{item.filename} claims {dtype} {shape}, which is not what it holds")
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False)


def require_array(path: Path, arrays: Mapping[str, NDArray[Any]], name: str, *, dtype: str, ndim: int) -> NDArray[Any]:
    """The array of that name, dtype and rank, or a UserError that says what is there instead."""
    if name not in arrays:
        raise UserError(f"{path} has no array {name!r} (it has {', '.join(sorted(arrays)) or 'none'}): write it again")
    array = arrays[name]
    if array.dtype != np.dtype(dtype) or array.ndim != ndim:
        raise UserError(
            f"{path}: {name!r} is {array.dtype} with {array.ndim} axes, and {dtype} with {ndim} is needed: write again"
        )
    return array
