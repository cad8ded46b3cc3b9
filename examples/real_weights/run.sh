#!/usr/bin/env bash
# Real weights: creates .venv if missing, installs packages, fetches two models, distils one into the other.
#   ./examples/real_weights/run.sh [--reverse] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/real_weights/requirements.txt
exec "$PYTHON" examples/real_weights/run.py "$@"
