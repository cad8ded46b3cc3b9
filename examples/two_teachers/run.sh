#!/usr/bin/env bash
# Two teachers, each for its own rows: creates .venv when missing, installs what it needs, trains, distils, reports.
#   ./examples/two_teachers/run.sh [--seed 2] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
exec "$PYTHON" examples/two_teachers/run.py "$@"
