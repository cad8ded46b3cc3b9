# shellcheck shell=bash
# Sourced by the shell entry points, from the repository root: PYTHON and ensure_packages.
#
# Packages go to .venv, or to the environment that is active. An installed requirements file is remembered by its
# checksum, so a second run starts at once.

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
    [ -e "$stamp" ] && return
    echo "installing $file into $environment" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$file" || return
    touch "$stamp"
}
