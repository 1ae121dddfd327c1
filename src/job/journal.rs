//! What must survive a crash? One directory per job, its record replaced atomically.
//!
//! ```text
//! <state>/jobs/<key>/record.json    ids, job token, state: what recovery needs
//! <state>/jobs/<key>/trace          the spool
//! <runtime>/jobs/<key>/payload      the payload, with all its secrets: tmpfs, gone at a reboot
//! <runtime>/jobs/<key>/guest        the guest config, with the pass: likewise
//! <runtime>/jobs/<key>/past         what a hand-over takes along for the job's end
//! ```
//!
//! Record first, act second: a record names a VM before anything of it is made. A record that
//! cannot be read is set aside, named in the log, and costs nobody else anything; one of a newer
//! version stops the daemon.

pub mod format;
mod load;

use super::state::State;
use crate::failpoint::{Point, reached};
use crate::files::{Files, child};
use crate::gitlab::JobId;
use crate::hex::hex;
use crate::machine_spec::MachineSpec;
use crate::retry;
use crate::secret::{self, Secret};
use crate::supply::Claim;
use crate::vm::InstallationId;
use bytes::Bytes;
use dayfly_egress::audit::Destination;
use format::{parse, seal};
use jiff::Timestamp;
pub use load::{Loaded, SetAside};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use url::Url;

/// Version of the records that this daemon writes; it reads this one and those before.
///
/// | version | since then a record has |
/// | --- | --- |
/// | 1 | all but what follows |
/// | 2 | `installation`, `newer_token`, `last_lines`, `received_uptime_ms`, and a checksum |
/// | 3 | `machine_spec` |
/// | 4 | a lease that may be `wire` or `relay` |
/// | 5 | in `machine_spec`, `notes`, `egress`, `keep_failed`, and a network that may be `relay`; `reached`; in `machine`, `clone`; a release that keeps the machine for a while |
pub const RECORD_VERSION: u32 = 5;

/// Bytes of one record at most; a real one has about 2 KiB, with a long job token 8.
const RECORD_BYTES_MAX: u64 = 256 * 1024;

/// Bytes of a payload at most, as in `gitlab`.
const PAYLOAD_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// Bytes of what a hand-over takes along of a job: a console's end, escaped, and some steps.
const PAST_BYTES_MAX: u64 = 128 * 1024;

/// Runner entry and job id: two GitLabs may both have a job 42.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobKey {
    /// Name of the runner entry.
    pub runner: String,
    /// The job.
    pub id: JobId,
}

impl JobKey {
    /// Name of the job's directories: a digest of the runner's name (which may hold anything) and
    /// the id.
    #[must_use]
    pub fn directory(&self) -> String {
        let digest = Sha256::digest(self.runner.as_bytes());
        format!("{}-{}", hex(&digest[..6]), self.id)
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.runner, self.id)
    }
}

impl fmt::Debug for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.runner, self.id)
    }
}

/// What is known of a job, durable.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`RECORD_VERSION`] of its writer.
    pub version: u32,
    /// The installation that took the job: what it has made carries this id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installation: Option<InstallationId>,
    /// Whose job.
    pub key: JobKey,
    /// The GitLab it came from: its verdict goes nowhere else, whatever the configuration says
    /// by then.
    pub gitlab: Url,
    /// The job token. Worthless once the job is over.
    #[serde(with = "secret::text")]
    pub job_token: Secret,
    /// When GitLab's 201 came.
    pub received: Timestamp,
    /// The host's uptime then, milliseconds: deadlines go on with it over a restart of the daemon, for somebody may set
    /// the wall clock (threats.md E9).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_uptime_ms: Option<u64>,
    /// The job's timeout at GitLab, seconds.
    pub timeout_s: Option<u64>,
    /// For people: name of job and project.
    pub name: String,
    /// See `name`.
    pub project: String,
    /// GitLab marks the trace as one with secrets in it.
    pub debug_trace: bool,
    /// Sections may be used in the trace.
    pub trace_sections: bool,
    /// GitLab knows `runner_interrupted`.
    pub knows_interrupted: bool,
    /// The machine class's name when the job came.
    pub class: String,
    /// What machine it gets. None: its image could not be used when it came, or a daemon without this wrote the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_spec: Option<MachineSpec>,
    /// What is reserved for it.
    pub resources: crate::capacity::Resources,
    /// Its VM, once one is planned.
    pub machine: Option<Claim>,
    /// Where the guest's bytes begin in the spool, once it has its job.
    pub guest_base: Option<u64>,
    /// The job token of GitLab's newest 201 for this job, if it came when the guest had its own
    /// already (threats.md G17): what GitLab is told with it once it refuses the first.
    #[serde(default, with = "secret::optional_text", skip_serializing_if = "Option::is_none")]
    pub newer_token: Option<Secret>,
    /// How the trace ends if we end the job: written down with the state that says so, and into the
    /// spool after that, so that it stands there exactly once, whatever crash comes between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_lines: Option<LastLines>,
    /// What it has reached outside of its machine, once its verdict is known: the first hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<Destination>,
    /// Where it stands.
    pub state: State,
}

/// The end of a trace: our lines, and where they begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastLines {
    /// Offset in the spool.
    pub offset: u64,
    /// The lines, whole.
    pub text: String,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file layer failed.
    #[error("{what} `{}`", path.display())]
    Files {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A newer dayfly wrote it. Nothing was touched. Exit code 78.
    #[error("record `{}` is of version {version}, this dayfly reads up to {RECORD_VERSION}; install the newer one again, or let its jobs end first", path.display())]
    Newer {
        /// Where.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Another installation's daemon wrote it. Nothing was touched. Exit code 78.
    #[error("record `{}` is of another installation ({theirs}, this one is {ours}); give that one its directory back, and this one its own", path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Its installation.
        theirs: InstallationId,
        /// This one.
        ours: InstallationId,
    },
}

/// The journal. Clones share it.
#[derive(Clone)]
pub struct Journal {
    files: Arc<dyn Files>,
    state: PathBuf,
    runtime: PathBuf,
    /// Whose records are in it; none: nobody has said.
    ours: Option<InstallationId>,
    /// The last write failed.
    unwell: Arc<AtomicBool>,
}

/// What is written to see whether a disk takes it. Beside the jobs, where nothing else has this name.
fn trial(jobs: &Path) -> PathBuf {
    jobs.with_file_name("written")
}

impl Journal {
    /// A journal below these two directories.
    ///
    /// # Errors
    /// If they cannot be made.
    pub async fn open(
        files: Arc<dyn Files>,
        state_directory: &Path,
        runtime_directory: &Path,
    ) -> Result<Self, JournalError> {
        let journal = Self {
            files,
            state: state_directory.join("jobs"),
            runtime: runtime_directory.join("jobs"),
            ours: None,
            unwell: Arc::default(),
        };
        for path in [&journal.state, &journal.runtime] {
            let made = journal.files.create_dir(path).await;
            made.map_err(|source| JournalError::Files { what: "make directory", path: path.clone(), source })?;
        }
        Ok(journal)
    }

    /// The journal of this installation: records of others stop [`Journal::load_all`].
    #[must_use]
    pub fn of(self, ours: InstallationId) -> Self {
        Self { ours: Some(ours), ..self }
    }

    /// Where the job's spool is.
    #[must_use]
    pub fn spool_path(&self, key: &JobKey) -> PathBuf {
        child(&self.state, &key.directory()).join("trace")
    }

    /// Writes a new job down: payload first, then the record, which makes it count.
    ///
    /// # Errors
    /// The file layer's; the job must not be started then.
    pub async fn accept(&self, record: &Record, payload: Bytes) -> io::Result<()> {
        let name = record.key.directory();
        let made = self.files.replace_in_new_dir(&child(&self.runtime, &name), "payload", payload.to_vec()).await;
        self.note(made)?;
        // Without the record nothing of this counts.
        reached(Point::K3);
        self.begin(record).await
    }

    /// Writes the first record of a job down that needs no payload: it is not run.
    ///
    /// # Errors
    /// The file layer's; what of it is there is not known then.
    pub async fn begin(&self, record: &Record) -> io::Result<()> {
        let bytes = seal(&serde_json::to_vec(record)?);
        let directory = child(&self.state, &record.key.directory());
        self.note(self.files.replace_in_new_dir(&directory, "record.json", bytes).await)
    }

    /// Replaces the job's record, durably.
    ///
    /// # Errors
    /// The file layer's; the old record stands then.
    pub async fn put(&self, record: &Record) -> io::Result<()> {
        let bytes = seal(&serde_json::to_vec(record)?);
        let path = child(&self.state, &record.key.directory()).join("record.json");
        self.note(self.files.replace(&path, bytes).await)
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        self.unwell.store(result.is_err(), Ordering::Relaxed);
        result
    }

    /// Whether the journal takes what is written. After a write that failed a small one is tried.
    ///
    /// # Errors
    /// The file layer's: no job must be taken.
    pub async fn look_well(&self) -> io::Result<()> {
        if !self.unwell.load(Ordering::Relaxed) {
            return Ok(());
        }
        for directory in [&self.state, &self.runtime] {
            self.files.replace(&trial(directory), Vec::new()).await?;
            self.files.remove(&trial(directory)).await?;
        }
        self.note(Ok(()))
    }

    /// Keeps the guest config of the job's VM, for a restart of the daemon.
    ///
    /// # Errors
    /// The file layer's.
    pub async fn put_guest(&self, key: &JobKey, config: Vec<u8>) -> io::Result<()> {
        self.files.replace(&child(&self.runtime, &key.directory()).join("guest"), config).await
    }

    /// The payload as it was accepted.
    ///
    /// # Errors
    /// `NotFound` after a reboot of the host; else the file layer's.
    pub async fn payload(&self, key: &JobKey) -> io::Result<Bytes> {
        let path = child(&self.runtime, &key.directory()).join("payload");
        self.read(&path, PAYLOAD_BYTES_MAX).await.map(Bytes::from)
    }

    /// The guest config that [`Journal::put_guest`] kept.
    ///
    /// # Errors
    /// As [`Journal::payload`].
    pub async fn guest(&self, key: &JobKey) -> io::Result<Vec<u8>> {
        let path = child(&self.runtime, &key.directory()).join("guest");
        self.read(&path, dayfly_guest_config::CONFIG_BYTES_MAX as u64).await
    }

    /// Keeps what a hand-over takes along of a job for its end; nothing follows from it.
    ///
    /// # Errors
    /// The file layer's.
    pub async fn put_past(&self, key: &JobKey, past: Vec<u8>) -> io::Result<()> {
        self.files.replace(&child(&self.runtime, &key.directory()).join("past"), past).await
    }

    /// What [`Journal::put_past`] kept last.
    ///
    /// # Errors
    /// The file layer's; `NotFound` after a kill or a reboot.
    pub async fn past(&self, key: &JobKey) -> io::Result<Vec<u8>> {
        let path = child(&self.runtime, &key.directory()).join("past");
        self.files.read(&path, PAST_BYTES_MAX).await
    }

    /// Reads what a job stands or falls with: one error of the disk must not cost it.
    async fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let passing = |error: &io::Error| !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData);
        retry::few(|| self.files.read(path, bytes_max), passing).await
    }

    /// Removes all that is kept of a job, the record last.
    ///
    /// # Errors
    /// The file layer's; what is left is found again at the next start.
    pub async fn remove(&self, key: &JobKey) -> io::Result<()> {
        self.files.remove(&child(&self.runtime, &key.directory())).await?;
        let dir = child(&self.state, &key.directory());
        reached(Point::K17);
        self.files.remove(&dir.join("trace")).await?;
        reached(Point::K17);
        self.files.remove(&dir).await
    }

    /// The record of one job; `None` if it has none that can be read.
    pub async fn load(&self, key: &JobKey) -> Option<Record> {
        let path = child(&self.state, &key.directory()).join("record.json");
        parse(&self.read(&path, RECORD_BYTES_MAX).await.ok()?).ok()
    }
}
