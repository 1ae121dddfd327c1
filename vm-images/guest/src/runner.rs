//! The guest runner: one official `gitlab-runner run-single`, as the job's user, in a session and an
//! environment of its own.
//!
//! The user is changed by this program started again (`dayfly-guest run-as USER -- PROGRAM…`): std
//! cannot set supplementary groups, and changing ids is safe only in a process of one thread.
#![expect(clippy::disallowed_methods, reason = "no process.rs and no runtime in the guest")]

use crate::console;
use crate::users::{self, User};
use dayfly_guest_config::{CONFIG_FILE, GuestRunner};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit, setsid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

/// Where an image has the official runner.
pub const PROGRAM: &str = "/usr/bin/gitlab-runner";

/// Where the runner has its temporary files: a file system of its own, in memory. The official runner keeps the trace
/// there, and stops sending it, and its verdict, when the disk is full: a job may fill the disk, and its author is to
/// read that. The job's shells unset `TMPDIR` where it names this (the image's `/etc/profile`).
pub const ROOM: &str = "/run/dayfly/runner";

/// Bytes of it at most; the official runner keeps 4 MiB of trace unless told otherwise. Memory is taken as it is used.
const ROOM_MIB: u32 = 256;

/// Makes [`ROOM`] for this user.
///
/// # Errors
/// The system's: the runner then does without.
pub fn make_room(user: &User) -> io::Result<()> {
    std::fs::create_dir_all(ROOM)?;
    let options = format!("size={ROOM_MIB}m,mode=0700,uid={},gid={}", user.uid, user.gid);
    let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("dayfly-runner", ROOM, "tmpfs", flags, options.as_c_str()).inspect_err(|_| {
        // By its directory the runner's start knows whether it is there.
        let _ = std::fs::remove_dir(ROOM);
    })?;
    Ok(())
}

/// By this variable [`run_as`] is told of them.
const OPEN_FILES: &str = "OPEN_FILES";

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How many files this machine lets a program open that does not ask for more. This program may ask for more; a job's do
/// that by themselves.
#[derive(Clone, Copy, Debug)]
pub struct OpenFiles(Option<u64>);

impl OpenFiles {
    /// Those of this program, now.
    #[must_use]
    pub fn now() -> Self {
        Self(getrlimit(Resource::Nofile).current)
    }
}

/// Starts the runner; its log goes to the console.
///
/// # Errors
/// The system's.
pub fn start(runner: &GuestRunner, files: OpenFiles) -> io::Result<Child> {
    let console = || console::open().map_or_else(|_| Stdio::null(), Stdio::from);
    Command::new("/proc/self/exe")
        .args(["run-as", &runner.user, "--"])
        .args(arguments(runner))
        .env_clear()
        .envs(files.0.map(|files| (OPEN_FILES, files.to_string())))
        .stdin(Stdio::null())
        .stdout(console())
        .stderr(console())
        .spawn()
}

/// Program and arguments. Never `--shutdown-timeout`: the official runner panics on it.
fn arguments(runner: &GuestRunner) -> Vec<String> {
    let wait = runner.wait_timeout_s.to_string();
    let fixed =
        [PROGRAM, "run-single", "-c", CONFIG_FILE, "-r", &runner.name, "--max-builds", "1", "--wait-timeout", &wait];
    fixed.map(str::to_owned).to_vec()
}

/// The exit code, or 128 + n for signal n.
#[must_use]
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// Becomes the user and then the program: `run-as USER -- PROGRAM ARGUMENT…`.
///
/// # Errors
/// If anything fails; on success it does not return.
pub fn run_as(arguments: &[OsString]) -> io::Result<Infallible> {
    let [user, dashes, program, arguments @ ..] = arguments else {
        return Err(io::Error::other("run-as USER -- PROGRAM [ARGUMENT…]"));
    };
    let user = user.to_str().filter(|_| dashes == "--").ok_or(io::ErrorKind::InvalidInput)?;
    let user = users::find(Path::new("/etc"), user).map_err(io::Error::other)?;

    // Our unit shields us from the OOM killer; the job must not inherit that.
    std::fs::write("/proc/self/oom_score_adj", "0")?;
    setsid()?;
    if let Some(files) = std::env::var(OPEN_FILES).ok().and_then(|files| files.parse().ok()) {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(files), ..limit })?;
    }
    become_user(&user)?;
    let room = Path::new(ROOM).is_dir().then_some(("TMPDIR", ROOM));
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(room)
        .env("PATH", PATH)
        .env("HOME", &user.home) // 17.5 dies without it
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .env("LANG", "C.UTF-8")
        .current_dir(&user.home)
        .exec();
    Err(error)
}

fn become_user(user: &User) -> io::Result<()> {
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups)?;
    let gid = Gid::from_raw(user.gid);
    set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(user.uid);
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runner_gets_the_arguments_that_were_proven() {
        let runner = GuestRunner {
            config_toml: String::new(),
            ca_pem: None,
            name: "-odd \"name\"".into(),
            user: "ci".into(),
            wait_timeout_s: 360,
        };
        assert_eq!(
            arguments(&runner).join(" "),
            "/usr/bin/gitlab-runner run-single -c /etc/gitlab-runner/config.toml -r -odd \"name\" --max-builds 1 --wait-timeout 360"
        );
    }

    #[test]
    fn an_exit_by_signal_has_the_shells_number() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
