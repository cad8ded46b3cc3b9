#!/usr/bin/env bash
# A student and a teacher on two hosts: two network namespaces joined by a veth pair, each with its own torchrun. Root only.
#   ./tests/end_to_end/two_hosts.sh [--steps N] [--cut-s SECONDS]
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "$(id -u)" -ne 0 ] || ! command -v ip > /dev/null; then
    echo "two_hosts: skipped: it needs root and iproute2 to make network namespaces"
    exit 0
fi
source tools/environment.sh
ensure_packages requirements-test.txt
OMP_NUM_THREADS=1 exec "$PYTHON" -m tests.end_to_end.two_hosts "$@"
