#!/usr/bin/env bash
# Every check of this repository: set-up, lint, format, types, tests. Arguments go to pytest, e.g. tests/data -k order -n 0.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
"$root/launch/setup.sh"
cd -- "$root"
# The tools, torchrun and the ranks that tests start are the ones of .venv, whatever else is on the machine.
export PATH="$root/.venv/bin:$PATH"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
ruff check .
ruff format --check .
mypy
# Tests on a real SLURM, and of the report in a real browser: where root is there to install them, none is skipped.
without() { echo "test.sh: $1: its tests are skipped" >&2; }
cannot=
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then cannot=yes; fi
if ! command -v slurmctld >/dev/null; then
    if [ "$cannot" ]; then
        without "no SLURM here, and only root can install it (with apt-get)"
    else
        LS_DBD=0 ./tests/cluster/local_slurm.sh install || without "SLURM could not be installed"
    fi
fi
if ! command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then
    log="$root/.cache/setup/chromium.log"
    if [ "$cannot" ]; then
        without "no Chromium here, and only root can install it (apt-get install chromium)"
    else
        echo "test.sh: installing chromium" >&2
        mkdir -p "${log%/*}"
        apt-get update </dev/null >"$log" 2>&1 || true # lists of other places may be out of reach
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium </dev/null >>"$log" 2>&1 ||
            without "Chromium could not be installed (see $log)"
    fi
fi
# Two processes share the files, for a half of them waits for something most of the time (-n 0: one).
exec python -m pytest -q -n 2 --no-loadscope-reorder "$@"
