//! `dayfly-init`: the `/init` of the initrd. Loads the modules that the root disk and the guest's
//! wires need, mounts the root file system and becomes the real init.
//!
//! It runs with nothing else in the world: no shell, no libc, no udev. `/modules` lists the module
//! files in load order; `root=`, `rootfstype=` and `init=` come from the kernel command line.

use dayfly_guest::modules;
use dayfly_guest_config::PROOF_WORD;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};
use rustix::system::{RebootCommand, reboot};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Virtio disks show up within milliseconds of their driver.
const DISK_DEADLINE_STEPS: u32 = 1000;

/// One step of waiting for the disk.
const STEP: Duration = Duration::from_millis(5);

/// From a failure to the end of the machine: time for the console to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why the root could not be entered.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("mount {0}: {1}")]
    Mount(String, io::Error),
    #[error("read {0}: {1}")]
    Read(&'static str, io::Error),
    #[error("load module {0}: {1}")]
    Module(String, io::Error),
    #[error("no {disk} within {} s", (STEP * DISK_DEADLINE_STEPS).as_secs())]
    NoDisk { disk: String },
    #[error("enter the root file system: {0}")]
    Enter(io::Error),
    /// Nothing failed: a kernel and its init run here, which is all that was asked.
    #[error("a guest runs here")]
    Proof,
    #[error("start {0}: {1}")]
    Exec(String, io::Error),
}

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
struct Boot {
    root: String,
    root_type: String,
    init: String,
}

#[expect(clippy::disallowed_methods, reason = "there is no runtime in an initrd")]
fn main() {
    let error = run();
    // The console is our stdout; if it is not, there is no other.
    let _ = writeln!(io::stdout(), "dayfly-init: {error}\r");
    thread::sleep(LAST_WORDS);
    let _ = reboot(RebootCommand::PowerOff);
}

/// Returns only if something failed.
fn run() -> InitError {
    match enter() {
        Err(error) => error,
        Ok(init) => InitError::Exec(init.clone(), exec(&init)),
    }
}

fn enter() -> Result<String, InitError> {
    mount_at("devtmpfs", "/dev", "devtmpfs")?;
    mount_at("proc", "/proc", "proc")?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(|error| InitError::Read("/proc/cmdline", error))?;
    if cmdline.split_whitespace().any(|word| word == PROOF_WORD) {
        return Err(InitError::Proof);
    }
    let boot = parse(&cmdline);

    let modules = std::fs::read_to_string("/modules").map_err(|error| InitError::Read("/modules", error))?;
    for module in modules.lines().filter(|line| !line.is_empty()) {
        load(module)?;
    }
    wait_for(&boot.root)?;
    // The guest owns its overlay, and nothing reads access times.
    let flags = MountFlags::NOATIME;
    mount(boot.root.as_str(), "/root", boot.root_type.as_str(), flags, None)
        .map_err(|error| InitError::Mount(boot.root.clone(), error.into()))?;
    mount_move("/dev", "/root/dev").map_err(|error| InitError::Mount("/root/dev".into(), error.into()))?;
    // systemd mounts its own /proc; ours must not stay below the new root.
    rustix::mount::unmount("/proc", rustix::mount::UnmountFlags::DETACH)
        .map_err(|error| InitError::Enter(error.into()))?;
    let switch = || {
        chdir("/root")?;
        mount_move(".", "/")?;
        chroot(".")?;
        chdir("/")
    };
    switch().map_err(|error| InitError::Enter(error.into()))?;
    Ok(boot.init)
}

fn mount_at(source: &str, target: &str, kind: &str) -> Result<(), InitError> {
    mount(source, target, kind, MountFlags::empty(), None)
        .map_err(|error| InitError::Mount(target.into(), error.into()))
}

fn load(module: &str) -> Result<(), InitError> {
    modules::load_file(Path::new(module)).map_err(|error| InitError::Module(module.to_owned(), error.into()))
}

#[expect(clippy::disallowed_methods, reason = "there is no runtime in an initrd")]
fn wait_for(disk: &str) -> Result<(), InitError> {
    for _ in 0..DISK_DEADLINE_STEPS {
        if Path::new(disk).exists() {
            return Ok(());
        }
        thread::sleep(STEP);
    }
    Err(InitError::NoDisk { disk: disk.to_owned() })
}

#[expect(clippy::disallowed_methods, reason = "it becomes init, it starts no child")]
fn exec(init: &str) -> io::Error {
    std::process::Command::new(init).exec()
}

fn parse(cmdline: &str) -> Boot {
    let value = |key: &str, default: &str| {
        let mut values = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        values.next_back().unwrap_or(default).to_owned() // the last one wins, as in the kernel
    };
    Boot {
        root: value("root", "/dev/vda"),
        root_type: value("rootfstype", "ext4"),
        init: value("init", "/usr/lib/systemd/systemd"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_what_to_mount_and_run() {
        let boot = parse("console=ttyS0 root=/dev/vdb1 rootfstype=xfs rootflags=x quiet root=/dev/vdc\n");
        assert_eq!(
            boot,
            Boot { root: "/dev/vdc".into(), root_type: "xfs".into(), init: "/usr/lib/systemd/systemd".into() }
        );
        assert_eq!(parse("init=/bin/sh systemd.unit=a.target").init, "/bin/sh");
        assert_eq!(parse("").root, "/dev/vda");
    }
}
