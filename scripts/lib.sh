# Shared by the scripts: packages, toolchain, builds, and the user that tests run as.
# Source it; it only defines functions and these variables.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
# Programs that run inside a guest are linked statically.
guest_target=x86_64-unknown-linux-gnu
# What the workspace needs (`rust-version` in Cargo.toml).
rust_needed=1.90

# Variables by which an operator configures a dayfly, or names its libvirt, end here: what the scripts build and start
# is told what it needs by name. Those that the scripts take themselves stay.
for _name in $(compgen -e | grep '^DAYFLY_' || true) LIBVIRT_DEFAULT_URI; do
    case $_name in DAYFLY_PROFILE | DAYFLY_ACCEL | DAYFLY_GITLAB_RUNNER | DAYFLY_TEST_* | DAYFLY_E2E_*) ;; *) unset "$_name" ;; esac
done

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# as_root COMMAND...: runs it as root, through sudo where we are not.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"
    else die "this step needs root: run \`$*\` as root, or install sudo"; fi
}

# need_packages NAME...: installs the Debian packages that are missing.
need_packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "packages are missing and this is no Debian: ${missing[*]}"
    say "installing ${missing[*]}"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# What building needs, and what running guests and making images needs.
build_packages=(build-essential pkg-config libvirt-dev)
guest_packages=(qemu-system-x86 qemu-utils mmdebstrap uidmap e2fsprogs cpio git ca-certificates)
host_packages=("${guest_packages[@]}" libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-clients
    dbus)
# What tests have in network namespaces of their own.
network_packages=(iproute2 iptables nftables)

# need_cargo: a Rust that is new enough, by rustup where it can be reached.
need_cargo() {
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    local found
    found=$(cargo --version 2>/dev/null | cut -d' ' -f2)
    if [ -n "$found" ] && [ "$(printf '%s\n%s\n' "$rust_needed" "$found" | sort -V | head -1)" = "$rust_needed" ]; then return; fi
    need_packages curl ca-certificates
    if curl --proto '=https' --tlsv1.2 -sSf --max-time 20 https://sh.rustup.rs -o /tmp/rustup-init.$$ 2>/dev/null; then
        say "installing Rust by rustup"
        sh /tmp/rustup-init.$$ -y --profile minimal --component clippy,rustfmt >/dev/null; rm -f /tmp/rustup-init.$$
        . "$HOME/.cargo/env"
        return
    fi
    die "Rust ${found:-is missing; version} ${found:+is too old; }$rust_needed or newer is needed (Debian 12's is 1.63): install it from https://rustup.rs"
}

# programs_of PROFILE: where Cargo puts the programs of that profile.
programs_of() { if [ "$1" = dev ]; then echo "$target/debug"; else echo "$target/$1"; fi; }

# build_guest_programs: the static programs of the guest, and the stand-in runner.
build_guest_programs() {
    say "building the guest's programs"
    (cd "$root" && RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked -q --release --target "$guest_target" \
        -p dayfly-guest -p dayfly-test-runner)
}

# stage PROFILE DIRECTORY: dayfly, dayfly-exec and the guest's programs side by side, as an installation has them.
stage() {
    local from dir=$2
    from=$(programs_of "$1")
    mkdir -p "$dir"
    install -m 755 "$from/dayfly" "$from/dayfly-exec" "$dir"
    local program
    for program in dayfly-guest dayfly-init dayfly-standin-runner; do
        install -m 755 "$target/$guest_target/release/$program" "$dir/$program"
    done
}

# prepare_trial: a folder `$trial` for programs, images and their work, and the user that uses it:
# ourselves, or as root the user dayfly-test, because root's `qemu:///session` is the system's libvirtd.
prepare_trial() {
    if [ "$(id -u)" = 0 ]; then
        make_test_user
        open_kvm_node
        trial=/var/tmp/dayfly-trial
    else
        trial=${XDG_CACHE_HOME:-$HOME/.cache}/dayfly-trial
    fi
    mkdir -p "$trial/bin" "$trial/images"
    if [ -n "${DAYFLY_GITLAB_RUNNER:-}" ] && [ "$DAYFLY_GITLAB_RUNNER" != "$trial/gitlab-runner" ]; then
        # Where the trial's user can read it.
        install -m 755 "$DAYFLY_GITLAB_RUNNER" "$trial/gitlab-runner"
        export DAYFLY_GITLAB_RUNNER=$trial/gitlab-runner
    fi
    # Whatever is installed on this machine, and whatever its configuration says, the trial has its own.
    cat >"$trial/config.toml" <<END
state_directory = "$trial/state"
runtime_directory = "$trial/run"
image_directory = "$trial/images"

[hypervisor]
$(if [ "$trial_libvirt" = none ]; then echo 'backend = "qemu"'; else echo "uri = \"$trial_libvirt\""; fi)

[[class]]
name = "trial"
image = "$trial_image"
allow_standin_runner = true
END
    own_trial
}

# What the scripts run guests with (`none`: QEMU without libvirt), and in.
trial_libvirt=qemu:///session
trial_image=debian-12-shell

own_trial() {
    if [ "$(id -u)" = 0 ]; then chown -R "$LIBVIRT_TEST_USER:" "$trial"; fi
    chmod 755 "$trial" "$trial/images"
}

# as_trial PROGRAM ARGS...: as the user of the trial, in its folder, without the variables that are for the scripts.
as_trial() {
    local clean=(env -u DAYFLY_PROFILE -u DAYFLY_ACCEL)
    if [ "$(id -u)" = 0 ]; then (cd "$trial" && as_test_user "${clean[@]}" "$@"); else (cd "$trial" && "${clean[@]}" "$@"); fi
}

# trial_dayfly ARGS...: the trial's dayfly with the trial's configuration, never the installed one.
trial_dayfly() { as_trial "$trial/bin/dayfly" --config "$trial/config.toml" "$@"; }

# choose_accel: `auto` where `dayfly doctor` saw KVM run a guest, by the same proof as everything else, else `tcg`,
# which isolates nothing and is said loudly, with what doctor has found.
choose_accel() {
    local found
    found=$(trial_dayfly doctor 2>/dev/null | grep -E 'KVM (runs guests|is not proven)|no KVM here|no /dev/kvm' || true)
    case $found in
        *'KVM runs guests'*) echo auto ;;
        *)
            say "KVM runs no guests here: using TCG, which is slow and isolates NOTHING"
            [ -z "$found" ] || printf '%s\n' "$found" >&2
            echo tcg
            ;;
    esac
}

# make_image: the trial's image, with `$accel`. Its own kernel is the last proof of KVM: what refutes that is no reason
# to stop, for the trial runs under TCG as well.
make_image() {
    local log
    log=$(mktemp)
    if build_image 2>&1 | tee "$log" >&2; then
        rm -f "$log"
    elif [ "$accel" = auto ] && grep -q 'prove KVM by a boot' "$log"; then
        rm -f "$log"
        say "the image's kernel does not run under KVM here: using TCG, which is slow and isolates NOTHING"
        accel=tcg
        build_image
    else
        rm -f "$log"
        return 1
    fi
}

build_image() { build_trial_image "$trial_image"; }

# build_trial_image [FLAGS] RECIPE: an image of the trial, boot-tested with `$accel`.
build_trial_image() { trial_dayfly image --libvirt "$trial_libvirt" --accel "$accel" build "$@"; }

# example_job: the job `hello` of examples/hello, with the image of the trial. Its log is the output.
example_job() {
    rm -rf "$trial/hello" && cp -r "$root/examples/hello" "$trial/hello"
    own_trial
    trial_job "$trial/hello" "$trial_image" hello
}

# trial_job DIRECTORY IMAGE JOB [OPTION...]: a job of the pipeline file in that directory, which is made a git repository
# of its own, by `dayfly exec` in a VM of that image of the trial, with these options. Its log is the output.
trial_job() {
    as_trial sh -ec 'cd "$1"; git init -q -b main; git add -A
        git -c user.name=dayfly -c user.email=dayfly@localhost commit -q --allow-empty -m example' sh "$1" >&2
    local directory=$1 image=$2 job=$3
    shift 3
    as_trial sh -ec 'cd "$1"; shift; exec "$@"' sh "$directory" \
        "$trial/bin/dayfly" --config "$trial/config.toml" exec --image-directory "$trial/images" --image "$image" \
        --libvirt "$trial_libvirt" --accel "$accel" "$@" "$job"
}
