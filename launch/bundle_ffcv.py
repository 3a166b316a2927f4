"""The FFCV of this environment as one wheel for Python 3.10 to 3.13, with the libraries that it is linked to inside.

    python launch/bundle_ffcv.py FOLDER        (launch/bundle.sh calls it; needs patchelf)

FFCV's C++ part is used through ctypes alone, and its module's one call into Python is of the stable ABI: one build
serves all. What every Linux has (glibc, libstdc++) stays outside. The libraries get names of their own, so that they
meet no other copies in a process. Of OpenCV FFCV calls cv::resize, and never what needs linear algebra or a window: the
libraries for these (with a Fortran runtime and X11, two thirds of all) are stood in for by small ones, whose functions
end the process. FFCV imports cv2 for writing and for its own resizers, which are not used here: that import may fail.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bundle_pack import record_line

SYSTEM = re.compile(r"(linux-vdso|ld-linux.*|libc|libm|libpthread|libdl|librt|libstdc\+\+|libgcc_s)\.so.*")
UNCALLED = re.compile(r"lib((c|open|flexi)?blas|lapacke?|OpenGL|GLX?|EGL|OpenCL|va|va-drm)[.-].*")
STAND_IN = """#include <stdio.h>
#include <stdlib.h>
#define STAND_IN(name) void name(void) { fputs("ffcv: " #name " of LIBRARY is not in this build\\n", stderr); abort(); }
"""
TAG = "cp310-abi3-linux_x86_64"
MARK = "-dp4tl"
CV2 = "import cv2\n"
OPTIONAL_CV2 = "try:\n    import cv2\nexcept ImportError:  # not in this bundle\n    cv2 = None\n"


def linked(library: Path) -> dict[str, Path]:
    """The libraries that the loader finds for `library`, directly or not, by the name that asks for them."""
    text = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    lines = (re.match(r"\s*(\S+) => (\S+) \(", line) for line in text.splitlines())
    found = {line[1]: Path(line[2]) for line in lines if line}
    return {name: path for name, path in found.items() if not SYSTEM.fullmatch(name)}


def own_name(name: str) -> str:
    return name.replace(".so", f"{MARK}.so", 1)


def patchelf(*argv: object) -> None:
    subprocess.run(["patchelf", *(str(item) for item in argv)], check=True)


def symbols(library: Path, which: str) -> set[str]:
    """The names that `library` has "defined", or leaves "undefined" for others to define."""
    argv = ["nm", "--dynamic", "--format=posix", f"--{which}-only", library]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return {line.split()[0].partition("@")[0] for line in text.splitlines()}


def called(module: Path, found: dict[str, Path]) -> dict[str, list[Path]]:
    """What `module` needs, directly or through libraries that it calls, by name: the files that ask for each."""
    users: dict[str, list[Path]] = {}
    todo = [module]
    for library in todo:
        argv = ["patchelf", "--print-needed", library]
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        for name in set(text.split()) & found.keys():
            if name not in users and not UNCALLED.fullmatch(name):
                todo.append(found[name])
            users.setdefault(name, []).append(library)
    return users


def stand_in(library: Path, users: list[Path], target: Path) -> None:
    """Make `target` with the functions of `library` that `users` are linked to, each ending the process."""
    names = set.union(*(symbols(user, "undefined") for user in users)) & symbols(library, "defined")
    source = STAND_IN.replace("LIBRARY", library.name) + "".join(f"STAND_IN({name})\n" for name in sorted(names))
    argv = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(target)]
    subprocess.run(argv, input=source, text=True, check=True)


def enclose(module: Path, libraries: Path) -> None:
    """Copy what `module` calls into `libraries`, and have all of it find each other there."""
    libraries.mkdir()
    found = linked(module)
    users = called(module, found)
    renames = [item for name in users for item in ("--replace-needed", name, own_name(name))]
    for name in users:
        copy = libraries / own_name(name)
        if UNCALLED.fullmatch(name):
            stand_in(found[name], users[name], copy)
        else:
            shutil.copy(found[name], copy)
        copy.chmod(0o755)
        subprocess.run(["strip", "--strip-unneeded", copy], check=True)
        patchelf("--set-soname", own_name(name), *renames, "--set-rpath", "$ORIGIN", copy)
    patchelf(*renames, "--set-rpath", f"$ORIGIN/{os.path.relpath(libraries, module.parent)}", module)


def unpack(folder: Path) -> str:
    """Copy the installed FFCV into `folder`. Returns its version."""
    package = importlib.metadata.distribution("ffcv")
    for file in package.files or []:
        if (
            ".." not in file.parts
            and "__pycache__" not in file.parts
            and file.name not in ("RECORD", "WHEEL", "INSTALLER")
        ):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(package.locate_file(file)), target)
    return package.version


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        version = unpack(root)
        (built,) = root.glob("ffcv/_libffcv*.so")
        module = built.rename(built.with_name("_libffcv.abi3.so"))
        enclose(module, root / "ffcv.libs")
        field = root / "ffcv" / "fields" / "rgb_image.py"
        field.write_text(field.read_text().replace(CV2, OPTIONAL_CV2, 1))
        info = root / f"ffcv-{version}.dist-info"
        for extra in ("direct_url.json", "REQUESTED", "uv_cache.json"):
            (info / extra).unlink(missing_ok=True)
        (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nGenerator: bundle\nRoot-Is-Purelib: false\nTag: {TAG}\n")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        record = ""
        wheel = out / f"ffcv-{version}-{TAG}.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in files:
                content, name = path.read_bytes(), path.relative_to(root).as_posix()
                record += record_line(name, content)
                archive.writestr(name, content)
            archive.writestr(f"{info.name}/RECORD", f"{record}{info.name}/RECORD,,\n")
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
