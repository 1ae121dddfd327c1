# What systemd does with the package: runs in the machine of scripts/package-test, as root, with the function `settings`
# before it. Each `check` prints a line to the second serial port; scripts/package-test knows which there must be.
# shellcheck shell=bash
exec >/dev/ttyS1 2>&1
cd /root/check
. ./settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive
# Set by hand, for nothing else here does.
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2

# check NAME COMMAND...: one line; what failed, with more below it.
check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "ok $name"
    else
        echo "FAILED $name"
        printf '%s\n' "$output" "$(uptime)" "$(journalctl -u dayfly -n 15 --no-pager -o cat)" "$(systemctl status dayfly --no-pager -n 0)" | sed 's/^/  /'
    fi
}

is() { [ "$(systemctl "is-$1" "$3" 2>/dev/null)" = "$2" ]; }
main_pid() { systemctl show -P MainPID dayfly.service; }
# The machine's QEMU, which libvirtd has started.
machine() { pgrep -f '^/usr/bin/qemu-system-x86_64 -name guest=df-'; }
# within SECONDS COMMAND...
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.5; done
}
has_job() { dayfly status --json | grep -q '"state": *"booting"'; }
# Names only. Left out is what dpkg, systemd, agetty and libvirt keep for themselves about anything, but for names of ours there.
names() {
    find /etc /usr /var /opt /run -xdev \( -path /var/lib/dpkg -o -path /var/cache -o -path /var/tmp -o -path /var/log/journal \
        -o -path /var/lib/systemd/timers -o -path /run/systemd -o -path /var/lib/libvirt -o -path /var/log/libvirt \
        -o -path /run/libvirt -o -path '/run/*.pid' -o -path /run/agetty.reload \) -prune -o -print
    find /var/lib/systemd /run/systemd /var/lib/libvirt /var/log/libvirt /run/libvirt \( -name '*dayfly*' -o -name 'df-*' \) -print
}

installed() { names | LC_ALL=C sort >before && dpkg -i first.deb; }
idle() { is enabled disabled dayfly.service && is active inactive dayfly.service && is active inactive dayfly-logs.timer && is active inactive dayfly-egress.socket; }
check "installs" installed
check "nothing is enabled or started by that" idle

registered() {
    mv images/* /var/lib/dayfly/images/ && chown -R dayfly: /var/lib/dayfly/images && settings -i /etc/dayfly/config.toml &&
        sed -i -e 's|^#boot_deadline = .*|boot_deadline = "30m"|' -e 's|^memory_mib = 512|memory_mib = 256|' /etc/dayfly/config.toml &&
        dayfly register --non-interactive --url "$url" --name machine --token-file token --tls-ca-file ca.pem
}
check "registers at GitLab" registered
check "nothing is enabled or started by that either" idle

started() { systemctl enable --now dayfly.service && is active active dayfly.service && is enabled enabled dayfly.service; }
check "starts when it is told to" started
owned() { [ "$(ps -o user= -p "$(main_pid)")" = dayfly ] && is active active dayfly-logs.timer && is active active dayfly-egress.socket; }
check "runs as user dayfly, with the timer for old logs and the socket for egress" owned
check "takes a job and has libvirt start its machine" within 120 machine
confined() { case $(stat -c %U "/proc/$(machine)") in dayfly-vm-*) ;; *) return 1 ;; esac; }
check "its QEMU runs as a user of its own" confined
check "says so" within 20 has_job

# handed_over COMMAND...: another daemon goes on with the same machine.
handed_over() {
    local before=$(main_pid) vm=$(machine)
    "$@" || return 1
    within 30 is active active dayfly.service && [ "$(main_pid)" != "$before" ] && [ "$(main_pid)" != 0 ] &&
        [ -n "$vm" ] && [ "$(machine)" = "$vm" ] && within 30 has_job
}
check "a restart hands the job over" handed_over systemctl restart dayfly.service
upgraded() { dpkg -i second.deb && dpkg-query -W dayfly | grep -q '+second$'; }
check "an upgrade hands the job over" handed_over upgraded
killed() { local before=$(main_pid); kill -KILL "$before"; within 30 another "$before"; }
another() { [ "$(main_pid)" != "$1" ] && [ "$(main_pid)" != 0 ] && is active active dayfly.service; }
check "a daemon that is killed comes back, and has the job" handed_over killed
stopped() { systemctl stop dayfly.service && is active inactive dayfly.service && machine >/dev/null && systemctl start dayfly.service; }
check "a stop leaves the machine for the next start" handed_over stopped
upgraded_while_stopped() {
    systemctl stop dayfly.service && dpkg -i second.deb && is active inactive dayfly.service && systemctl start dayfly.service
}
check "an upgrade starts none that was stopped" handed_over upgraded_while_stopped

ended() { dayfly kill "$(dayfly status --json | sed -n 's/^ *"id": *\([0-9]*\),*$/\1/p' | head -n 1)" --reason "enough seen" && within 60 no_machine; }
no_machine() { ! machine; }
check "a killed job's machine goes" ended
heard() { ! journalctl -u dayfly.service -o cat --no-pager | grep -E "watch how machines end|Operation not permitted|SECCOMP"; }
check "nothing that the daemon does is refused to it" heard
unregistered() { dayfly drain && within 60 is active inactive dayfly.service && dayfly unregister --name machine; }
check "drains, stays ended, unregisters" unregistered
removed() { systemctl start dayfly-logs.service; dpkg --purge dayfly && is active inactive dayfly-logs.timer && is active inactive dayfly-egress.socket; }
check "purges" removed
clean() {
    ! id dayfly && ! systemctl cat dayfly.service && ! systemctl list-unit-files | grep dayfly && names | LC_ALL=C sort >after &&
        comm -13 before after >left && { cat left; [ ! -s left ]; }
}
check "nothing is left" clean
echo END
systemctl poweroff --force --force
