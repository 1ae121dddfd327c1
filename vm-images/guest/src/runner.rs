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
use rustix::process::{Gid, Pid, Resource, Rlimit, Signal, Uid, getrlimit, kill_process, setrlimit, setsid};
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

/// How often a session is looked through while it is ended: what is there may make more of itself meanwhile.
const ENDING_ROUNDS: u32 = 5;

/// Ends the runner of this process id, and all that is in its session or belongs to it. What has left it lives on.
pub fn end(leader: u32) {
    for _ in 0..ENDING_ROUNDS {
        let all = in_session(Path::new("/proc"), leader);
        if all.is_empty() {
            return;
        }
        for process in all {
            let Some(process) = i32::try_from(process).ok().and_then(Pid::from_raw) else { continue };
            // It may be gone by now.
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

/// The processes of a session, by the file `stat` of each.
fn in_session(proc: &Path, leader: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(proc) else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let of_session = |process: &u32| {
        let stat = std::fs::read_to_string(proc.join(process.to_string()).join("stat")).unwrap_or_default();
        // Behind the name, which may hold anything: state, parent, group, session.
        let session = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(3)?.parse::<u32>().ok());
        session == Some(leader)
    };
    numbers.filter(of_session).collect()
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
    fn a_session_is_known_by_its_leader_whatever_its_processes_are_called() {
        let proc = tempfile::tempdir().unwrap();
        for (process, stat) in [
            ("7", "7 (gitlab-runner) S 1 7 7 0 -1"),
            ("8", "8 (a) b) R 1 1 1) S 7 8 7 0 -1"),
            ("9", "9 (other) S 1 9 9 0 -1"),
        ] {
            std::fs::create_dir(proc.path().join(process)).unwrap();
            std::fs::write(proc.path().join(process).join("stat"), stat).unwrap();
        }
        std::fs::create_dir(proc.path().join("self")).unwrap();
        let mut found = in_session(proc.path(), 7);
        found.sort_unstable();
        assert_eq!(found, [7, 8]);
    }

    #[test]
    fn an_exit_by_signal_has_the_shells_number() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
