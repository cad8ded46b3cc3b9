#!/usr/bin/env bash
# What touches Megatron, under megatron-core 0.19.2 in a virtual environment of its own: $SIMCT_MEGATRON_0_19_VENV, or one
# beside the active one, whose other packages it sees. 0.19.2 declares Python 3.12 and later; its files run under 3.11.
#   ./tests/end_to_end/megatron_0_19.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/environment.sh
ensure_packages requirements-test.txt
other=${SIMCT_MEGATRON_0_19_VENV:-$environment-megatron-0.19}
if [ ! -e "$other/installed" ]; then
    if ! { python3 -m venv "$other" && "$other/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        --ignore-requires-python megatron-core==0.19.2 triton==3.9.0; }; then
        echo "megatron_0_19: skipped: megatron-core 0.19.2 cannot be installed"
        exit 0
    fi
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$PYTHON" -c "$site" > "$("$other/bin/python" -c "$site")/base.pth"
    touch "$other/installed"
fi
# In a checkout it would append the checkout's commit.
found=$(NO_VCS_VERSION=1 PYTHONPATH=$PWD "$other/bin/python" -W ignore -c 'import megatron.core; print(megatron.core.__version__)' 2> /dev/null)
[ "$found" = 0.19.2 ] || { echo "megatron_0_19: $other has megatron-core $found"; exit 1; }
export OMP_NUM_THREADS=1
[ $# = 0 ] || exec "$other/bin/python" -m pytest -p no:cacheprovider "$@"
"$other/bin/python" -m pytest -p no:cacheprovider --quiet --numprocesses 2 --dist loadfile --durations=5 \
    tests/parallel/test_update_options.py tests/parallel/test_shared_optimizer.py tests/parallel/test_layouts.py \
    tests/parallel/test_checkpoint.py tests/parallel/test_resume.py tests/parallel/test_async_save.py tests/parallel/test_lora.py \
    tests/parallel/test_uneven_layouts.py tests/parallel/test_preflight_memory.py tests/parallel/test_step.py \
    tests/parity/test_transformer_engine_layers.py tests/parity/test_kernels_of_models.py tests/unit/test_cpu_patches.py \
    tests/unit/test_attention.py
echo "megatron_0_19: verified: under megatron-core $found the layouts, options, checkpoints and adapters of these tests"
