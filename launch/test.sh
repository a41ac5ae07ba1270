#!/usr/bin/env bash
# Checks the sources (ruff, mypy) and runs every test. Makes .venv and installs the package with [dev] first.
# Arguments go to pytest and replace the folder of all tests: ./launch/test.sh tests/quant -k transpose
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_package "[dev]"
cd "$root"
"$venv_python" -m ruff check .
"$venv_python" -m ruff format --check .
"$venv_python" -m mypy

# One single-threaded worker per core, at most 4: threads of two tests on one core slow both many times over.
cores=$(nproc)
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=1
exec "$venv_python" -m pytest -q -n "$workers" --dist worksteal --durations=15 "$@"
