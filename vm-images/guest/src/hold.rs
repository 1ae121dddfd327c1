//! Waiting for a job without being anybody: what a machine does before it is frozen, and as whatever is restored from that.
//!
//! The runner is started by a config that makes the machine nobody ([`GuestConfig::hold`]) and stands at the relay, which
//! knows no door; what a job is about to need has run once, so that it is in memory. Then the machine waits for the
//! config that is its own. Many machines may wait as this one: nothing that one of them must have for itself is made, or
//! read from the kernel's random numbers, before that config is here.
#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "no async runtime in the guest")]

use crate::channel::Line;
use dayfly_guest_config::{ConfigError, GuestConfig};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// What each job begins with: a login shell, git's programs, and the small ones of the runner's scripts. Nobody listens
/// at that port.
const WARM_UP: &str = r#"d=$(mktemp -d) && cd "$d" && git init -q . && git config a.b c
git fetch -q http://192.0.2.1:9/ ; git checkout -q -f x ; git clean -q -f ; git --version
id; hostname; echo x | grep x; mkdir y; touch y/z; sleep 0; cd / && rm -rf "$d""#;

/// Under TCG it takes 2 s.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(60);

/// How often it is looked for the end of that.
const GLANCE: Duration = Duration::from_millis(20);

/// Why a machine that waits does not become somebody.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Nobody has told it who it is.
    #[error("no guest config within {} min", .0.as_secs() / 60)]
    NoConfig(Duration),
    /// What came is none.
    #[error("read guest config")]
    Config(#[from] ConfigError),
    /// Its runner is another one.
    #[error("the guest config has another runner than the one that waits here")]
    OtherRunner,
}

/// Runs what jobs begin with once, as this user. What becomes of it does not matter.
pub fn warm_up(user: &str) {
    let started = Command::new("/proc/self/exe")
        .args(["run-as", user, "--", "/bin/bash", "--login", "-c", WARM_UP])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = started else { return };
    let since = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if since.elapsed() >= WARM_UP_DEADLINE {
            // An error: it has ended by itself.
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        thread::sleep(GLANCE);
    }
}

/// The config that makes the machine somebody. The one of before may come again, and a torn one before it.
///
/// # Errors
/// [`HoldError`].
pub fn config(lines: &Receiver<Line>, held: &GuestConfig, patience: Duration) -> Result<GuestConfig, HoldError> {
    let since = Instant::now();
    loop {
        let line = match lines.recv_timeout(patience.saturating_sub(since.elapsed())) {
            Ok(Line::Whole(line)) => line,
            Ok(Line::TooLong) => continue,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(HoldError::NoConfig(patience));
            }
        };
        match GuestConfig::from_line(&line) {
            Ok(config) if config.hold => {}
            Ok(config) if config.runner != held.runner => return Err(HoldError::OtherRunner),
            Ok(config) => return Ok(config),
            Err(ConfigError::Json(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    const SHORT: Duration = Duration::from_millis(20);

    fn held() -> GuestConfig {
        GuestConfig::from_line(include_bytes!("../tests/config.json")).map(|c| GuestConfig { hold: true, ..c }).unwrap()
    }

    fn own() -> GuestConfig {
        GuestConfig { vm: "b".repeat(16), hold: false, ..held() }
    }

    fn heard(lines: Vec<Vec<u8>>) -> Result<String, String> {
        let (said, inbox) = sync_channel(8);
        for line in lines {
            said.send(Line::Whole(line)).unwrap();
        }
        config(&inbox, &held(), SHORT).map(|config| config.vm).map_err(|error| error.to_string())
    }

    #[test]
    fn a_machine_that_waits_takes_the_first_config_of_its_own() {
        let torn = own().to_line()[..40].to_vec();
        assert_eq!(heard(vec![held().to_line(), torn, held().to_line(), own().to_line()]), Ok("b".repeat(16)));
        assert_eq!(heard(vec![held().to_line()]), Err("no guest config within 0 min".into()));
    }

    /// Its runner has read its files: another one's job would run with what this one was told.
    #[test]
    fn the_config_of_another_runner_is_refused() {
        let mut other = own();
        other.runner.config_toml.push('\n');
        let error = heard(vec![other.to_line(), own().to_line()]).unwrap_err();
        assert_eq!(error, "the guest config has another runner than the one that waits here");
    }
}
