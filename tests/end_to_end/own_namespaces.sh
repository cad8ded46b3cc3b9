# Sourced by scripts that need root: the rest of such a script runs in process and mount namespaces of its own, with a
# folder $folder for its files. However it ends, the kernel ends its daemons and takes its mounts, and $folder goes.

skip() { echo "$(basename "$0"): skipped: $*"; exit 0; }

need_packages() {  # PACKAGE... of Debian; what they put into place is not removed
    dpkg-query --show "$@" > /dev/null 2>&1 && return
    { apt-get update && apt-get install --yes --no-install-recommends "$@"; } > "$folder/apt.log" 2>&1 \
        || skip "the packages $* cannot be installed: $(tail -n 1 "$folder/apt.log")"
}

if [ -z "${SIMCT_OWN_FOLDER:-}" ]; then
    [ "$(id -u)" = 0 ] || skip "it needs root for namespaces, mounts and daemons"
    unshare --mount --pid --fork --kill-child true 2> /dev/null || skip "this kernel gives root no namespaces"
    folder=$(mktemp -d -t "$(basename "$0" .sh).XXXXXX")
    remove() { rm -rf --one-file-system "$1"; }
    # After kill -9, when the trap cannot.
    (export -f remove && exec setsid bash -c 'tail --pid="$1" -f /dev/null; sleep 2; remove "$2"' - $$ "$folder") < /dev/null > /dev/null 2>&1 &
    SIMCT_OWN_FOLDER=$folder setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@" &
    inside=$!
    trap 'kill -KILL $inside 2> /dev/null || true; wait $inside 2> /dev/null || true; remove "$folder"' EXIT
    status=0
    wait $inside || status=$?
    exit $status
fi
folder=$SIMCT_OWN_FOLDER
export TMPDIR=$folder/tmp
mkdir "$TMPDIR"
