# Users and libvirtd for tests and trials. Source it; every function is for root, on Debian 12,
# with or without systemd. What is started or changed here is noted, and undone by `undo_libvirt`:
# call that on exit. It never starts a second libvirtd beside one that runs (that would take away
# the first one's sockets), and never stops one that it has not started.
#
#   make_test_user                 user dayfly-test: session mode, image builds, e2e
#   as_test_user PROGRAM ARGS...   runs a program as it
#   make_service_user              user dayfly: system mode, in group libvirt and no other
#   as_service_user PROGRAM ARGS...
#   make_vm_users COUNT            users dayfly-vm-0 and so on, as the package makes them
#   open_kvm_node                  /dev/kvm for group kvm, as udev would have it
#   start_system_libvirt           a libvirtd at qemu:///system that group libvirt may call
#   stop_session_libvirt           the test user's VMs and its own libvirtd, if there are any
#   undo_libvirt                   all of it back

# Two runs at once on one machine need a user each: undoing ends all that the user runs.
LIBVIRT_TEST_USER=${LIBVIRT_TEST_USER:-dayfly-test}
LIBVIRT_TEST_RUNTIME=/run/$LIBVIRT_TEST_USER
LIBVIRT_SERVICE_USER=${LIBVIRT_SERVICE_USER:-dayfly}

_libvirt_used=""         # whether the test user was ours to use
_libvirt_started=""      # pids of daemons that we started
_libvirt_kvm_was=""      # owner, group and mode of /dev/kvm before us
_libvirt_scratch=""      # our configuration file's directory
_libvirt_unit=""         # systemd unit that we started

_libvirt_say() { echo "libvirt: $*" >&2; }

# A user with a home, sub-ids (for mmdebstrap without root) and /dev/kvm. There is no logind to make
# its runtime directory, so that is made here.
make_test_user() {
    _libvirt_used=yes
    if ! id "$LIBVIRT_TEST_USER" >/dev/null 2>&1; then
        useradd --create-home --shell /bin/sh "$LIBVIRT_TEST_USER"
    fi
    # useradd gives a range of its own to every user, unless login.defs says otherwise.
    grep -q "^$LIBVIRT_TEST_USER:" /etc/subuid ||
        usermod --add-subuids 300000-365535 --add-subgids 300000-365535 "$LIBVIRT_TEST_USER"
    if getent group kvm >/dev/null; then usermod --append --groups kvm "$LIBVIRT_TEST_USER"; fi
    install -d -m 0700 -o "$LIBVIRT_TEST_USER" -g "$LIBVIRT_TEST_USER" "$LIBVIRT_TEST_RUNTIME"
}

# The environment is kept, but for what names another user's places.
as_test_user() {
    setpriv --reuid "$LIBVIRT_TEST_USER" --regid "$LIBVIRT_TEST_USER" --init-groups \
        env -u XDG_CONFIG_HOME -u XDG_CACHE_HOME -u XDG_DATA_HOME XDG_RUNTIME_DIR="$LIBVIRT_TEST_RUNTIME" \
        HOME="$(getent passwd "$LIBVIRT_TEST_USER" | cut -d: -f6)" USER="$LIBVIRT_TEST_USER" \
        LOGNAME="$LIBVIRT_TEST_USER" "$@"
}

make_service_user() {
    if ! id "$LIBVIRT_SERVICE_USER" >/dev/null 2>&1; then
        useradd --system --user-group --no-create-home --home-dir /var/lib/dayfly --shell /usr/sbin/nologin \
            "$LIBVIRT_SERVICE_USER"
    fi
    usermod --append --groups libvirt "$LIBVIRT_SERVICE_USER"
}

# Users for VMs, one each, as the package makes them: make_vm_users COUNT.
make_vm_users() {
    for _libvirt_number in $(seq 0 $(($1 - 1))); do
        _libvirt_name=dayfly-vm-$_libvirt_number
        id "$_libvirt_name" >/dev/null 2>&1 ||
            useradd --system --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin "$_libvirt_name"
        usermod --append --groups kvm,libvirt-qemu "$_libvirt_name"
    done
}

as_service_user() {
    setpriv --reuid "$LIBVIRT_SERVICE_USER" --regid "$LIBVIRT_SERVICE_USER" --init-groups \
        env -u XDG_RUNTIME_DIR -u XDG_CONFIG_HOME -u XDG_CACHE_HOME -u XDG_DATA_HOME HOME=/nonexistent "$@"
}

# Without udev the node may be root's alone. libvirt then probes QEMU anew some 48 times for each
# VM, and a create takes minutes instead of half a second.
open_kvm_node() {
    [ -c /dev/kvm ] && getent group kvm >/dev/null || return 0
    _libvirt_now=$(stat -c '%U:%G %a' /dev/kvm)
    [ "$_libvirt_now" = "root:kvm 660" ] && return 0
    case $_libvirt_now in *6) return 0 ;; esac
    [ -n "$_libvirt_kvm_was" ] || _libvirt_kvm_was=$_libvirt_now
    chown root:kvm /dev/kvm
    chmod 660 /dev/kvm
}

_libvirt_answers() { timeout 60 virsh -q -c qemu:///system uri >/dev/null 2>&1; }

# Starts a daemon in the background of its own accord and notes its pid: NAME PIDFILE COMMAND...
_libvirt_daemon() {
    _libvirt_name=$1 _libvirt_pidfile=$2
    shift 2
    "$@" || { _libvirt_say "$_libvirt_name did not start"; return 1; }
    _libvirt_tries=0
    while [ ! -s "$_libvirt_pidfile" ]; do
        _libvirt_tries=$((_libvirt_tries + 1))
        [ "$_libvirt_tries" -le 100 ] || { _libvirt_say "$_libvirt_name wrote no $_libvirt_pidfile"; return 1; }
        sleep 0.1
    done
    _libvirt_started="$(cat "$_libvirt_pidfile") $_libvirt_started"
}

# A libvirtd at qemu:///system. One that answers is used as it is. With systemd its unit is
# started; without, libvirtd and virtlogd themselves, with a configuration that lets group libvirt
# in (there is no polkit to ask). libvirtd must keep its default pid file: by that it notices a
# second one before harm is done.
start_system_libvirt() {
    open_kvm_node
    if _libvirt_answers; then return 0; fi
    if pgrep -x -u root libvirtd >/dev/null 2>&1 || pgrep -x -u root virtqemud >/dev/null 2>&1; then
        _libvirt_say "a libvirtd of root's runs but does not answer; it is left alone. Stop it, then try again"
        return 1
    fi
    if [ -d /run/systemd/system ]; then
        systemctl start libvirtd.service && _libvirt_unit=libvirtd.service
    else
        _libvirt_scratch=$(mktemp -d)
        chmod 700 "$_libvirt_scratch"
        printf '%s\n' 'unix_sock_group = "libvirt"' 'unix_sock_rw_perms = "0770"' 'auth_unix_rw = "none"' \
            >"$_libvirt_scratch/libvirtd.conf"
        if ! pgrep -x -u root virtlogd >/dev/null 2>&1; then
            _libvirt_daemon virtlogd /run/virtlogd.pid virtlogd --daemon || return 1
        fi
        _libvirt_daemon libvirtd /run/libvirtd.pid libvirtd --daemon --config "$_libvirt_scratch/libvirtd.conf" || return 1
    fi
    _libvirt_answers || { _libvirt_say "libvirtd was started and does not answer at qemu:///system"; return 1; }
}

# Ends a process and waits for it, at most 20 s: PID NAME. Only if it still is that program.
_libvirt_end() {
    [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] || return 0
    kill "$1" 2>/dev/null || return 0
    _libvirt_tries=0
    while [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && [ "$_libvirt_tries" -lt 200 ]; do
        _libvirt_tries=$((_libvirt_tries + 1))
        sleep 0.1
    done
}

# VMs live on without their libvirtd, so those that a failed test has left go first: the test user
# has no others.
stop_session_libvirt() {
    id "$LIBVIRT_TEST_USER" >/dev/null 2>&1 || return 0
    for _libvirt_pid in $(pgrep -u "$LIBVIRT_TEST_USER" -x qemu-system-x86 || true); do
        _libvirt_say "ending a VM that a test has left (process $_libvirt_pid)"
        _libvirt_end "$_libvirt_pid" qemu-system-x86
    done
    for _libvirt_name in libvirtd virtlogd; do
        _libvirt_pidfile=$LIBVIRT_TEST_RUNTIME/libvirt/$_libvirt_name.pid
        [ -s "$_libvirt_pidfile" ] || continue
        _libvirt_end "$(cat "$_libvirt_pidfile")" "$_libvirt_name"
    done
}

undo_libvirt() {
    # What the test user runs is another run's, if this one has not used it.
    if [ -n "$_libvirt_used" ]; then stop_session_libvirt; fi
    for _libvirt_pid in $_libvirt_started; do
        _libvirt_end "$_libvirt_pid" libvirtd
        _libvirt_end "$_libvirt_pid" virtlogd
    done
    _libvirt_started=""
    if [ -n "$_libvirt_unit" ]; then systemctl stop "$_libvirt_unit" || true; _libvirt_unit=""; fi
    if [ -n "$_libvirt_scratch" ]; then rm -rf "$_libvirt_scratch"; _libvirt_scratch=""; fi
    if [ -n "$_libvirt_kvm_was" ] && [ -c /dev/kvm ]; then
        chown "${_libvirt_kvm_was% *}" /dev/kvm
        chmod "${_libvirt_kvm_was#* }" /dev/kvm
        _libvirt_kvm_was=""
    fi
}
