#!/usr/bin/env bash
# The quick start: creates .venv if missing, installs packages, trains, distils, reports.
#   ./examples/quickstart/run.sh [--interface strict] [--seed 2] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
exec "$PYTHON" examples/quickstart/run.py "$@"
