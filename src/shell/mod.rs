//! What does an operator see, and do, inside of a job's machine? A root shell that the guest program gives to a host that
//! asks for it.
//!
//! ```text
//! dayfly shell ──frames──► control socket ──► Shell ──► session on the VM's own port ──► dayfly-guest ──► /bin/bash
//!              ◄──text───                 ◄── Screen ◄──────────── bytes ─────────────
//!                                               └────► Recording, on disk first
//! ```
//!
//! Only the host asks: the guest opens its one stream in answer to a session, and a session begins with proofs both ways.
//! What the guest prints is hostile. [`Screen`] lets through what draws a screen, and nothing by which a terminal is asked
//! something, renamed, or told to keep something; the recording holds what was let through. No shell without a recording:
//! one that cannot be written ends it. Sizes, times and numbers are bounded.

mod recording;
mod screen;
mod session;

pub use recording::{Recording, Recordings, Whose};
pub use screen::Screen;
pub use session::{Inside, Shell};

use serde::{Deserialize, Serialize};

/// What became of the wish for a shell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ShellOutcome {
    /// What follows on the connection is the shell's: text to the operator, frames from them.
    Opened {
        /// Runner entry of the job.
        runner: String,
        /// Where it is recorded.
        recording: String,
    },
    /// There is none, for this reason.
    Refused {
        /// Why, for the operator.
        why: String,
    },
    /// No such job is under way.
    Unknown,
    /// Several runners have a job of this id; name one.
    Ambiguous {
        /// Their names.
        runners: Vec<String>,
    },
}

impl ShellOutcome {
    /// It, for an operator's log.
    #[must_use]
    pub fn words(&self) -> &str {
        match self {
            Self::Opened { .. } => "it is opened",
            Self::Refused { why } => why,
            Self::Unknown => "no such job is under way",
            Self::Ambiguous { .. } => "several runners have a job of this id",
        }
    }
}

#[cfg(test)]
mod tests;
