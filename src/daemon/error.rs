//! Why does the daemon not start, and whose move is it?
//!
//! What only an operator's change helps against says so, and has an exit code of its own (78), at
//! which systemd does not start the daemon again.

use crate::gitlab::TokenFileError;
use crate::gitlab::transport::OpenError;
use crate::job::journal::JournalError;
use crate::vm::{UsersMissing, VmError};
use std::io;
use std::path::PathBuf;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another process holds the state directory.
    #[error("another dayfly (process {pid}) uses state directory `{}`", directory.display())]
    Locked {
        /// The directory.
        directory: PathBuf,
        /// Its holder, as far as known.
        pid: String,
    },
    /// A part of the daemon died; jobs and VMs are as after a hand-over.
    #[error("keep running (see the log); jobs go on when the daemon is started again")]
    Failed,
    /// A directory or file of the installation.
    #[error("{what} `{}`{}", path.display(), remedy(source.kind()))]
    Files {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory or file of the installation that is not as it must be.
    #[error("use `{}`: it {problem}; {remedy}", path.display())]
    Unusable {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// The journal.
    #[error("use the journal{}", journal_remedy(.0))]
    Journal(#[from] JournalError),
    /// The hypervisor does not answer.
    #[error("use the hypervisor (see `dayfly doctor`)")]
    Hypervisor(#[from] VmError),
    /// No acceleration.
    #[error(
        "use KVM: {0}; set `hypervisor.accel = \"tcg\"` for a trial without hardware virtualisation, which isolates nothing"
    )]
    NoKvm(String),
    /// The operator's store of caches.
    #[error("set up the store of `cache.upstream`")]
    CacheStore(#[source] OpenError),
    /// A runner's token file.
    #[error("set up runner `{runner}` by its `token_file`")]
    Token {
        /// The runner entry.
        runner: String,
        /// Cause.
        #[source]
        source: TokenFileError,
    },
    /// The users of VMs.
    #[error("choose as whom machines run")]
    Users(#[from] UsersMissing),
    /// A runner's GitLab.
    #[error("set up runner `{runner}`{}", key.map(|key| format!(" by its `{key}`")).unwrap_or_default())]
    Endpoint {
        /// The runner entry.
        runner: String,
        /// The key of the file that is to blame.
        key: Option<&'static str>,
        /// Cause.
        #[source]
        source: Box<OpenError>,
    },
}

impl DaemonError {
    /// 78 (`EX_CONFIG`) where only an operator's change helps, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unusable { .. }
            | Self::Journal(JournalError::Newer { .. } | JournalError::Foreign { .. })
            | Self::Token { .. }
            | Self::Endpoint { .. }
            | Self::CacheStore(_)
            | Self::Users(_)
            | Self::NoKvm(_) => 78,
            Self::Journal(JournalError::Files { source, .. }) | Self::Files { source, .. }
                if !remedy(source.kind()).is_empty() =>
            {
                78
            }
            // A disk that fails may do better at the next start.
            Self::Journal(JournalError::Files { .. })
            | Self::Locked { .. }
            | Self::Files { .. }
            | Self::Hypervisor(_)
            | Self::Failed => 1,
        }
    }
}

fn journal_remedy(error: &JournalError) -> &'static str {
    match error {
        JournalError::Files { source, .. } => remedy(source.kind()),
        JournalError::Newer { .. } | JournalError::Foreign { .. } => "",
    }
}

/// What an operator can do about an error of the file system; empty: try again.
fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::ReadOnlyFilesystem => " (make its file system writable; the kernel's log says why it is not)",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => " (make room on its file system)",
        io::ErrorKind::PermissionDenied => {
            " (it must belong to the user that dayfly runs as, and that user must pass each directory above it)"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            " (something of another kind has this name, or one above it: move that away)"
        }
        _ => "",
    }
}
