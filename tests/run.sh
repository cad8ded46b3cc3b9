#!/usr/bin/env bash
# All tests: creates .venv when missing, installs what they need, checks the form of the code, runs them.
#   ./tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
ensure_packages requirements-test.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
"$PYTHON" tools/benchmark/real_inputs.py  # tokenizers and texts of the parity tests, once
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # multi-process tests fork from the test process: one thread each
[ $# = 0 ] || exec "$PYTHON" -m pytest "$@"
"$PYTHON" -m mypy
# In the order of the folders: the longest files come first.
exec "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
