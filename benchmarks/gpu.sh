#!/usr/bin/env bash
# gpu.sh [FOLDER]: everything that a machine with a GPU should run, within 8 minutes; results and logs go to FOLDER
# (default: $OUT, else benchmarks/results/gpu-DATE). Without a GPU the same runs on the CPU, small, as a trial.
#
# BUDGET=480 is the seconds in all: what does not fit any more is skipped, and says so. RECORD=1 also writes records.
set -uo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root" || exit 1
out="${1:-${OUT:-benchmarks/results/gpu-$(date -u +%F)}}"
budget="${BUDGET:-480}"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
record=()
[ "${RECORD:-0}" = 1 ] && record=(--record)
mkdir -p "$out" || exit 1
failed=0

# step NAME SECONDS COMMAND...: its output to FOLDER/NAME.txt; at most SECONDS, and never past the budget.
step() {
    local name="$1" limit="$2" left=$((budget - SECONDS)) begun="$SECONDS" status=0
    shift 2
    if [ "$left" -lt 20 ]; then
        printf '%-12s skipped: %d s of %d s are left\n' "$name" "$left" "$budget" | tee -a "$out/summary.txt"
        return
    fi
    [ "$limit" -le "$left" ] || limit="$left"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    case "$status" in
        0) status=done ;;
        124 | 137) status="cut off after $limit s" && failed=1 ;;
        *) status="failed ($status): see $name.txt" && failed=1 ;;
    esac
    printf '%-12s %4d s  %s\n' "$name" $((SECONDS - begun)) "$status" | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA" if torch.cuda.is_available() else "no CUDA")' \
    2>&1 | tee -a "$out/summary.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || rm -f "$out/nvidia-smi.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || rm -f "$out/commit.txt"

step doctor 60 "$python" -m dp4tl_dist doctor
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    step tests 150 "$python" -m pytest -q -m gpu tests/gpu
    # The paper's source model first, with every setting and engine; then the other networks against the peer alone.
    step variants 150 "$python" benchmarks/train_step.py --points resnet101@192x256 --runs 3 --steps 10 "${record[@]}"
    step networks 150 "$python" benchmarks/train_step.py --points resnet18@160x1024 resnet50@224x256 resnet101@160x256 \
        --variants dp4tl reference --engines --runs 3 --steps 10
    step project 100 "$python" benchmarks/speedup.py --project imagenet "${record[@]}"
    step speedup 100 "$python" benchmarks/speedup.py "${record[@]}"
else
    echo "no GPU: a trial on the CPU" | tee -a "$out/summary.txt"
    step tests 60 "$python" -m pytest -q -m gpu tests/gpu
    step variants 200 "$python" benchmarks/train_step.py --points resnet_tiny@32x16 --runs 2 --steps 1 --ranks 1
    step order 60 "$python" benchmarks/order.py --samples 10000 --batch-size 64 --runs 2 --without ffcv
fi
echo "results: $out"
exit "$failed"
