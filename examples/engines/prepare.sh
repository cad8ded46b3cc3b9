#!/usr/bin/env bash
# What examples/engines/run.yaml needs, under runs/engines: vLLM in an environment of its own (3.4 GB), a teacher, and a
# student after its warm-up. Minutes on two cores, most of them for packages; what is there already is kept.
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
