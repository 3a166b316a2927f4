"""The wheels of a folder as one archive, less what is in them that this project never uses.

    python launch/bundle_pack.py WHEELS FOLDER [PACKAGE ...]        (launch/bundle.sh calls it)

Compressed one by one, as wheels are, they take half as much again: so they go uncompressed into one .tar.xz. Wheels of
more than `BIG` bytes (torch, CUDA) are moved as they are: it would take an hour, and gain little. No wheel in FOLDER
asks for one of the PACKAGEs any more.
"""

import base64
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

BIG = 80_000_000
ARCHIVE = "wheels.tar.xz"
# Machine code for the most part, hence x86's filter, and lc=4, pb=0: instructions have no alignment.
FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0},
]
# By package, what goes: pages of TensorBoard's viewer (its files are written without), compiled twins of fontTools'
# Python modules, tests and examples.
UNUSED = {
    "fonttools": ("fontTools/*.so", "fontTools/*.c"),
    "llvmlite": ("llvmlite/tests/*",),
    "matplotlib": ("matplotlib/mpl-data/sample_data/*",),
    "numba": ("numba/*/tests/*",),
    "tensorboard": ("tensorboard/webfiles.zip", "*/tf_projector_plugin/*"),
}
# Its symbol table is a tenth of the largest wheel, and serves debuggers alone.
STRIPPED = ("llvmlite/binding/libllvmlite.so",)


def record_line(name: str, content: bytes) -> str:
    """The line of a wheel's RECORD for one file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    quoted = f'"{name}"' if "," in name else name
    return f"{quoted},sha256={digest},{len(content)}\n"


def stripped(library: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(library)
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()  # by its name: strip may put another file there


def without_requirements(metadata: bytes, packages: list[str]) -> bytes:
    """A METADATA that does not ask for `packages`."""
    names = "|".join(re.sub(r"[-_.]+", "[-_.]+", name) for name in packages)
    return re.sub(rf"(?mi)^Requires-Dist: ({names})\b(?![-_.]).*\n".encode(), b"", metadata) if packages else metadata


def repack(wheel: Path, target: Path, unneeded: list[str]) -> None:
    """Write `wheel` uncompressed to `target`, less its unused files, its RECORD telling what is left."""
    patterns = UNUSED.get(wheel.name.partition("-")[0].lower(), ())
    record = ""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as archive:
        for info in sorted(source.infolist(), key=lambda info: info.filename):
            name = info.filename
            if info.is_dir() or any(fnmatch(name, pattern) for pattern in patterns):
                continue
            content = source.read(info)
            if name in STRIPPED:
                content = stripped(content)
            if fnmatch(name, "*.dist-info/METADATA"):
                content = without_requirements(content, unneeded)
            if fnmatch(name, "*.dist-info/RECORD") and name.count("/") == 1:
                own = info
                continue
            record += record_line(name, content)
            archive.writestr(info, content, zipfile.ZIP_STORED)
        archive.writestr(own, f"{record}{own.filename},,\n", zipfile.ZIP_STORED)


def main(wheels: Path, folder: Path, unneeded: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory(dir=wheels) as scratch,
        lzma.open(folder / ARCHIVE, "wb", filters=FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for wheel in sorted(wheels.glob("*.whl")):
            if wheel.stat().st_size > BIG:
                shutil.move(wheel, folder)
                continue
            smaller = Path(scratch) / wheel.name
            repack(wheel, smaller, unneeded)
            archive.add(smaller, wheel.name, filter=anonymous)
            smaller.unlink()


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same archive from the same wheels, whoever makes it."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
