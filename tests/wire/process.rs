//! The daemon as a process: its lock, its signals, its log, and what systemd hears of it.
//!
//! It runs on libvirt's test driver and without an image, so it asks nobody for jobs: what is shown
//! here is the process around the daemon.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the daemon is a process here, and real time passes"
)]

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// For anything that is waited for, on a busy host.
const LIMIT: Duration = Duration::from_secs(60);

const GLANCE: Duration = Duration::from_millis(20);

/// A configuration in a folder of its own.
struct Place(tempfile::TempDir);

/// A running daemon; it is killed when this is dropped.
struct Process(Child);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::write(place.path("token"), "glrt-0123456789abcdefghij\n").unwrap();
        fs::set_permissions(place.path("token"), fs::Permissions::from_mode(0o600)).unwrap();
        place.configure("");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes the file, with these lines at its top.
    fn configure(&self, top: &str) {
        let text = format!(
            "{top}\nstate_directory = \"state\"\nruntime_directory = \"run\"\nimage_directory = \"images\"\n\
             [hypervisor]\nuri = \"test:///default\"\naccel = \"tcg\"\n[[class]]\nname = \"small\"\nimage = \"none\"\n\
             [[runner]]\nname = \"runner\"\nurl = \"http://127.0.0.1:9\"\nallow_insecure_http = true\n\
             token_file = \"token\"\nclass = \"small\"\n"
        );
        fs::write(self.path("config.toml"), text).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dayfly"));
        command.arg("--config").arg(self.path("config.toml")).arg("run").stdin(Stdio::null()).stdout(Stdio::null());
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"] {
            command.env_remove(name);
        }
        command
    }

    /// Starts a daemon that logs to a file, and waits until it says so.
    fn start(&self) -> Process {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let process = Process(self.command().stderr(log).spawn().unwrap());
        self.until_logged("dayfly runs");
        process
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn until_logged(&self, text: &str) {
        assert!(until(|| self.log().contains(text)), "no {text:?} in the log:\n{}", self.log());
    }
}

fn until(condition: impl Fn() -> bool) -> bool {
    let since = Instant::now();
    while !condition() {
        if since.elapsed() > LIMIT {
            return false;
        }
        std::thread::sleep(GLANCE);
    }
    true
}

impl Process {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Its end, and how long that took.
    fn ends(&mut self) -> (ExitStatus, Duration) {
        let since = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return (status, since.elapsed());
            }
            assert!(since.elapsed() < LIMIT, "it does not end");
            std::thread::sleep(GLANCE);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// T33, E11: a second daemon on the same state directory leaves at once and names the first, which notices nothing.
/// E1: the first ends by SIGTERM with 0, within 5 s.
#[test]
fn a_second_daemon_leaves_at_once_and_names_the_first() {
    let place = Place::new();
    let mut first = place.start();
    let before = fs::read(place.path("state/installation.json")).unwrap();
    for _ in 0..3 {
        let since = Instant::now();
        let second = place.command().output().unwrap();
        let (took, said) = (since.elapsed(), String::from_utf8_lossy(&second.stderr).into_owned());
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert_eq!(second.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("process {}", first.0.id())) && said.contains("state"), "{said}");
    }
    assert!(first.lives());
    assert_eq!(fs::read(place.path("state/installation.json")).unwrap(), before);
    assert_eq!(place.log().matches("dayfly runs").count(), 1);
    first.signal(Signal::TERM);
    let (status, took) = first.ends();
    assert_eq!(status.code(), Some(0), "{}", place.log());
    assert!(took <= Duration::from_secs(5), "{took:?}");
    // A lock does not outlive its holder, however that ends.
    let mut next = place.start();
    next.0.kill().unwrap();
    next.ends();
    let mut last = place.start();
    assert!(last.lives());
}

/// What systemd hears within this time.
fn heard(socket: &UnixDatagram, wait: Duration) -> Vec<String> {
    let (since, mut heard) = (Instant::now(), Vec::new());
    loop {
        let left = wait.saturating_sub(since.elapsed());
        if left.is_zero() {
            return heard;
        }
        socket.set_read_timeout(Some(left)).unwrap();
        let mut bytes = [0; 4096];
        if let Ok(read) = socket.recv(&mut bytes) {
            heard.extend(String::from_utf8_lossy(&bytes[..read]).lines().map(str::to_owned));
        }
    }
}

/// E6: systemd's watchdog hears of a loop that turns, and of one that stands still it hears nothing.
#[test]
fn the_watchdog_hears_of_a_loop_that_turns_and_of_no_other() {
    let place = Place::new();
    let path: &Path = &place.path("notify");
    let socket = UnixDatagram::bind(path).unwrap();
    let log = fs::File::create(place.path("log")).unwrap();
    let child = place.command().env("NOTIFY_SOCKET", path).env("WATCHDOG_USEC", "1500000").stderr(log).spawn();
    let mut process = Process(child.unwrap());
    place.until_logged("dayfly runs");
    let turning = heard(&socket, Duration::from_secs(3));
    assert!(turning.contains(&"READY=1".to_owned()), "{turning:?}");
    let beats = |heard: &[String]| heard.iter().filter(|line| *line == "WATCHDOG=1").count();
    assert!((3..=12).contains(&beats(&turning)), "two in each interval, or more: {turning:?}");
    process.signal(Signal::STOP);
    // What was on its way.
    heard(&socket, Duration::from_millis(300));
    assert_eq!(heard(&socket, Duration::from_millis(1600)), [""; 0]);
    process.signal(Signal::CONT);
    assert!(beats(&heard(&socket, Duration::from_secs(2))) >= 1);
    process.signal(Signal::TERM);
    assert_eq!(process.ends().0.code(), Some(0));
    assert!(heard(&socket, Duration::from_millis(100)).contains(&"STOPPING=1".to_owned()));
}

/// E14: whoever reads the log goes away; the daemon goes on, says more to nobody, and ends as it should.
#[test]
fn a_log_that_nobody_reads_any_more_kills_no_daemon() {
    let place = Place::new();
    let mut process = Process(place.command().stderr(Stdio::piped()).spawn().unwrap());
    let mut said = String::new();
    let mut reader = process.0.stderr.take().unwrap();
    while !said.contains("dayfly runs") {
        let mut bytes = [0; 4096];
        let read = reader.read(&mut bytes).unwrap();
        assert!(read > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    drop(reader);
    for _ in 0..20 {
        // Each says a line.
        process.signal(Signal::HUP);
        std::thread::sleep(GLANCE);
    }
    assert!(process.lives());
    process.signal(Signal::TERM);
    let (status, took) = process.ends();
    assert_eq!(status.code(), Some(0));
    assert!(took <= Duration::from_secs(5), "{took:?}");
}

/// T36: what is in the daemon's memory reaches no core dump, whatever the host's limits and its handler of cores.
#[test]
fn a_daemon_that_crashes_leaves_no_core() {
    let place = Place::new();
    let mut process = place.start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.0.id())).unwrap();
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
    // Not SEGV: one that was sent is taken for a full stack first, by Rust's own handler, and ends nothing.
    process.signal(Signal::ABORT);
    let (status, _) = process.ends();
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false));
}

/// E10: SIGHUP reads the file again; one that makes no sense is told with its key, and changes nothing.
#[test]
fn a_hangup_reads_the_configuration_again() {
    let place = Place::new();
    let mut process = place.start();
    place.configure("concurrent = \"many\"");
    process.signal(Signal::HUP);
    place.until_logged("that of before stays");
    assert!(place.log().contains("concurrent"), "{}", place.log());
    place.configure("concurrent = 7");
    fs::remove_file(place.path("token")).unwrap();
    process.signal(Signal::HUP);
    place.until_logged("runner.0.token_file");
    assert!(!place.log().contains("is in force"), "{}", place.log());
    fs::write(place.path("token"), "glrt-0123456789abcdefghij\n").unwrap();
    fs::set_permissions(place.path("token"), fs::Permissions::from_mode(0o600)).unwrap();
    process.signal(Signal::HUP);
    place.until_logged("the new configuration is in force");
    assert!(process.lives());
    let mut status = Command::new(env!("CARGO_BIN_EXE_dayfly"));
    let status = status.arg("--config").arg(place.path("config.toml")).arg("status").output().unwrap();
    let shown = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.status.success() && shown.contains('7'), "{shown}");
    process.signal(Signal::QUIT);
    assert_eq!(process.ends().0.code(), Some(0), "a drain without jobs ends at once");
}

/// For automation: a drain that is waited for is over when the daemon is.
#[test]
fn a_drain_is_waited_for() {
    let place = Place::new();
    let mut process = place.start();
    let mut drain = Command::new(env!("CARGO_BIN_EXE_dayfly"));
    drain.arg("--config").arg(place.path("config.toml")).args(["drain", "--wait"]);
    let drained = drain.output().unwrap();
    assert_eq!(process.ends().0.code(), Some(0));
    let said = String::from_utf8_lossy(&drained.stdout).into_owned();
    assert!(drained.status.success() && said.ends_with("drained: the daemon has ended\n"), "{said}");
}

/// The answer of the status listener at this socket; empty: nobody listens.
fn answer(socket: &Path, path: &str) -> String {
    let mut text = String::new();
    if let Ok(mut stream) = UnixStream::connect(socket) {
        let asked = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: dayfly\r\n\r\n").as_bytes());
        let _ = asked.and_then(|()| stream.read_to_string(&mut text));
    }
    text
}

/// Exit code and output of a command that asks the daemon.
fn told(place: &Place, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dayfly"));
    let output = command.arg("--config").arg(place.path("config.toml")).args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// U19: what a daemon knows is there for whoever scrapes it, over either socket, and for a monitoring that goes by exit
/// codes; a hangup moves the listener, and the end removes it.
#[test]
fn metrics_health_and_a_check_are_served_and_move_with_the_configuration() {
    let place = Place::new();
    let mut daemon = place.start();
    let socket = place.path("run/status.sock");
    let blocked = "dayfly_polls_blocked{runner=\"runner\",reason=\"image\"} 1\n";
    assert!(until(|| answer(&socket, "/metrics").contains(blocked)), "{}", answer(&socket, "/metrics"));
    assert!(answer(&socket, "/healthz").starts_with("HTTP/1.1 200 "));
    let ready = answer(&socket, "/readyz");
    assert!(ready.starts_with("HTTP/1.1 503 ") && ready.contains("no runner can take a job"), "{ready}");
    let (code, text) = told(&place, &["status", "--check"]);
    assert!(code == Some(2) && text.starts_with("problem: runner `runner`: no image `none`"), "{code:?} {text}");
    let (code, text) = told(&place, &["metrics"]);
    assert!(code == Some(0) && text.contains(blocked) && text.contains("dayfly_build_info{"), "{code:?} {text}");
    place.configure("status.listen = \"./elsewhere.sock\"");
    daemon.signal(Signal::HUP);
    let other = place.path("elsewhere.sock");
    assert!(until(|| answer(&other, "/healthz").starts_with("HTTP/1.1 200 ")), "{}", place.log());
    assert!(until(|| !socket.exists()), "{}", place.log());
    // Guests would reach it: the configuration of before stays.
    place.configure("status.listen = \"127.0.0.1:9480\"");
    daemon.signal(Signal::HUP);
    place.until_logged("a job's machine reaches in the network `user`");
    assert!(answer(&other, "/healthz").starts_with("HTTP/1.1 200 "));
    place.configure("");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ends().0.code(), Some(0));
    assert!(!other.exists());
    let (code, text) = told(&place, &["status", "--check"]);
    assert!(code == Some(3) && text.starts_with("unknown: "), "{code:?} {text}");
}
