#!/bin/sh
# Turns the guest into one with Docker. mmdebstrap runs it outside of the new root, as the root of that root: $1 is where it
# is. Beside this script: `executor` (a name).
set -eu
root=$1
here=$(dirname "$0")
units=$root/etc/systemd/system

# Debian's wait for the network, and start containerd apart; ours starts what it needs.
for unit in docker.service docker.socket containerd.service; do
    ln -sf /dev/null "$units/$unit"
done
mkdir -p "$units/dayfly.target.wants"
ln -s ../dayfly-docker.socket "$units/dayfly.target.wants/"
# Where all jobs need it, it starts with the machine, and nobody waits for it but who calls it first. Where some may, the
# first call starts it.
if [ "$(cat "$here/executor")" = docker ]; then
    ln -s ../dayfly-docker.service "$units/dayfly.target.wants/"
fi

# Whoever may call Docker is root of this machine, as is said in the recipe's README.
chroot "$root" usermod --append --groups docker gitlab-runner
# Sources of jobs, with the same name in and out of containers.
install -d -m 0755 "$root/builds"
chroot "$root" chown gitlab-runner:gitlab-runner /builds
