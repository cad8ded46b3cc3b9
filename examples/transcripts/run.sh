#!/usr/bin/env bash
# A student learns to use a calculator: creates .venv if missing, installs packages, trains, distils, reports.
#   ./examples/transcripts/run.sh [--seed 2] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
exec "$PYTHON" examples/transcripts/run.py "$@"
