# shellcheck shell=bash
# Sourced by scripts that need root: the rest of such a script runs in process and mount namespaces of its own, with a
# folder $folder for its files. However it ends, the kernel ends its daemons and takes its mounts, and $folder goes.

skip() { echo "$(basename "$0" .sh): skipped: $*"; exit 0; }

need_packages() {  # PACKAGE... of Debian; what they put into place is not removed
    dpkg-query --show "$@" > /dev/null 2>&1 && return
    local lock
    exec {lock}< /var/cache/apt  # two scripts may run at a time
    flock "$lock"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"; } \
        > "$folder/apt.log" 2>&1 || skip "the packages $* cannot be installed: $(tail -n 1 "$folder/apt.log")"
    exec {lock}<&-
}

if [ -z "${SIMCT_OWN_FOLDER:-}" ]; then
    [ "$(id -u)" = 0 ] || skip "it needs root for namespaces, mounts and daemons"
    unshare --mount --pid --fork --kill-child true 2> /dev/null || skip "root is given no namespaces here"
    folder=$(mktemp -d -t "$(basename "$0" .sh).XXXXXX")
    # After kill -9, when the trap cannot.
    # shellcheck disable=SC2016
    setsid bash -c 'tail --pid="$0" -f /dev/null; sleep 2; rm -rf --one-file-system "$1"' $$ "$folder" < /dev/null > /dev/null 2>&1 &
    SIMCT_OWN_FOLDER=$folder setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@" &
    inside=$!
    trap 'kill -KILL $inside 2> /dev/null || true; wait $inside 2> /dev/null || true; rm -rf --one-file-system "$folder"' EXIT
    status=0
    wait $inside || status=$?
    exit $status
fi
folder=$SIMCT_OWN_FOLDER
unset SIMCT_OWN_FOLDER  # a script that this one calls has its own
export TMPDIR=$folder/tmp
mkdir "$TMPDIR"
