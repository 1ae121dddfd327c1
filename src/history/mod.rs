//! Which jobs have ended here, and how? Kept for a while, for whoever asks the next morning.
//!
//! One file a job below `<state>/ended`, replaced atomically, so that a crash leaves a whole one or none; and a list of
//! them in memory, without the consoles. Age, number and bytes are bounded, whatever jobs come. Nothing follows from
//! what is kept: a disk that does not take it costs the job nothing, and a file that cannot be read is left out.
//!
//! Beside them the whole of each console ([`consoles`](Consoles)).
//!
//! ```text
//! job ── End ──► History::keep ──► <state>/ended/<when it came>-<job>.json
//!                     └─► list ──► control socket, status page
//! ```

mod consoles;
mod reached;
mod store;

pub use consoles::{ConsoleBounds, ConsoleLog, Consoles};
pub use reached::{DESTINATIONS_MAX, Reached, Row, Suggestion};
pub use store::{Bounds, History};

use crate::cache::Note;
use crate::gitlab::{JobId, JobStatus};
use dayfly_egress::audit::Destination;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Version of the files that this daemon writes. Members may come within one; a newer file is left alone.
pub const VERSION: u32 = 1;

/// Bytes of a console's end that are kept with a job: the last screens of a boot, or of a panic.
pub const CONSOLE_BYTES_MAX: usize = 16 * 1024;

/// Steps of one job at most: two machines' boots take a dozen.
pub const STEPS_MAX: usize = 32;

/// Characters of one of them at most: a guest's verdict is among them.
const STEP_CHARACTERS_MAX: usize = 200;

/// A job that has ended here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// [`VERSION`] of its writer.
    pub version: u32,
    /// Runner entry that took it.
    pub runner: String,
    /// Its id at that runner's GitLab.
    pub id: JobId,
    /// The address of that GitLab.
    pub gitlab: String,
    /// Path of its project; empty: its payload could not be read.
    pub project: String,
    /// Its name in `.gitlab-ci.yml`.
    pub name: String,
    /// Machine class.
    pub class: String,
    /// When GitLab gave it out.
    pub received: Timestamp,
    /// When nothing was left of it here.
    pub ended: Timestamp,
    /// How it ended.
    pub verdict: Outcome,
    /// GitLab's name for why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_reason: Option<String>,
    /// The script's exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What this daemon saw, where the guest gave no verdict; for operators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What GitLab has of it.
    pub at_gitlab: AtGitlab,
    /// Bytes of its log, our lines included.
    pub log_bytes: u64,
    /// Its machine; none: none was resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineWas>,
    /// What it went through, oldest first.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// What it had of the caches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cache: Vec<Note>,
    /// What it has reached outside of its machine, without what its log masks; at most [`DESTINATIONS_MAX`]. Not in lists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<Destination>,
    /// Rows that its console printed in all.
    #[serde(default)]
    pub console_rows: u64,
    /// The end of its console, escaped, without what its log masks. Not in lists. None: there was no machine here, or
    /// what to mask was not known any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<String>,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Well.
    Success,
    /// It failed, by its own doing or ours: the reason tells.
    Failed,
    /// GitLab had ended it before: canceled, timed out, deleted.
    Over,
    /// Not known any more: a crash came between its end and this.
    Unknown,
}

impl Outcome {
    /// One word, as in the metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Over => "over",
            Self::Unknown => "unknown",
        }
    }
}

/// What GitLab has of a job that has ended here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtGitlab {
    /// Its log and its verdict.
    All,
    /// It had ended the job itself; nothing more was wanted.
    OverBefore,
    /// Not all: what it did not take, and why, for people.
    Lacks(String),
}

impl AtGitlab {
    /// By GitLab's last word on the job, and what waited for it when that was given up.
    #[must_use]
    pub fn of(last_word: JobStatus, waits: &str) -> Self {
        match (last_word, waits) {
            (JobStatus::Over, _) => Self::OverBefore,
            (_, "") => Self::All,
            (_, waits) => Self::Lacks(waits.to_owned()),
        }
    }

    /// For people.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::All => "has log and verdict".to_owned(),
            Self::OverBefore => "had ended it before".to_owned(),
            Self::Lacks(what) => format!("does not have all: {what}"),
        }
    }
}

/// The machine that a job has, or had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineWas {
    /// Name of its base image.
    pub image: String,
    /// The image's content, hex.
    pub digest: String,
    /// Executor of the guest's runner.
    pub executor: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual disk, GiB.
    pub disk_gib: u64,
    /// The hypervisor's name of the last VM; none: none was planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

/// Something that a job has come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What, for people.
    pub what: String,
    /// Milliseconds after GitLab gave the job out.
    pub at_ms: u64,
}

/// `steps` and one more, as far as there is room.
pub fn note(steps: &mut Vec<Step>, what: &str, since_received: Duration) {
    if steps.len() < STEPS_MAX {
        let at_ms = u64::try_from(since_received.as_millis()).unwrap_or(u64::MAX);
        steps.push(Step { what: what.chars().take(STEP_CHARACTERS_MAX).collect(), at_ms });
    }
}

#[cfg(test)]
mod tests;
