#!/usr/bin/env bash
# tools/evaluate.py beside lm-eval: the same grades of the same responses, and the same responses of one exported model
# (SmolLM2-135M-Instruct, 90 MB to download). Installs lm-eval with all it needs, another 300 MB.
#   ./tests/end_to_end/lm_eval.sh --gsm8k test.jsonl --mbpp sanitized-mbpp.json [--rows 300] [--questions 12]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
ensure_packages tests/end_to_end/lm_eval.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME=$work/huggingface
"$PYTHON" -m examples.real_weights.hf_folders smollm2 \
    --cache "${MEGATRON_SIMCT_CACHE:-$HOME/.cache/megatron_simct}/gguf" --save "$work/smollm2"
"$PYTHON" -m tests.end_to_end.lm_eval_harness --model "$work/smollm2" "$@"
echo "lm_eval: verified: grades and greedy responses of tools/evaluate.py are those of lm-eval"
