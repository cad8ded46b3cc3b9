#!/usr/bin/env bash
# A model teaches itself with hints: creates .venv if missing, installs packages, trains, distils, reports.
#   ./examples/hints/run.sh [--seed 2] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
exec "$PYTHON" examples/hints/run.py "$@"
