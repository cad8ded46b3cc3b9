#!/usr/bin/env bash
# First contact with GPUs: NCCL, TransformerEngine, bf16, memory and speed, as one Markdown table on stdout.
#   ./tools/gpu_smoke.sh                               two GPUs (one: the checks of two ranks are left out)
#   SIMCT_GPU_SMOKE_DEVICE=cpu ./tools/gpu_smoke.sh    the same code, small, on CPU with gloo
# Needs the environment of requirements-test.txt, on a GPU also that of requirements-gpu.txt. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec "${PYTHON:-python}" -m tests.gpu.smoke
