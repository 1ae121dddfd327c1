#!/bin/sh
# Turns a minimal Debian into the guest. mmdebstrap runs it outside of the new root, as the root of
# that root: $1 is where it is. Beside this script: `files` (copied in), `kernel-package` (a name).
set -eu
root=$1
here=$(dirname "$0")

# Guest program, units, runner.
cp -r --preserve=mode "$here/files/." "$root/"
chroot "$root" systemctl enable --quiet dayfly-guest.service
mkdir -p "$root/etc/systemd/user.conf.d"
cp "$root/etc/systemd/system.conf.d/dayfly.conf" "$root/etc/systemd/user.conf.d/dayfly.conf"

# The job's user. Its id is whatever is free: fixed ones have met ids of packages before.
chroot "$root" useradd --create-home --shell /bin/bash gitlab-runner
mkdir -p "$root/etc/gitlab-runner"

# Each login shell of a job (one a script section) would run these, 50 ms of `id`, `mesg` and the like.
# But for the runner's own room for temporary files, which is not the job's (see TMPDIR in the guest program).
echo '[ "${TMPDIR-}" != /run/dayfly/runner ] || unset TMPDIR' > "$root/etc/profile"
: > "$root/root/.profile"
rm -f "$root/root/.bashrc" "$root/home/gitlab-runner/.bashrc" "$root/home/gitlab-runner/.profile" "$root/home/gitlab-runner/.bash_logout"

# Generators look for things that this machine never has; they cost 1 s of each boot under TCG.
mkdir -p "$root/etc/systemd/system-generators"
for generator in "$root"/usr/lib/systemd/system-generators/*; do
    ln -s /dev/null "$root/etc/systemd/system-generators/$(basename "$generator")"
done

# The kernel's package, and what is in the image, for the record; both leave with this directory.
mkdir "$root/.dayfly"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG
export APT_CONFIG
kernel=$(apt-cache depends --important "$(cat "$here/kernel-package")" | sed -n 's/^ *Depends: //p' | head -n 1)
(cd "$root/.dayfly" && apt-get -qq -o APT::Sandbox::User=root download "$kernel")
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' > "$root/.dayfly/packages"

# What belongs to the building host, and what each machine gets by itself. An empty machine-id (not
# a missing one) keeps systemd from its first-boot presets.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/var/lib/dbus/machine-id" "$root/etc/resolv.conf"
: > "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
: > "$root/etc/fstab"
echo localhost > "$root/etc/hostname"
