#!/usr/bin/env bash
# The quick start and a first hour in a clone and an empty environment: every command of the pages, what each prints.
# Ten to twenty minutes on two cores.
#   ./tests/end_to_end/first_hour.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d -t first_hour.XXXXXX)
trap 'rm -rf "$folder"' EXIT
git clone --quiet . "$folder/checkout"
cd "$folder/checkout"
mkdir "$folder/home"
# How packages and Python are found may be set in the environment; nothing else of it is kept.
settings=(HOME="$folder/home" PATH=/usr/local/bin:/usr/bin:/bin TMPDIR="$folder" LANG=C.UTF-8)
settings+=(PYTHON3="$(python3 -c 'import sys; print(sys._base_executable)')")
settings+=(PIP_CONFIG_FILE="${PIP_CONFIG_FILE:-${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf}")
while IFS= read -r setting; do settings+=("$setting"); done < <(env | grep -E '^(PIP_[A-Z_]+|https?_proxy|SSL_CERT_FILE)=')
# shellcheck disable=SC2016  # the inner shell reads it
env -i "${settings[@]}" bash -c '"$PYTHON3" -m tests.end_to_end.first_hour'
