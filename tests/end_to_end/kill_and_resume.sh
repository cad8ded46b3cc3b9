#!/usr/bin/env bash
# kill -9 at N random moments of a tiny run, restarted until it is done: it ends as if nothing had happened.
#   ./tests/end_to_end/kill_and_resume.sh N [--seed S] [--processes P] [FLAG ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
OMP_NUM_THREADS=1 exec "$PYTHON" -m tests.end_to_end.kill_and_resume "$@"
