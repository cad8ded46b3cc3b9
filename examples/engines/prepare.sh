#!/usr/bin/env bash
# Prepares examples/engines/run.yaml, under runs/engines: vLLM in a separate environment (3.4 GB), a teacher, and a
# student after its warm-up. It takes minutes on two cores, mostly for packages. Existing files are kept.
#   ./examples/engines/prepare.sh && python -m megatron_simct.launch examples/engines/run.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements.txt
ensure_packages examples/quickstart/requirements.txt --no-deps
ensure_vllm
mkdir -p runs/engines
ln -sfn "$(realpath "$VLLM")" runs/engines/vllm
exec "$PYTHON" -m examples.engines.prepare "$@"
