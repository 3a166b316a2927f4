#!/usr/bin/env bash
# Makes this checkout ready to run: the system libraries that FFCV is built with, a .venv, the pinned Python packages,
# and the project itself. Run it again at any time: it does only what is missing. PYTHON=... chooses the interpreter.
# With --offline FOLDER: from what launch/bundle.sh put there, with no network, root or compiler.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python_of_venv="$venv/bin/python"
lock="$root/launch/requirements.txt"
scratch="$root/.cache/setup"
log="$scratch/setup.log"
export HOME="${HOME:-$root/.cache}" PIP_DISABLE_PIP_VERSION_CHECK=1 UV_PYTHON_DOWNLOADS=never

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'setup: %s\n' "$1" >&2
    exit "${2:-1}"
}

# run TITLE COMMAND...: the command's output goes to the log, whose end is shown when it fails.
run() {
    say "$1"
    shift
    beat &
    beat=$!
    local status=0
    "$@" </dev/null >>"$log" 2>&1 9>&- || status=$?
    stop_beat
    if [ "$status" != 0 ]; then
        tail -n 20 "$log" >&2
        return "$status"
    fi
}
beat() {
    # Not holding the pipes of the caller, who would wait for this sleep's end otherwise.
    while sleep 15 >/dev/null 2>&1 9>&-; do
        if [ -d "$venv" ]; then
            say "  ... $(du -shc "$venv" "$scratch" 2>/dev/null | tail -n 1 | cut -f 1) so far"
        else
            say "  ... still at it"
        fi
    done
}
stop_beat() {
    if [ -n "${beat:-}" ]; then
        kill "$beat" 2>/dev/null || true
        wait "$beat" 2>/dev/null || true
        beat=
    fi
}
trap stop_beat EXIT

# ------------------------------------------------------------------------------------------ what there is

# The minor version that $1 runs as ("3.11"), or nothing.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# The first interpreter that is new enough; 3.10 to 3.13 are tested, a newer one is the last resort.
find_python() {
    local name version newer=
    if [ -n "${PYTHON:-}" ]; then
        version="$(version_of "$PYTHON")"
        [ -n "$version" ] || die "PYTHON=$PYTHON does not run: name a Python >= 3.10" 2
    fi
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        version="$(version_of "$name")"
        case "$version" in
            3.1[0-3]) base_of "$name" && return ;;
            3.1[4-9] | 3.[2-9][0-9]) newer="${newer:-$name}" ;;
        esac
        if [ -n "${PYTHON:-}" ]; then
            [ -n "$newer" ] || die "PYTHON=$PYTHON is Python $version: 3.10 or newer is needed" 2
            break
        fi
    done
    if [ -n "$newer" ]; then base_of "$newer"; fi
}
# The interpreter behind a shim or a virtual environment (perhaps the one that is about to be remade).
base_of() { "$1" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'; }

python_has_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

# The folder that holds opencv2/core.hpp and opencv2/imgproc.hpp, where the compiler looks.
opencv_headers() {
    local folder
    while read -r folder; do
        if [ -e "$folder/opencv4/opencv2/imgproc.hpp" ]; then
            printf '%s\n' "$folder/opencv4"
            return
        fi
    done < <(c++ -E -v -x c++ /dev/null 2>&1 | sed -n 's/^ \(\/.*\)$/\1/p')
}

# Fills `python` and `missing` (names of `packages`).
look() {
    missing=()
    python="$(find_python)"
    if [ -z "$python" ]; then
        missing+=(python)
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(venv)
        python_has_headers "$python" || missing+=(headers)
    fi
    command -v c++ >/dev/null || missing+=(compiler)
    command -v pkg-config >/dev/null || missing+=(pkgconfig)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(turbojpeg)
    pkg-config --exists opencv4 2>/dev/null || [ -n "$(opencv_headers)" ] || missing+=(opencv)
}

# packages apt|dnf|conda: what the missing parts are called there.
packages() {
    local part of=python3 names=()
    if [[ "$python" == /usr/bin/* && "$(version_of "$python")" != "$(version_of /usr/bin/python3)" ]]; then
        of="python$(version_of "$python")"
    fi
    for part in "${missing[@]}"; do
        case "$1-$part" in
            apt-python) names+=(python3 python3-venv python3-dev) ;;
            apt-venv) names+=("$of-venv") ;;
            apt-headers) names+=("$of-dev") ;;
            apt-compiler) names+=(g++) ;;
            apt-pkgconfig) names+=(pkg-config) ;;
            apt-turbojpeg) names+=(libturbojpeg0-dev) ;;
            apt-opencv) names+=(libopencv-imgproc-dev) ;;
            dnf-python) names+=(python3.12 python3.12-devel) ;;
            dnf-venv) names+=("$of") ;;
            dnf-headers) names+=("$of-devel") ;;
            dnf-compiler) names+=(gcc-c++) ;;
            dnf-pkgconfig) names+=(pkgconf-pkg-config) ;;
            dnf-turbojpeg) names+=(turbojpeg-devel) ;;
            dnf-opencv) names+=(opencv-devel) ;;
            conda-python | conda-venv | conda-headers) names+=(python=3.12) ;;
            conda-compiler) names+=(cxx-compiler) ;;
            conda-pkgconfig) names+=(pkg-config) ;;
            conda-turbojpeg) names+=(libjpeg-turbo) ;;
            conda-opencv) names+=(opencv) ;;
        esac
    done
    printf '%s\n' "${names[@]}" | sort -u | paste -sd ' ' -
}

# ------------------------------------------------------------------------------------------ what is done

install_system_packages() {
    local as_root=() names
    look
    if [ ${#missing[@]} = 0 ]; then return; fi
    if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
    if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
        {
            echo "setup: system packages are missing, and only root can install them here. Ask for these, by your system:"
            echo "  apt-get install $(packages apt)"
            echo "  dnf install $(packages dnf)"
            echo "  conda install -c conda-forge $(packages conda)"
            echo "Then run this again."
        } >&2
        exit 2
    fi
    read -r -a names <<<"$(packages apt)"
    export DEBIAN_FRONTEND=noninteractive
    run "apt-get update" "${as_root[@]}" apt-get update || say "  the package lists could not all be renewed; going on"
    run "apt-get install ${names[*]}" "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${names[@]}" ||
        die "apt-get could not install ${names[*]}: see $log"
    look
    [ ${#missing[@]} = 0 ] || die "still missing after apt-get: ${missing[*]} (Python >= 3.10? set PYTHON=...)" 2
}

# FFCV asks pkg-config for opencv4, which Debian gives only with all of OpenCV (200 packages). It uses core and imgproc
# alone, so where there is no opencv4.pc one that names those two is made, and a list of modules that hides the others.
prepare_ffcv_build() {
    local libraries headers
    export LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}"
    if pkg-config --exists opencv4; then
        libraries="$(pkg-config --variable=libdir opencv4)"
        case "$libraries" in
            "${CONDA_PREFIX:-/nowhere}"/*) LDFLAGS="$LDFLAGS -Wl,-rpath,$libraries" ;;
        esac
        return
    fi
    headers="$(opencv_headers)"
    mkdir -p "$scratch/opencv2"
    printf '#define HAVE_OPENCV_%s\n' CORE IMGPROC >"$scratch/opencv2/opencv_modules.hpp"
    printf '%s\n' 'Name: OpenCV' 'Description: core and imgproc' 'Version: 4' 'Libs: -lopencv_imgproc -lopencv_core' \
        >"$scratch/opencv4.pc"
    export PKG_CONFIG_PATH="$scratch${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
    # Not through the .pc file: FFCV splits what pkg-config says at spaces, which this path may hold.
    export CPLUS_INCLUDE_PATH="$scratch:$headers${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}"
}

make_venv() {
    if [ "$(version_of "$python_of_venv")" != "$(version_of "$python")" ] || [ "$(cat "$venv/.root" 2>/dev/null)" != "$root" ]; then
        run "Python $(version_of "$python") ($python) -> .venv" "$python" -m venv --clear "$venv" ||
            die "$python could not make a virtual environment: see $log"
        printf '%s\n' "$root" >"$venv/.root"
    fi
}

install_python_packages() {
    local uv="$venv/bin/uv" pin index
    pin="$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' "$lock")"
    if [ "$("$uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "${pin#uv==}" ]; then
        sed -n '/^uv==/,/[^\\]$/p' "$lock" >"$scratch/uv.txt" # with its hashes, which go on over lines
        run "$pin" "$python_of_venv" -m pip install --no-cache-dir --no-deps --require-hashes -r "$scratch/uv.txt" ||
            die "pip could not install $pin: check the network, the proxy (HTTPS_PROXY) and pip's index (PIP_INDEX_URL)"
    fi
    # uv does not read pip's settings, and a site's mirror is set there.
    index="${PIP_INDEX_URL:-$("$python_of_venv" -m pip config get global.index-url 2>/dev/null || true)}"
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
    export UV_CACHE_DIR="${UV_CACHE_DIR:-$scratch/uv}"
    local install=("$uv" pip install --python "$python_of_venv" --no-deps)
    if broken_ffcv; then install+=(--reinstall-package ffcv --no-cache); fi
    prepare_ffcv_build
    run "$(grep -c '^[a-z]' "$lock") pinned packages (about 5 GB with CUDA)" \
        "${install[@]}" --compile-bytecode --require-hashes --build-constraints "$lock" -r "$lock" ||
        die "the pinned packages could not be installed: see $log"
    run "dp4tl_dist, editable" "${install[@]}" --no-build-isolation -e "$root" ||
        die "the project could not be installed: see $log"
    run "trying the imports" "$python_of_venv" -c 'import torch, torchvision, ffcv' ||
        die "what was installed does not import: see $log, and ask $venv/bin/dp4tl doctor"
}

# Whether FFCV is there, and built against libraries that this machine does not have (or has no longer).
broken_ffcv() {
    local libraries
    libraries="$(ldd "$venv"/lib/python3.*/site-packages/ffcv/_libffcv*.so 2>/dev/null)" || return 1
    [[ "$libraries" == *"not found"* ]]
}

# Changes whenever a set-up has something to do.
stamp() {
    {
        echo "$root $("$python_of_venv" -V 2>&1)"
        cat "$root/launch/setup.sh" "$lock" "$root/setup.cfg"
    } | sha256sum
}
is_ready() {
    [ -x "$python_of_venv" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$(stamp)" ] && ! broken_ffcv &&
        { [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$python_of_venv")" ]; }
}

# setup.sh --offline FOLDER: from launch/bundle.sh's wheels alone, most of which are in one archive.
install_offline() {
    local folder="$1" wanted without lacks options=() wheels=()
    [ -f "$folder/PYTHON" ] || die "--offline takes a folder that launch/bundle.sh made, and $folder is none" 2
    wanted="$(cat "$folder/PYTHON")" without="$(cat "$folder/WITHOUT")"
    python="$(PYTHON="${PYTHON:-python$wanted}" find_python)" || die "there is no python$wanted here: set PYTHON=..." 2
    [ "$(version_of "$python")" = "$wanted" ] || die "$folder is for Python $wanted, and $python is $(version_of "$python")" 2
    "$python" -c 'import lzma' 2>/dev/null || die "$python cannot read .xz (it was built without lzma): set PYTHON=..." 2
    if [ -n "$without" ]; then options+=(--system-site-packages); fi
    run "Python $wanted ($python) -> .venv" "$python" -m venv --clear ${options[@]+"${options[@]}"} "$venv" ||
        die "$python could not make a virtual environment: see $log"
    trap 'stop_beat; rm -rf "$scratch/wheels"' EXIT
    rm -rf "$scratch/wheels"
    run "unpacking $folder" "$python" -W ignore -m tarfile -e "$folder/wheels.tar.xz" "$scratch/wheels" ||
        die "$folder/wheels.tar.xz could not be unpacked into $scratch: see $log"
    shopt -s nullglob
    wheels=("$scratch/wheels"/*.whl "$folder"/*.whl)
    run "${#wheels[@]} wheels" "$python_of_venv" -m pip install --no-index --no-deps --ignore-installed "${wheels[@]}" ||
        die "the wheels could not be installed: see $log"
    lacks="$(lacking)" || die "the requirements of what was installed could not be read"
    [ -z "$lacks" ] || die "$python lacks what the bundle leaves out (${without:-nothing}): $lacks" 2
    run "trying the imports" "$python_of_venv" -c 'import torch, torchvision, ffcv' ||
        die "what was installed does not import${without:+ (left out: $without; are they whole in $python?)}: see $log"
    say "ready: $venv"
}

# What the packages of .venv require and this Python does not have, or not in that version: "numpy>=2 (it has 1.26.4), ..."
# Once for each, by this project's own wish where it has one.
lacking() {
    "$python_of_venv" - <<'END'
import importlib.metadata
import sysconfig

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

lacks = {}
installed = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
for package in sorted(installed, key=lambda package: canonicalize_name(package.metadata["Name"]) != "dp4tl-dist"):
    for wanted in map(Requirement, package.requires or []):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            try:
                has = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                has = "none"
            # By its base: a vendor's 2.11.0a0 is a 2.11.
            if has == "none" or not wanted.specifier.contains(Version(has).base_version):
                name = canonicalize_name(wanted.name)
                lacks.setdefault(name, f"{name}{wanted.specifier} (it has {has})")
print(", ".join(lacks[name] for name in sorted(lacks)))
END
}

# Python takes modules of the current folder for its own: from here on it is the checkout.
case "${PYTHON:-}" in
    /* | "") ;;
    */*) PYTHON="$PWD/$PYTHON" ;;
esac
bundle="${2:-}"
if [ "${1:-}" = --offline ]; then
    [ -d "$bundle" ] || die "--offline takes the folder that launch/bundle.sh made" 2
    bundle="$(cd -- "$bundle" && pwd -P)"
fi
cd -- "$root"

# One set-up at a time: a second one waits here.
exec 9<"$root/launch/setup.sh"
if command -v flock >/dev/null; then flock 9; fi
if [ "${1:-}" = --offline ]; then
    mkdir -p "$scratch"
    : >"$log"
    install_offline "$bundle"
    exit 0
fi
if is_ready; then
    say "ready: $venv"
    exit 0
fi
mkdir -p "$scratch" 2>/dev/null || die "cannot write in $root: make it yours, or clone into a folder that is" 2
: >"$log"
install_system_packages
make_venv
install_python_packages
stamp >"$venv/.stamp"
rm -rf "$scratch"
rmdir "$root/.cache" 2>/dev/null || true
say "ready: $venv"
