# An operator's life with the package. Sourced by scripts/package-test, which has made `$tree` (a fresh Debian with what
# the package depends on), `$work` (packages, repository), `$image` and the versions `$first` and `$second`.
# shellcheck shell=bash

# Seconds that a job may take: a boot under TCG on a busy host takes one minute of them.
job_limit=240

start_gitlab() {
    mkdir -m 711 "$work/gitlab.d"
    coproc GITLAB { exec "$work/gitlab" "$work/gitlab.d" 2>"$work/gitlab.log"; }
    local tries=0
    until [ -f "$work/gitlab.d/port" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 150 ] || { cat "$work/gitlab.log"; die "the stand-in GitLab does not start"; }
        sleep 0.2
    done
    port=$(cat "$work/gitlab.d/port")
}

# gitlab LINE: what the stand-in answers (tests/tools/src/bin/gitlab.rs).
gitlab() {
    local answer
    printf '%s\n' "$*" >&"${GITLAB[1]}"
    read -r -t 620 answer <&"${GITLAB[0]}" || { cat "$work/gitlab.log"; die "the stand-in GitLab does not answer"; }
    printf '%s\n' "$answer"
}

# expect_gitlab ANSWER LINE...
expect_gitlab() {
    local wanted=$1 answer
    shift
    answer=$(gitlab "$@")
    [ "$answer" = "$wanted" ] || { story "$2"; die "GitLab answers \`$answer\` to \`$*\`, not \`$wanted\`"; }
}

# story [JOB]: what there is to read about a failure.
story() {
    if [ -n "${1-}" ]; then gitlab trace "$1" >/dev/null; tail -n 40 "$work/gitlab.d/trace.$1" 2>/dev/null || true; fi
    tail -n 60 "$work/daemon.log" 2>/dev/null || true
}

# expect WHAT TEXT PATTERN: the text has a line like that.
expect() { grep -Eq -- "$3" <<<"$2" || { printf '%s\n' "$2"; story; die "$1: no line like \`$3\`"; }; }

# listing DIRECTORY: each file with what is in it. Left out is what dpkg, apt, debconf, ldconfig and shadow keep for
# themselves about any package, and what is mounted.
listing() {
    (
        cd "$1"
        find . ./run -xdev \( -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path ./var/cache -o -path ./var/log/apt \
            -o -path ./var/log/dpkg.log -o -path ./repository -o -path ./tmp -o -path ./root \) -prune -o \
            ! -path './etc/*-' ! -name .pwd.lock ! -path ./etc/ld.so.cache -print0 |
            LC_ALL=C sort -z >"$work/names"
        xargs -0 -a "$work/names" stat -c '%F %a %U %n' |
            while read -r line; do case $line in 'regular '*) ;; *) printf '%s\n' "$line" ;; esac; done
        xargs -0 -a "$work/names" sh -c 'for file; do [ -f "$file" ] && [ ! -L "$file" ] && printf "%s\0" "$file"; done; true' sh |
            xargs -0 md5sum
    ) >"$2"
}

# left_behind BEFORE AFTER: names of files that are new or have another content.
left_behind() { LC_ALL=C comm -13 <(LC_ALL=C sort "$1") <(LC_ALL=C sort "$2"); }

as_dayfly() { in_root "$tree" setpriv --reuid dayfly --regid dayfly --init-groups "$@"; }

# start_daemon: as the unit does it, but for the confinement, in which only libvirt can start machines.
start_daemon() {
    in_root "$tree" install -d -m 0700 -o dayfly -g dayfly /run/dayfly
    as_dayfly dayfly run >>"$work/daemon.log" 2>&1 &
    daemon=$!
    local tries=0
    until as_dayfly dayfly status >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 150 ] && kill -0 "$daemon" || { story; die "the daemon does not answer"; }
        sleep 0.2
    done
}

# end_daemon: a hand-over.
end_daemon() {
    local code=0 process
    process=$(in_root "$tree" dayfly status --json | sed -n 's/^ *"pid": \([0-9]*\),*$/\1/p')
    kill -TERM "$process"
    wait "$daemon" || code=$?
    [ "$code" = 0 ] || { story; die "the daemon ended with $code"; }
}

# settings: what an operator changes of the first configuration, for a small machine without KVM whose GitLab is on this
# host's loopback, which the network `relay` keeps from jobs.
settings() {
    sed -e 's|^#network = "relay"|network = "user"|' -e "s|^#keepalive = .*|keepalive = \"3s\"|" -e 's|^#memory_mib = 2048|memory_mib = 512|' \
        -e 's|^#cpus = 2|cpus = 1|' -e 's|^#disk_gib = 20|disk_gib = 8|' \
        -e 's|^#allow_standin_runner = false|allow_standin_runner = true|' -e 's|^#accel = "auto"|accel = "tcg"|' "$@"
}

# Numbers, versions and addresses are one run's.
without_numbers() { sed -E -e 's/[0-9]+(\.[0-9]+)+[^ ,;)]*/N/g' -e 's/[0-9]+/N/g' -e 's/\(from: [^)]*\)/(from: ORIGIN)/'; }

# expected_of_doctor: the lines of doctor.txt that hold for this host and this image, by what is asked of both here.
expected_of_doctor() {
    local holds=always open label line
    [ "$(cat /sys/devices/system/cpu/smt/active 2>/dev/null)" != 1 ] || holds+=" smt"
    case $(cat /sys/kernel/mm/ksm/run 2>/dev/null) in '' | 0) ;; *) holds+=" ksm" ;; esac
    [ "$(wc -l </proc/swaps)" -le 1 ] || holds+=" swap"
    open=$(cd /sys/devices/system/cpu/vulnerabilities 2>/dev/null && grep -l '^Vulnerable' -- * | LC_ALL=C sort | paste -sd, | sed 's/,/, /g' || true)
    [ -z "$open" ] || holds+=" cpu"
    [ "$holds" != always ] || holds+=" none"
    if grep -q '^origin = "standin"' "$image/image.toml"; then holds+=" standin"; else holds+=" official"; fi
    open=$(without_numbers <<<"$open")
    while IFS='|' read -r label line; do
        case " $holds " in *" $label "*) printf '%s\n' "${line//OPEN/$open}" ;; esac
    done <"$root/tests/package/doctor.txt"
}

live_in_root() {
    local job now
    mount_inside "$tree"
    mount -t tmpfs -o mode=755 tmpfs "$tree/run"
    mkdir "$tree/repository"
    mount --bind -o ro "$work/repository" "$tree/repository"
    listing "$tree" "$work/before"

    say "package: apt install, from the signed repository"
    install -D -m 644 "$work/repository/dayfly-archive-key.asc" "$tree/etc/apt/keyrings/dayfly.asc"
    echo "deb [signed-by=/etc/apt/keyrings/dayfly.asc] file:/repository stable main" >"$tree/etc/apt/sources.list.d/dayfly.list"
    our_lists=(-o Dir::Etc::sourcelist=sources.list.d/dayfly.list -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0)
    in_root "$tree" apt-get update -qq "${our_lists[@]}"
    in_root "$tree" apt-get install -y -qq --no-install-recommends dayfly >"$work/apt.log" 2>&1 ||
        { cat "$work/apt.log"; die "apt cannot install the package"; }
    expect "the version" "$(in_root "$tree" dpkg-query -W dayfly)" "^dayfly	${first//+/\\+}\$"
    expect "the user" "$(in_root "$tree" id dayfly)" 'groups=[^ ]*\(dayfly\),[0-9]+\(libvirt\)'
    expect "recipes" "$(in_root "$tree" dayfly image recipes)" '^debian-12-shell +/usr/share/dayfly/recipes/debian-12-shell$'
    [ -s "$tree/usr/share/man/man1/dayfly-register.1.gz" ] || die "there is no manual page of register"
    grep -q register "$tree/usr/share/bash-completion/completions/dayfly" || die "there is no completion"
    in_root "$tree" dpkg --verify dayfly
    [ ! -e "$tree/etc/systemd/system/multi-user.target.wants/dayfly.service" ] || die "the service is enabled before there is a runner"

    say "package: register, with a CA that only root can read"
    cp -rL "$image" "$tree/var/lib/dayfly/images/"
    in_root "$tree" chown -R dayfly: "/var/lib/dayfly/images"
    install -d -m 700 "$tree/root/private"
    install -m 600 "$work/gitlab.d/ca.pem" "$work/gitlab.d/token" "$tree/root/private"
    in_root "$tree" sh -c "$(declare -f settings); settings -i /etc/dayfly/config.toml; \
        sed -i -e 's|^#backend = .*|backend = \"qemu\"|' /etc/dayfly/config.toml"
    in_root "$tree" dayfly register --non-interactive --url "https://127.0.0.1:$port" --clone-url "https://10.0.2.2:$port" \
        --name ci --token-file /root/private/token --tls-ca-file /root/private/ca.pem >"$work/register.log" ||
        die "register ended with $?"
    tail -n 3 "$work/register.log"
    rm -r "$tree/root/private"
    expect "verify" "$(in_root "$tree" dayfly verify)" 'ci'

    say "package: doctor"
    in_root "$tree" dayfly doctor >"$work/doctor" || { cat "$work/doctor"; die "doctor ended with $?"; }
    # What bounds of this host's own cgroups hold for the chroot's is this host's.
    without_numbers <"$work/doctor" | awk '/its QEMU (may have|has no bound)/ { remedy = 1; next }
        remedy && /^      ->/ { remedy = 0; next } { remedy = 0; print }' >"$work/doctor.seen"
    diff -u <(expected_of_doctor) "$work/doctor.seen" || { cat "$work/doctor"; die "doctor has other lines"; }

    say "package: a job, as user dayfly"
    start_daemon
    job=$(gitlab job "cat file.txt; echo made by \$(id -un)")
    expect_gitlab ok until "$job" success "$job_limit"
    gitlab trace "$job" >/dev/null
    expect "the job's log" "$(cat "$work/gitlab.d/trace.$job")" 'Job succeeded'
    expect "the job's log" "$(cat "$work/gitlab.d/trace.$job")" '^(.*O )?content'
    now=$(in_root "$tree" dayfly status --json)
    expect "status --json" "$now" '"name": *"ci"'
    in_root "$tree" dayfly metrics >"$work/metrics"
    curl -sS --max-time 10 --unix-socket "$tree/run/dayfly/status.sock" http://dayfly/metrics >"$work/metrics.http"
    local file
    for file in "$work/metrics" "$work/metrics.http"; do
        expect "metrics" "$(cat "$file")" '^dayfly_jobs_ended_total\{.*success.*\} 1$'
        if [ -n "${promtool:-}" ]; then "$promtool" check metrics <"$file" || die "promtool finds fault with $(basename "$file")"; fi
    done

    say "package: an upgrade in the middle of a job"
    cp -r "$work/next/." "$work/repository"
    job=$(gitlab job "echo begun; sleep 30; echo ended")
    expect_gitlab ok says "$job" "$job_limit" begun
    in_root "$tree" apt-get update -qq "${our_lists[@]}"
    in_root "$tree" apt-get install -y -qq --no-install-recommends --only-upgrade dayfly >"$work/apt.log" 2>&1 ||
        { cat "$work/apt.log"; die "apt cannot upgrade the package"; }
    expect "the version" "$(in_root "$tree" dpkg-query -W dayfly)" "^dayfly	${second//+/\\+}\$"
    # What postinst asks systemd for, where there is one (below).
    end_daemon
    start_daemon
    expect_gitlab ok until "$job" running 0
    expect_gitlab ok until "$job" success "$job_limit"
    gitlab trace "$job" >/dev/null
    expect "the job's log" "$(cat "$work/gitlab.d/trace.$job")" '^(.*O )?ended'

    say "package: drain, unregister, purge"
    in_root "$tree" dayfly drain
    wait "$daemon" || die "the drained daemon ended with $?"
    [ "$(gitlab managers)" = 1 ] || die "GitLab knows $(gitlab managers) machines before unregister"
    in_root "$tree" dayfly unregister --name ci
    [ "$(gitlab managers)" = 0 ] || die "GitLab still knows this machine"
    in_root "$tree" apt-get purge -y -qq dayfly >"$work/apt.log" 2>&1 || { cat "$work/apt.log"; die "apt cannot purge the package"; }
    # What the operator has made by hand.
    rm "$tree/etc/apt/sources.list.d/dayfly.list" "$tree/etc/apt/keyrings/dayfly.asc"
    # The look does see: a file is planted, and found.
    echo planted >"$tree/usr/share/dayfly-planted"
    listing "$tree" "$work/after"
    [ "$(left_behind "$work/before" "$work/after" | grep -c 'dayfly-planted$')" = 1 ] || die "a planted file is not found"
    rm "$tree/usr/share/dayfly-planted"
    listing "$tree" "$work/after"
    left_behind "$work/before" "$work/after"
    echo "figure package.files_looked_at $(wc -l <"$work/after")"
    echo "figure package.left_behind $(left_behind "$work/before" "$work/after" | wc -l)"
    [ -z "$(left_behind "$work/before" "$work/after")" ] || die "purge has left something behind"
    umount "$tree/repository"
    rmdir "$tree/repository"
    umount "$tree/run"
    unmount_inside "$tree"
}

# live_in_machine: the same tree boots, with its systemd and the kernel of the trial's image.
live_in_machine() {
    local job since=$SECONDS seen
    say "package: a machine with systemd"
    rm -f "$tree/usr/sbin/policy-rc.d"
    in_root "$tree" systemd-machine-id-setup >/dev/null 2>&1
    install -d -m 700 "$tree/root/check"
    install -m 600 "$work/gitlab.d/ca.pem" "$work/gitlab.d/token" "$tree/root/check"
    install -m 644 "$work/out/dayfly_${first}_amd64.deb" "$tree/root/check/first.deb"
    install -m 644 "$work/out/dayfly_${second}_amd64.deb" "$tree/root/check/second.deb"
    { declare -f settings; cat "$root/tests/package/machine.sh"; } >"$tree/root/check/machine.sh"
    echo "url=https://10.0.2.2:$port" >"$tree/root/check/settings"
    mkdir "$tree/root/check/images"
    cp -rL "$image" "$tree/root/check/images/"
    install -m 644 "$root/tests/package/package-check.service" "$tree/etc/systemd/system/package-check.service"
    in_root "$tree" systemctl enable --quiet package-check.service
    truncate -s 16G "$work/disk"
    mke2fs -q -t ext4 -E lazy_itable_init=1,lazy_journal_init=1 -d "$tree" "$work/disk"
    job=$(gitlab job "echo begun; sleep 5")
    say "package: booting it, $((SECONDS - since)) s after"
    : >"$work/results"
    qemu-system-x86_64 -nodefaults -no-user-config -display none -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 \
        -kernel "$image/vmlinuz" -initrd "$image/initrd" -no-reboot \
        -append "console=ttyS0 root=/dev/vda rootfstype=ext4 rw quiet net.ifnames=0 panic=-1 init=/usr/lib/systemd/systemd systemd.unit=multi-user.target systemd.getty_auto=0" \
        -drive "file=$work/disk,format=raw,if=virtio,cache=unsafe" -nic user,model=virtio-net-pci \
        -serial "file:$work/console" -serial "file:$work/results" >"$work/qemu.log" 2>&1 &
    local qemu=$! deadline=$((SECONDS + 420))
    until grep -q '^END' "$work/results" || ! kill -0 "$qemu" 2>/dev/null || [ "$SECONDS" -gt "$deadline" ]; do sleep 1; done
    kill "$qemu" 2>/dev/null || true
    wait "$qemu" 2>/dev/null || true
    tr -d '\r' <"$work/results" >"$work/results.txt"
    cat "$work/results.txt"
    seen=$(grep -v '^  ' "$work/results.txt" | sed -n 's/^\(ok\|FAILED\) //p' || true)
    if ! grep -qx 'END' "$work/results.txt" || grep -q '^FAILED' "$work/results.txt" ||
        ! diff <(sed -n 's/^check "\([^"]*\)".*/\1/p' "$root/tests/package/machine.sh") <(printf '%s\n' "$seen"); then
        tail -n 40 "$work/console" "$work/qemu.log"
        gitlab trace "$job" >/dev/null && tail -n 20 "$work/gitlab.d/trace.$job"
        die "the machine with systemd has not seen all that it should"
    fi
    expect_gitlab ok until "$job" failed 10
    gitlab trace "$job" >/dev/null
    expect "the killed job's log" "$(cat "$work/gitlab.d/trace.$job")" 'enough seen'
    [ "$(gitlab managers)" = 0 ] || die "GitLab still knows the machine with systemd"
    echo "figure package.machine_checks $(printf '%s\n' "$seen" | wc -l)"
    say "package: the machine has seen all of it in $((SECONDS - since)) s"
}
