#!/usr/bin/env bash
# Every fault between the two jobs, and between a front and its engines, with N seeds (the tests take 10 and 20).
#   ./tests/end_to_end/teacher_faults.sh [N]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
export OMP_NUM_THREADS=1 TEACHER_FAULT_SEEDS="${1:-100}" ENGINE_FAULT_SEEDS="${1:-100}"
"$PYTHON" -m pytest -q tests/unit/test_teacher_faults.py tests/parallel/test_engine_teacher.py -k "not with_our_own"
echo "teacher_faults: verified: with ${1:-100} seeds a fault, every sample was answered once, with its own answer"
