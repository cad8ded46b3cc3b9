#!/usr/bin/env bash
# Student, two teacher replicas and their launcher under random kills, stops, full disks, cut links and clock jumps, for
# so many hours; every run ends as an undisturbed one. Needs root (a disk of its own) and Debian's package gcc.
#   ./tests/end_to_end/soak.sh HOURS [SEED]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 HOURS [SEED]" >&2; exit 2; }
# shellcheck source=tests/end_to_end/own_namespaces.sh
source "$(dirname "$0")/own_namespaces.sh"
cd "$(dirname "$0")/../.."
need_packages gcc libc6-dev
source tools/environment.sh
ensure_packages requirements-test.txt
gcc -shared -fPIC -O1 -Wall -o "$folder/clock.so" tests/end_to_end/soak_clock.c -ldl
mkdir "$folder/disk"
mount -t tmpfs -o size=96m tmpfs "$folder/disk"
OMP_NUM_THREADS=1 "$PYTHON" -W ignore -m tests.end_to_end.soak "$1" --seed "${2:-1}" --folder "$folder/disk" --logs "$folder"
