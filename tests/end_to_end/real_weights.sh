#!/usr/bin/env bash
# examples/real_weights from one end to the other, with the real models but two steps of training; downloads 330 MB.
#   ./tests/end_to_end/real_weights.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
if ! ensure_packages examples/real_weights/requirements.txt; then
    echo "real_weights: skipped: packages of examples/real_weights/requirements.txt cannot be installed"
    exit 0
fi
result=$(MEGATRON_SIMCT_REAL_WEIGHTS=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests/end_to_end/test_real_weights.py | tee /dev/stderr)
if [[ $result != *"1 passed"* ]]; then
    echo "real_weights: skipped: $(grep SKIPPED <<< "$result")"
    exit 0
fi
echo "real_weights: verified: Gemma-3-270M taught SmolLM2-135M two steps; transformers finds the loss of the trainer in the exported student"
