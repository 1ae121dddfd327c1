//! What may the operator tell a running daemon? Status, metrics, jobs, drain and kill, over a unix socket.
//!
//! The socket is `control.sock` in the runtime directory, mode 0600: only the daemon's own user
//! and root reach it, and the group of operators that is configured; no guest and no network ever (threats.md T35). One request a connection, one
//! line of JSON each way, so that `nc -U` will do where `dayfly` is not at hand:
//!
//! ```text
//! {"command":"status"}   {"command":"metrics"}   {"command":"drain"}   {"command":"kill","job":42,"runner":"ci"}
//! {"command":"jobs","ended_max":100}   {"command":"job","job":42}   {"command":"console","job":42,"from":0}
//! {"command":"caches"}   {"command":"cache_show","whose":"group/project"}   {"command":"cache_clear","whose":"42","key":"deps"}
//! {"command":"console_log","job":42}   {"command":"shell","job":42,"rows":24,"columns":80,"term":"xterm"}
//! {"command":"suggest","class":"default","days":7}
//! ```
//!
//! [`serve`] is one task that takes one connection at a time; sizes and times are bounded, so the
//! worst that a stuck client can do is to delay the next one by [`EXCHANGE_DEADLINE`]. A shell goes on behind its answer,
//! beside the others' exchanges: see [`crate::shell`].

mod client;
mod group;
mod server;

pub use client::{ControlError, call, open};
pub use group::{Config, OPEN_TO_GROUP, group_id, user_id};
pub use server::{ControlHandler, ControlSocket, Opened, ServeError, ShellWish, bind, serve};

use crate::cache::{CacheList, CachesFound};
use crate::gitlab::JobId;
use crate::history::Suggestion;
use crate::shell::ShellOutcome;
use crate::status::{ConsoleFound, JobFound, JobList, StatusReport};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// From accepting a connection to the last byte of its answer. People wait at the other end.
pub const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);

/// Bytes of a request line; the longest real one names a job and a runner.
const REQUEST_BYTES_MAX: u64 = 4 * 1024;

/// Bytes of an answer line: a status of some thousand jobs.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The socket of the daemon with this runtime directory.
#[must_use]
pub fn socket(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("control.sock")
}

/// Characters of the reason for a kill at most: a sentence or two.
const REASON_CHARACTERS_MAX: usize = 300;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How are you?
    Status,
    /// What have you counted?
    Metrics,
    /// Which jobs are under way, and how did those of before end?
    Jobs {
        /// So many ended ones at most, newest first; none: only those under way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ended_max: Option<u32>,
    },
    /// What is known of this job?
    Job {
        /// The job.
        job: JobId,
        /// Its runner entry; needed only if several have, or had, a job of this id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        runner: Option<String>,
    },
    /// What does its machine's console say?
    Console {
        /// The job.
        job: JobId,
        /// As above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        runner: Option<String>,
        /// From where so many bytes were printed; none: its end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<u64>,
    },
    /// What is kept for later jobs (`cache:`)?
    Caches,
    /// What is kept for jobs of this project?
    CacheShow {
        /// Its path, its number, the name of several, or an id of the list.
        whose: String,
    },
    /// Throw caches away.
    CacheClear {
        /// As above; none: everybody's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        whose: Option<String>,
        /// Only those of this key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<String>,
    },
    /// What is kept of all that its machine's console has said?
    ConsoleLog {
        /// The job.
        job: JobId,
        /// As above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        runner: Option<String>,
    },
    /// A shell in its machine, on this connection.
    Shell {
        /// The job.
        job: JobId,
        /// As above.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        runner: Option<String>,
        /// Rows of the operator's terminal.
        rows: u16,
        /// Columns of it.
        columns: u16,
        /// Its `TERM`.
        term: String,
    },
    /// What have jobs of this class reached, and which list would let them?
    Suggest {
        /// The class.
        class: String,
        /// In the last so many days.
        days: u32,
    },
    /// Take no more jobs, finish those you have, then end.
    Drain,
    /// End this job now, with an honest verdict.
    Kill {
        /// The job.
        job: JobId,
        /// Its runner entry; needed only if several GitLabs have a job of this id here.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        runner: Option<String>,
        /// What its author reads of the reason.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To `status`.
    Status {
        /// The report.
        status: Box<StatusReport>,
    },
    /// To `metrics`.
    Metrics {
        /// All of them, in the Prometheus text format.
        text: String,
    },
    /// To `jobs`.
    Jobs {
        /// The jobs.
        #[serde(flatten)]
        jobs: Box<JobList>,
    },
    /// To `job`.
    Job {
        /// What is known.
        #[serde(flatten)]
        found: JobFound,
    },
    /// To `console`.
    Console {
        /// What it says.
        #[serde(flatten)]
        found: ConsoleFound,
    },
    /// To `caches`; none: none are kept here.
    Caches {
        /// What is kept.
        list: Option<Box<CacheList>>,
    },
    /// To `cache_show` and `cache_clear`.
    Cache {
        /// What was found, or became of it.
        #[serde(flatten)]
        found: CachesFound,
    },
    /// To `shell`: what follows, if it is opened, is the shell's.
    Shell {
        /// What becomes of it.
        #[serde(flatten)]
        outcome: ShellOutcome,
    },
    /// To `suggest`.
    Suggest {
        /// The list.
        #[serde(flatten)]
        suggestion: Suggestion,
    },
    /// To `drain`: it has begun, or had begun before.
    Draining {
        /// Jobs whose machines were kept for an operator: the drain ends them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        kept: Vec<JobId>,
    },
    /// To `kill`.
    Kill {
        /// What became of it.
        #[serde(flatten)]
        outcome: KillOutcome,
    },
    /// The request makes no sense.
    Error {
        /// Why.
        message: String,
    },
}

/// What became of a `kill`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum KillOutcome {
    /// The job has been told; its machine goes and GitLab gets its verdict within seconds.
    Told {
        /// Runner entry of the job.
        runner: String,
    },
    /// No such job is here.
    Unknown,
    /// Several runners have a job of this id; name one.
    Ambiguous {
        /// Their names.
        runners: Vec<String>,
    },
}

#[cfg(test)]
mod tests;
