#!/bin/sh
set -eu
root=$1
chroot "$root" useradd --system --no-create-home from-customize
echo "$(chroot "$root" id -un from-customize) was here" > "$root/etc/customized"
# What a package may leave behind, and no image may hold.
mkdir -p "$root/etc/ssh"
echo "a secret of all machines" > "$root/etc/ssh/ssh_host_ed25519_key"
