#!/bin/sh
# Turns a minimal Debian into the guest. mmdebstrap runs it outside of the new root, as the root of
# that root: $1 is where it is. Beside this script: `files` (copied in). A recipe's own customize.sh comes after it, in the
# same way, and seal.sh is the last.
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
