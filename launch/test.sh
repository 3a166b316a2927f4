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
exec python -m pytest -q "$@"
