//! One life of the real daemon: a process, started with or without a point to die at, and how it ended.

use dayfly_doubles::failpoints;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// A hand-over may take this long (threats.md E1).
const HAND_OVER_LIMIT: Duration = Duration::from_secs(5);

/// The jobs of a round take some seconds, and to end them may take 30 (threats.md E2).
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// SIGKILL takes no time, but the machine may be busy.
const BURIAL_LIMIT: Duration = Duration::from_secs(20);

/// What `dayfly status` prints.
pub(crate) async fn status(program: &Path, config: &Path) -> io::Result<String> {
    #[expect(clippy::disallowed_methods, reason = "the program under test; it ends within milliseconds")]
    let mut command = Command::new(program);
    let output = command.arg("--config").arg(config).arg("status").env_clear().kill_on_drop(true).output().await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A daemon that has been started.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
    /// Length of the log when it was started.
    log_from: u64,
}

impl Daemon {
    /// Starts it. `failpoint`: where it is to die, as `K8:3`.
    pub(crate) fn start(program: &Path, config: &Path, log: &Path, failpoint: Option<&str>) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        let log_from = file.metadata()?.len();
        #[expect(clippy::disallowed_methods, reason = "the daemon under test; ended by each round, or with us")]
        let mut command = Command::new(program);
        command.arg("--config").arg(config).arg("run").env_clear();
        // For qemu-img.
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        if let Some(failpoint) = failpoint {
            command.env(failpoints::VARIABLE, failpoint);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).kill_on_drop(true);
        Ok(Self { child: command.spawn()?, log: log.to_owned(), log_from })
    }

    /// Whether it is still there; else how it ended.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits until it has died at the point that it was started with; `false`: not within `limit`.
    pub(crate) async fn died_at(&mut self, point: &str, limit: Duration) -> Result<bool, String> {
        let Ok(ended) = timeout(limit, self.child.wait()).await else { return Ok(false) };
        let status = ended.map_err(|error| format!("wait for the daemon: {error}"))?;
        let said = format!("{}{point}", failpoints::DIED_AT);
        if status.signal() == Some(9) && self.story()?.lines().any(|line| line == said) {
            return Ok(true);
        }
        Err(format!("the daemon ended with {status}, not at {point}"))
    }

    /// Kills it.
    pub(crate) async fn kill(mut self) -> Result<(), String> {
        if let Some(status) = self.ended().map_err(|error| format!("look at the daemon: {error}"))? {
            return Err(format!("the daemon had ended with {status} before it was killed"));
        }
        self.child.start_kill().map_err(|error| format!("kill the daemon: {error}"))?;
        let ended = timeout(BURIAL_LIMIT, self.child.wait()).await;
        let status = ended.map_err(|_| "the daemon survived SIGKILL")?;
        let status = status.map_err(|error| format!("wait for the daemon: {error}"))?;
        if status.signal() == Some(9) { Ok(()) } else { Err(format!("the daemon ended with {status}, not by SIGKILL")) }
    }

    /// Tells it to hand over: it must end well, and soon.
    pub(crate) async fn hand_over(self) -> Result<(), String> {
        self.signal(Signal::TERM)?;
        self.ends_well("hand-over", HAND_OVER_LIMIT).await
    }

    /// Tells it to finish its jobs and end; `cut`: after this time, to end them at once.
    pub(crate) async fn drain(self, cut: Option<Duration>) -> Result<(), String> {
        self.signal(Signal::QUIT)?;
        if let Some(after) = cut {
            sleep(after).await;
            self.signal(Signal::QUIT)?;
        }
        self.ends_well("drain", DRAIN_LIMIT).await
    }

    /// Waits for the end of one that must not begin at all.
    pub(crate) async fn until_refused(mut self) -> Result<(), String> {
        let ended = timeout(HAND_OVER_LIMIT, self.child.wait()).await;
        let status = ended.map_err(|_| "a second daemon on the same directory did not end")?;
        let status = status.map_err(|error| format!("wait for the second daemon: {error}"))?;
        let said = self.story()?;
        if status.code() == Some(1) && said.contains("another dayfly (process ") {
            return Ok(());
        }
        Err(format!("a second daemon on the same directory ended with {status}: {said}"))
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let pid = pid.ok_or("the daemon had ended before it was told to")?;
        kill_process(pid, signal).map_err(|error| format!("send {signal:?}: {error}"))
    }

    async fn ends_well(mut self, what: &str, limit: Duration) -> Result<(), String> {
        let since = Instant::now();
        match timeout(limit, self.child.wait()).await {
            Err(_) => Err(format!("a {what} took more than {limit:?}")),
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(status) => Err(format!("a {what} ended with {status:?} after {:?}", since.elapsed())),
        }
    }

    /// What this life has logged.
    fn story(&self) -> Result<String, String> {
        let log = fs::read(&self.log).map_err(|error| format!("read the log: {error}"))?;
        let from = usize::try_from(self.log_from).unwrap_or(0).min(log.len());
        Ok(String::from_utf8_lossy(&log[from..]).into_owned())
    }
}
