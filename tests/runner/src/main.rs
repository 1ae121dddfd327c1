//! dayfly's stand-in for the official gitlab-runner: the runner's half of the protocol, for tests,
//! demos and images where the official program cannot be had. Never for production.
//!
//! It takes the arguments and the config.toml of the official one, sends the requests that
//! gitlab-runner 19.3 was recorded to send (docs/protocol.md), and runs jobs with the shell executor and
//! bash, or in containers ([`containers`]: very little of what the official docker executor does). It is a program of its own, blocking and on another HTTP implementation than the daemon's,
//! so that a mistake in one does not hide in the other. It says in its version and in the first line
//! of every job's log that it is a stand-in.
//!
//! The way of a job: [`single`] asks for it, [`job`] walks through its stages, each a bash script
//! from [`script`] or [`sources`] that [`process`] runs; output passes [`masking`] and [`lines`] into
//! the [`trace`], which [`reporter`] carries to GitLab. [`control`] knows who wants the job stopped.
//! Artifacts move in processes of their own ([`artifacts`]), as in the official runner.
//!
//! For images it is linked statically (give it IP addresses, not names) and installed as `gitlab-runner`:
//!
//! ```text
//! RUSTFLAGS="-C target-feature=+crt-static" \
//!     cargo build --release -p dayfly-test-runner --target x86_64-unknown-linux-gnu
//! ```
//!
//! Not there, and said in the log where a job asks for it: secrets, job inputs, native
//! steps, terminals.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a blocking program of its own: it has no Tokio, and starting bash is its business"
)]

mod api;
mod artifacts;
mod cache;
mod cli;
mod config;
mod containers;
mod control;
mod duration;
mod info;
mod job;
mod lines;
mod masking;
mod payload;
mod process;
mod reporter;
mod script;
mod single;
mod sources;
mod trace;
mod utf8;
mod variables;

use std::process::ExitCode;

/// The version that GitLab, the log and `--version` are told: the protocol spoken, and that it is a stand-in.
pub(crate) const VERSION: &str = "19.3.0-standin";
/// In place of the official runner's commit.
pub(crate) const REVISION: &str = "dayfly";

fn main() -> ExitCode {
    match cli::run(std::env::args_os().skip(1)) {
        Ok(code) => code,
        Err(error) => {
            log(&format!("FATAL: {}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Writes one line for the operator. Standard error only: the official runner's standard output stays
/// empty in all recorded runs.
pub(crate) fn log(line: &str) {
    eprintln!("{line}");
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Locks a mutex, also one whose holder panicked: all states here are whole between statements.
pub(crate) fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// `count` lower-case hex digits from the system's random source.
pub(crate) fn random_hex(count: usize) -> String {
    let mut bytes = vec![0u8; count.div_ceil(2)];
    getrandom::fill(&mut bytes).expect("Linux always has random bytes");
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(count);
    text
}
