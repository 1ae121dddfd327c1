#!/bin/sh
# Ends a guest's making: takes down what is in it, and takes out what is of one machine only. mmdebstrap runs it outside of
# the new root, as the root of that root: $1 is where it is. Beside this script: `kernel-package` (a name; none: it is in),
# `guest-modules` (names, a line each), and `all-modules` where the recipe wants them all.
set -eu
root=$1
here=$(dirname "$0")

# The kernel's package, and what is in the image, for the record; both leave with this directory.
mkdir -p "$root/.dayfly"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
export APT_CONFIG

# take_kernel: fetches the kernel's package, and puts those of its modules into the image that the machine loads by itself,
# with what they depend on, where modprobe looks for them.
take_kernel() {
    kernel=$(apt-cache depends --important "$(cat "$here/kernel-package")" | sed -n 's/^ *Depends: //p' | head -n 1)
    (cd "$root/.dayfly" && apt-get -qq -o APT::Sandbox::User=root download "$kernel")
    dpkg-deb --extract "$root/.dayfly/"*.deb "$root/.dayfly/kernel"
    for tree in "$root"/.dayfly/kernel/lib/modules/* "$root"/.dayfly/kernel/usr/lib/modules/*; do
        [ -d "$tree" ] || continue
        release=$(basename "$tree")
        modules=$root/usr/lib/modules/$release
        mkdir -p "$root/usr/lib/modules"
        cp -r "$tree" "$modules"
        chroot "$root" depmod "$release"
        [ ! -e "$here/all-modules" ] || continue
        while read -r module; do
            chroot "$root" modprobe --set-version "$release" --show-depends "$module"
        done < "$here/guest-modules" > "$root/.dayfly/wanted"
        rm -r "$modules/kernel"
        sed -n "s|^insmod .*/$release/\([^ ]*\).*|\1|p" "$root/.dayfly/wanted" | sort -u | while read -r file; do
            install -D -m 644 "$tree/$file" "$modules/$file"
        done
        chroot "$root" depmod "$release"
    done
    rm -r "$root/.dayfly/kernel"
}

# A disk with a boot loader has its kernel inside, as any other package.
if [ -e "$here/kernel-package" ]; then take_kernel; fi
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' > "$root/.dayfly/packages"

# What belongs to the building host, and what each machine gets by itself. An empty machine-id (not
# a missing one) keeps systemd from its first-boot presets.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/var/lib/dbus/machine-id" "$root/etc/resolv.conf"
: > "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
: > "$root/etc/fstab"
echo localhost > "$root/etc/hostname"

# An image is for many machines, and no secret: what would be the same in all of them, or opens them all.
rm -f "$root"/etc/ssh/ssh_host_* "$root/var/lib/systemd/random-seed" "$root/var/lib/systemd/credential.secret"
with_password=$(awk -F: '$2 ~ /^[^!*]/ { print $1 }' "$root/etc/shadow")
if [ -n "$with_password" ]; then
    echo "recipe: the image has a password for:" $with_password "; an image has none" >&2
    exit 1
fi
