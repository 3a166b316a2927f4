#!/usr/bin/env bash
# The whole path on an embedded dataset, with two ranks on the CPU: set-up first (a few minutes, once), then the run.
# What it leaves: runs/demo. Further arguments go to `dp4tl run`, e.g. --set seeds=[0,1] or --dry-run.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
"$root/launch/setup.sh"
cd -- "$root"
exec .venv/bin/dp4tl run --config demo --out runs/demo --nproc 2 "$@"
