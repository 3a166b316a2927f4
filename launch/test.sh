#!/usr/bin/env bash
# Every check of this repository: set-up, lint, format, types, tests. Arguments go to pytest, e.g. tests/data -k order.
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
# The tests on a real SLURM start one of their own, where root is there to do so.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then
    LS_DBD=0 ./tests/cluster/local_slurm.sh install || echo "test.sh: SLURM could not be installed: its tests are skipped" >&2
fi
exec python -m pytest -q "$@"
