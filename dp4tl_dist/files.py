"""Self-describing files: written atomically, carrying `meta`, checked against their inputs when they are loaded.

Nothing here unpickles. Arrays travel as npz with `allow_pickle=False`, everything else as JSON.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.artifact import check_fingerprint as check_fingerprint
from dp4tl_dist.artifact import make_meta as make_meta
from dp4tl_dist.artifact import unfinished_in as unfinished_in
from dp4tl_dist.atomic import atomic_file, atomic_files, check_writable, sweep
from dp4tl_dist.errors import InUseError, UserError
from dp4tl_dist.inputs import check_plain, check_replaceable, open_plain, read_text
from dp4tl_dist.nodes import life
from dp4tl_dist.revisions import check_format

MAX_JSON_BYTES = 64 << 20
MAX_ARRAY_BYTES = 64 << 30


# ---------------------------------------------------------------- outputs and locks

LOCK = ".lock"
"""The file in a folder that whoever works in it holds. It stays there."""


def check_output(
    path: Path,
    *,
    force: bool,
    inputs: Iterable[Path | str | None] = (),
    also: Iterable[Path] = (),
    folders: Iterable[Path] = (),
) -> None:
    """Refuse an output that exists (unless `force`), that is one of the `inputs`, that is no file, or whose folder
    cannot be made or written; remove what killed writers of it left.

    also, folders: further files that are replaced with it, and folders that are worked in.
    """
    files, folders = [path, *also], list(folders)
    for place in files:
        check_replaceable(place)
    for place in folders:
        check_replaceable(place, "a folder")
    if path.exists() and not force:
        raise UserError(f"{path} exists: choose another --out or add --force to replace it")
    keep_inputs([*files, *folders], inputs)
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out") from error
    try:
        check_writable(folder)
        sweep(path)
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): choose another --out") from error


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path | str | None]) -> None:
    """Refuse an output that is an input, by whatever name, lies in an input, or holds one: replacing it would destroy
    what is read. UserError. What belongs to an input (`companions`) is one as well; inputs that are None, empty or not
    there count as none."""
    given = [Path(path) for path in inputs if path and Path(path).exists()]
    given += [item for path in given for item in companions(path) if item.exists()]
    for output in outputs:
        for path in given if output.exists() else ():
            a, b = output.resolve(), path.resolve()
            if output.samefile(path) or (path.is_dir() and b in a.parents) or (output.is_dir() and a in b.parents):
                raise UserError(f"{output} is an input as well ({path}), and would be replaced: choose another --out")


def companions(path: Path) -> list[Path]:
    """What is read with an input: a beton's classes and checksums, beside the name that was given and beside what that
    leads to; all files of a checkpoint or of its run, which may be links to elsewhere."""
    if path.is_dir():
        run = (path / "checkpoints").is_dir()
        found = [*path.glob("checkpoints/*/*"), *path.iterdir()] if run else []
        return found if run else list(path.iterdir()) if (path / "meta.json").is_file() else []
    return [name.with_name(name.name + suffix) for name in (path, path.resolve()) for suffix in (".json", ".rows")]


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The kernel drops the lock when the process ends, however it ends.

    An earlier life of this same job does not keep it: SLURM gave up the node that it may still run on, and whoever
    writes there looks for a successor first (train/owner.py).
    """
    own = life(os.environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a+")  # noqa: SIM115 (closed below)
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


# ---------------------------------------------------------------- digests


def digest_file(path: Path) -> str:
    """blake2b of a whole file, as hex."""
    digest = hashlib.blake2b(digest_size=16)
    with open_plain(path) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- npz


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write arrays and meta as one npz, atomically. The same content gives the same bytes."""
    save_npzs({path: (arrays, meta)})


def save_npzs(contents: Mapping[Path, tuple[Mapping[str, NDArray[Any]], Mapping[str, Any]]]) -> None:
    """Like `save_npz` for files that belong together; see `atomic_files`."""
    with atomic_files(list(contents)) as temporaries:
        for temporary, (arrays, meta) in zip(temporaries, contents.values(), strict=True):
            with open(temporary, "wb") as handle:
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
