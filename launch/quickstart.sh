#!/usr/bin/env bash
# Trains a small Llama-style model on real text twice, in BF16 and in FP8, and writes a report that compares them.
# Makes .venv and installs the package first. Arguments are Hydra overrides: ./launch/quickstart.sh steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_package ""
exec "$venv_python" -m fp8train.compare experiment=quickstart "$@"
