#!/usr/bin/env bash
# One verb on several ranks of this machine, as torchrun would start them: launch/torchrun.sh [-n NPROC] VERB ARGS...
# NPROC is one for each GPU where there are GPUs and 2 elsewhere, unless given. Ctrl-C and SIGTERM have them save and end.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"

num_ranks=default
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
# Not -m: a module in the current folder would be taken for one of Python's own.
exec "$python" -c 'import sys
sys.path[:] = [path for path in sys.path if path]
from dp4tl_dist.ranks import main
sys.exit(main())' "$num_ranks" "$@"
