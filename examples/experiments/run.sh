#!/usr/bin/env bash
# The study: creates .venv if missing, installs packages, does all missing runs, writes report.md.
#   ./examples/experiments/run.sh [--parts a,b] [--jobs 2] [--report-only] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
ensure_packages examples/real_weights/requirements.txt
exec "$PYTHON" examples/experiments/run.py "$@"
