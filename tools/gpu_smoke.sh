#!/usr/bin/env bash
# First run on a GPU: what works, how fast, with how much memory. Writes one Markdown table, the most useful steps
# first, and a JSON file for each step. Each step has a time limit; together they end within ten minutes. Nothing is
# downloaded.
#   ./tools/gpu_smoke.sh [--out DIR] [STEP ...]        one GPU or more; with TransformerEngine and Apex, and without
#   ./tools/gpu_smoke.sh --help                        the steps
#   SIMCT_GPU_SMOKE_DEVICE=cpu ./tools/gpu_smoke.sh    the same code, small, on a CPU with gloo
# A bare CUDA machine has torch, but not the other packages. On a machine with a network and the same Python version:
#   ./tools/gpu_smoke.sh --prepare-wheels wheels       download the packages that the steps need beside torch
# and on the CUDA machine, before the first run:
#   ./tools/gpu_smoke.sh --install-wheels wheels       into build/gpu_smoke_packages, which later runs find
# PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
packages=build/gpu_smoke_packages
case "${1:-}" in
    --prepare-wheels)
        folder=${2:?a folder for the wheels}
        mapfile -t more < <(grep -E '^(pytest|hypothesis)==' requirements-test.txt)
        "$python" -m pip download --no-deps --require-hashes --requirement requirements.lock --dest "$folder"
        exec "$python" -m pip download --dest "$folder" "${more[@]}"
        ;;
    --install-wheels)
        exec "$python" -m pip install --no-index --no-deps --upgrade --target "$packages" "${2:?the folder of the wheels}"/*.whl
        ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$packages" ]; then export PYTHONPATH="$PYTHONPATH:$PWD/$packages"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec "$python" -m tests.gpu.smoke "$@"
