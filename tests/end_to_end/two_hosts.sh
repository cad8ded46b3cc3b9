#!/usr/bin/env bash
# Two hosts, which are two network namespaces joined by a veth pair: a student and a teacher on a host each, then a
# student on both. Needs root and Debian's package iproute2.
#   ./tests/end_to_end/two_hosts.sh
set -euo pipefail
# shellcheck source=tests/end_to_end/own_namespaces.sh
source "$(dirname "$0")/own_namespaces.sh"
cd "$(dirname "$0")/../.."
need_packages iproute2
source tools/environment.sh
ensure_packages requirements-test.txt
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
OMP_NUM_THREADS=1 "$PYTHON" -m tests.end_to_end.two_hosts
