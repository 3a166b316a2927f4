"""F.beton.rows, an npz beside a beton: each sample's checksum and, where they are known, its file's name.

    crc      uint32 (samples,)      in file order; see `checksum`
    names    uint8 (bytes,)         all names, one after another, as UTF-8 with surrogate escapes
    offsets  int64 (samples + 1,)   name i is names[offsets[i]:offsets[i + 1]]; both are left out where no name is known

It is bound to its beton by the fingerprint in its meta, and read only where samples are: stock FFCV and `dp4tl info`
do without.
"""

import functools
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton_format import sidecar
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_output, load_npz, read_json, require_array, save_npz
from dp4tl_dist.log import warn
from dp4tl_dist.revisions import FORMATS

if TYPE_CHECKING:
    from dp4tl_dist.data.beton import Beton

KIND = "rows"
DIFFERS = "its bytes, its label or its identifier are not those that were written (its checksum differs)"


def rows_path(path: Path) -> Path:
    """The file of checksums and names beside a beton."""
    return path.with_name(path.name + ".rows")


def beside(path: Path) -> tuple[Path, Path]:
    """The files that belong to a beton: its sidecar and its rows."""
    return sidecar(path), rows_path(path)


def check_beton_output(path: Path, *, force: bool, inputs: Iterable[Path | str | None] = ()) -> None:
    """`check_output` for a beton and the files beside it. Those that a killed writer left, which places the beton last,
    are no one's; others are refused unless `force`."""
    check_output(path, force=force, inputs=inputs, also=beside(path))
    for item in beside(path):
        if not force and item.exists() and not _was_written(item):
            raise UserError(
                f"{item} exists, belongs to no beton, and would be replaced with {path}: choose another --out or add "
                "--force to replace it"
            )


def _was_written(path: Path) -> bool:
    """Whether a sidecar or a rows file is one that a beton's writer made."""
    try:
        if path.suffix == ".rows":
            return bool(load_npz(path, KIND, only=())[1])
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and content.keys() == {"classes", "meta", "fingerprint"}


def checksum(payload: bytes | memoryview, *, label: int, identifier: int) -> int:
    """The CRC-32 of zlib over 8 bytes of label, 8 bytes of identifier (int64, little-endian) and the payload."""
    return zlib.crc32(payload, zlib.crc32(struct.pack("<qq", label, identifier)))


@dataclass(frozen=True, eq=False)
class Rows:
    """The checksums of a beton's samples, and which were found to be right."""

    path: Path
    fingerprint: str
    crc: NDArray[np.uint32]
    proved: NDArray[np.bool_]
    """bool (samples,). A sample is checked the first time that a process meets it, for that would cost too much at each
    of them; `forget` where the file was touched."""

    def proves(self, beton: "Beton", position: int, payload: bytes | memoryview) -> bool:
        """Whether these are the payload, label and identifier that were written. Threads may ask at once."""
        if not self.proved[position]:
            label, identifier = int(beton.labels[position]), int(beton.identifiers[position])
            found = checksum(payload, label=label, identifier=identifier)
            self.proved[position] = found == self.crc[position]
        return bool(self.proved[position])

    def forget(self) -> None:
        self.proved[:] = False


def save_rows(path: Path, crc: Sequence[int], names: Sequence[str], *, fingerprint: str) -> None:
    """Write the rows of the beton `path`, atomically. names: one a sample, "" where it is not known."""
    arrays = {"crc": np.array(crc, np.uint32)}
    if any(names):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        arrays["names"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays["offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    save_npz(rows_path(path), arrays, {"kind": KIND, "format": FORMATS[KIND], "fingerprint": fingerprint})


def read_rows(beton: "Beton") -> Rows | None:
    """The rows beside a beton, whichever it was that they were written for; None where there are none.

    A damaged file, or one of another number of samples, is a UserError.
    """
    path = rows_path(beton.path)
    if not path.exists():
        return None
    arrays, meta = load_npz(path, KIND, only=("crc",))
    crc = require_array(path, arrays, "crc", dtype="uint32", ndim=1)
    if len(crc) != beton.num_samples or not isinstance(meta.get("fingerprint"), str):
        raise another(beton, f"{len(crc)} samples, and there are {beton.num_samples}")
    return Rows(path, meta["fingerprint"], crc, np.zeros(len(crc), np.bool_))


def load_rows(beton: "Beton") -> Rows | None:
    """The rows of a beton; None where there are none. A damaged file, or one of another beton, is a UserError."""
    rows = read_rows(beton)
    if rows is not None and rows.fingerprint != beton.fingerprint:
        raise another(beton, rows.fingerprint)
    return rows


def another(beton: "Beton", found: str) -> UserError:
    path = rows_path(beton.path)
    return UserError(
        f"{path} has the checksums of another beton ({found}) than {beton.path} ({beton.fingerprint}): "
        "copy the files that belong together, or remove it to go without checksums"
    )


def read_names(beton: "Beton") -> list[str] | None:
    """The name of each sample's file, in file order, "" where it is not known; None where none is."""
    path = rows_path(beton.path)
    if not path.exists():
        return None
    arrays, _ = load_npz(path, KIND, only=("names", "offsets"))
    if "names" not in arrays:
        return None
    names = require_array(path, arrays, "names", dtype="uint8", ndim=1).tobytes()
    offsets = require_array(path, arrays, "offsets", dtype="int64", ndim=1)
    ends = offsets.tolist()
    if len(ends) != beton.num_samples + 1 or ends[0] or ends[-1] != len(names) or (offsets[1:] < offsets[:-1]).any():
        raise UserError(f"{path}: its offsets do not divide its names among {beton.num_samples} samples: write again")
    return [names[a:b].decode("utf-8", "surrogateescape") for a, b in zip(ends, ends[1:], strict=False)]


def describe_sample(beton: "Beton", position: int, names: list[str] | None) -> str:
    """Where a sample is, for people: its position, its identifier and its file's name where that is known."""
    name = f", {names[position]}" if names and names[position] else ""
    return f"position {position} (identifier {beton.identifiers[position]}{name})"


@functools.cache
def warn_unchecked(path: Path) -> None:
    """Say, once in a process, that a beton has no checksums."""
    warn(
        f"{path} has no checksums ({rows_path(path).name}), so damage that leaves an image decodable goes unnoticed: "
        "`dp4tl write` and `dp4tl compact` make them"
    )
