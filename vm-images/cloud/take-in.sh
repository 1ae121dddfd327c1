#!/bin/sh
# Turns a machine of a cloud image into an image of dayfly's. Its own cloud-init runs this, as root, in its first and only
# boot before: $1 is a directory with
#
#   guest, runner           dayfly-guest and gitlab-runner
#   service, target, limits, service.conf   systemd's units and settings
#   ca.pem                  certificates that the machine shall trust; may be missing
#   packages                names of packages to install, a line each
#
# What it says is read by dayfly: lines that begin with `dayfly-take-in: `, on the first serial port.
set -eu
seed=$1
units=/etc/systemd/system
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

say() { echo "dayfly-take-in: $*" > /dev/ttyS0; }
fail() {
    trap - EXIT
    say "failed: $*"
    sync
    echo o > /proc/sysrq-trigger
    sleep 60
    exit 1
}
trap 'fail "one of its steps ended early; the lines before may tell which"' EXIT

say begun
[ -d /run/systemd/system ] || fail "it runs no systemd; see the contract in vm-images/README.md"

# Packages that the image lacks, from its own sources.
packages=$(tr '\n' ' ' < "$seed/packages")
if [ -n "${packages% }" ]; then
    say "packages $packages"
    # shellcheck disable=SC2086
    if command -v apt-get > /dev/null; then
        apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages
    elif command -v dnf > /dev/null; then
        dnf -q -y --setopt=install_weak_deps=False install $packages
    elif command -v zypper > /dev/null; then
        zypper -n -q install --no-recommends $packages
    else
        fail "it has none of apt-get, dnf and zypper, by which packages are installed"
    fi > /dev/ttyS0 2>&1 || fail "it could not install $packages"
fi
for program in git curl ip useradd; do
    command -v "$program" > /dev/null || fail "it has no $program; give the package that has it by --package (git is in git, ip in iproute2)"
done

# The guest program, its unit, and the runner.
say installing
install -D -m 755 "$seed/guest" /usr/lib/dayfly/dayfly-guest
install -D -m 755 "$seed/runner" /usr/bin/gitlab-runner
install -D -m 644 "$seed/service" "$units/dayfly-guest.service"
install -D -m 644 "$seed/service.conf" "$units/dayfly-guest.service.d/cloud.conf"
install -D -m 644 "$seed/target" "$units/dayfly.target"
install -D -m 644 "$seed/limits" /etc/systemd/system.conf.d/dayfly.conf
install -D -m 644 "$seed/limits" /etc/systemd/user.conf.d/dayfly.conf
mkdir -p /etc/gitlab-runner "$units/dayfly.target.wants"
ln -sf ../dayfly-guest.service "$units/dayfly.target.wants/dayfly-guest.service"
# What it starts with: the guest program, and what that needs. All else a job starts that wants it.
ln -sf "$units/dayfly.target" "$units/default.target"
id gitlab-runner > /dev/null 2>&1 || useradd --create-home --shell /bin/bash gitlab-runner
# The runner's own room for temporary files is not the job's (see TMPDIR in the guest program).
{ echo '[ "${TMPDIR-}" != /run/dayfly/runner ] || unset TMPDIR'; cat /etc/profile 2> /dev/null || :; } > /etc/profile.new
chmod 644 /etc/profile.new
mv /etc/profile.new /etc/profile
if [ -e "$seed/ca.pem" ]; then
    if [ -d /usr/local/share/ca-certificates ] && command -v update-ca-certificates > /dev/null; then
        cp "$seed/ca.pem" /usr/local/share/ca-certificates/dayfly.crt && update-ca-certificates > /dev/null 2>&1
    elif command -v update-ca-trust > /dev/null; then
        cp "$seed/ca.pem" /etc/pki/ca-trust/source/anchors/dayfly.pem && update-ca-trust
    else
        fail "it has neither update-ca-certificates nor update-ca-trust, by which certificates come to be trusted"
    fi
fi
# One job, and the machine is gone: there is nothing to keep apart in it. Files that came just now have no label either.
if [ -e /etc/selinux/config ]; then sed -i 's/^SELINUX=enforcing/SELINUX=permissive/' /etc/selinux/config; fi
if command -v dockerd > /dev/null && getent group docker > /dev/null; then
    usermod --append --groups docker gitlab-runner
    [ ! -e /usr/lib/systemd/system/docker.socket ] || ln -sf /usr/lib/systemd/system/docker.socket "$units/dayfly.target.wants/"
fi

# What costs each boot, should somebody start more than the target above.
mkdir -p /etc/cloud
touch /etc/cloud/cloud-init.disabled
for unit in snapd.service snapd.socket snapd.seeded.service snapd.apparmor.service systemd-networkd-wait-online.service \
    NetworkManager-wait-online.service ifupdown-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
    unattended-upgrades.service dnf-makecache.timer man-db.timer motd-news.timer e2scrub_all.timer fstrim.timer \
    update-notifier-download.timer packagekit.service systemd-firstboot.service; do
    ln -sf /dev/null "$units/$unit"
done
# Nobody is there to choose in a boot loader's menu.
for file in /boot/grub/grub.cfg /boot/grub2/grub.cfg; do
    [ ! -f "$file" ] || sed -i 's/set timeout=[0-9][0-9]*/set timeout=0/; s/set timeout_style=menu/set timeout_style=hidden/' "$file"
done
[ ! -f /etc/default/grub ] || printf 'GRUB_TIMEOUT=0\nGRUB_RECORDFAIL_TIMEOUT=0\n' >> /etc/default/grub

# What it was made of, for the record.
. /etc/os-release
say "suite ${ID:-linux} ${VERSION_CODENAME:-${VERSION_ID:-}}"
say "kernel $(uname -r)"
if command -v dpkg-query > /dev/null; then
    dpkg-query -W -f '${Package} ${Version}\n'
elif command -v rpm > /dev/null; then
    rpm -qa --qf '%{NAME} %{VERSION}-%{RELEASE}\n'
fi | sort -u | sed 's/^/dayfly-take-in: package /' > /dev/ttyS0

# What is of one machine: an image is for many, and no secret.
say blanking
rm -rf /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed /var/lib/systemd/credential.secret \
    /var/lib/cloud /var/log/journal /var/log/cloud-init* /var/lib/dhcp/* /var/lib/NetworkManager/* /etc/docker/key.json \
    /var/lib/docker/engine-id /root/.ssh /root/.docker /root/.netrc /root/.git-credentials /root/.bash_history \
    /etc/gitlab-runner/config.toml /home/*/.ssh /home/*/.bash_history /var/cache/apt/archives/*.deb /var/lib/apt/lists/*_*
find /var/log -type f -exec truncate -s 0 {} +
: > /etc/machine-id
: > /etc/resolv.conf.new
mv /etc/resolv.conf.new /etc/resolv.conf
echo localhost > /etc/hostname
awk -F: '$2 ~ /^[^!*]/ { print $1 }' /etc/shadow | while read -r user; do usermod --password '!*' "$user"; done

# dayfly looks into an ext4 by itself. Into others it cannot.
left=$(ls -d /etc/ssh/ssh_host_* /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /var/lib/dbus/machine-id 2> /dev/null || :)
[ -z "$left" ] || fail "it still holds" $left
[ -e /etc/machine-id ] && [ ! -s /etc/machine-id ] || fail "its /etc/machine-id is not empty"
[ -z "$(awk -F: '$2 ~ /^[^!*]/ { print $1 }' /etc/shadow)" ] || fail "it still has a user with a password"

sync
fstrim -a 2> /dev/null || :
trap - EXIT
echo u > /proc/sysrq-trigger
sleep 2
# Last: nothing is written from here on.
grep -qE '^[^ ]+ / [^ ]+ ro[ ,]' /proc/mounts || fail "its root file system stays writable"
say done
echo o > /proc/sysrq-trigger
sleep 60
