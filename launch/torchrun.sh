#!/usr/bin/env bash
# One verb on several ranks of this machine: launch/torchrun.sh [-n NPROC] VERB ARGS...
# NPROC is "gpu" where there are GPUs (one rank each) and 2 elsewhere, unless given.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"

num_ranks=
if [ "${1:-}" = -n ]; then
    num_ranks="${2:-}"
    shift $(($# < 2 ? $# : 2))
    case "$num_ranks" in
        gpu | cpu | auto | [1-9]*) ;;
        *)
            echo "torchrun.sh: -n takes a number of ranks, or gpu" >&2
            exit 2
            ;;
    esac
fi
if [ $# = 0 ]; then
    echo "usage: launch/torchrun.sh [-n NPROC] VERB ARGS...   (the verbs: dp4tl --help)" >&2
    exit 2
fi
if [ -z "$num_ranks" ]; then
    num_ranks="$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else 2)')"
fi
# The ranks share the cores by themselves; torchrun's own default of one thread each would only add a warning.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun ends with 1 whatever its ranks ended with. The first rank to fail leaves its own exit code in this file.
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
export DP4TL_ERROR_FILE="$scratch/error.json"
"$python" -m torch.distributed.run --standalone --nproc-per-node "$num_ranks" -m dp4tl_dist "$@" &
torchrun=$!
# A signal that asks to stop goes on to torchrun as SIGTERM, the one that it hands to every rank.
trap 'kill -TERM "$torchrun" 2>/dev/null || true' TERM INT USR2
status=0
while wait "$torchrun" || status=$?; kill -0 "$torchrun" 2>/dev/null; do status=0; done
if [ -s "$DP4TL_ERROR_FILE" ]; then
    # torchrun's own report is long: say what came first once more, where it is seen.
    "$python" -c 'import json, sys
found = json.load(open(sys.argv[1]))
print("torchrun.sh:", found["message"], file=sys.stderr)
sys.exit(found["code"])' "$DP4TL_ERROR_FILE" || status=$?
fi
exit "$status"
