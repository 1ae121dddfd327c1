//! One job: its place in life, its log, its artifacts, what was reported about it.

use super::artifacts::ArtifactContent;
use super::model::after;
use super::project::ProjectId;
use super::runner::RunnerId;
use super::spec::JobSpec;
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a job token outlives its job's timeout.
pub const TOKEN_LEEWAY: Duration = Duration::from_secs(5 * 60);

/// A job token lives at least this long (plus [`TOKEN_LEEWAY`]), however short the timeout.
const TOKEN_LIFE_MIN: Duration = Duration::from_secs(60);

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Queued.
    Pending,
    /// A runner has it.
    Running,
    /// Somebody canceled it, and its runner manager may run `after_script`.
    Canceling,
    /// Over.
    Success,
    /// Over.
    Failed,
    /// Over.
    Canceled,
}

impl JobState {
    /// GitLab's word, as in `Job-Status`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Canceling => "canceling",
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }

    /// Whether its job token is worth anything.
    #[must_use]
    pub fn is_executing(self) -> bool {
        matches!(self, Self::Running | Self::Canceling)
    }

    /// Whether it will never change.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::Canceled)
    }
}

/// Where a log's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Chunks {
    /// There are none.
    #[default]
    None,
    /// Not yet permanent.
    Live,
    /// Permanent.
    Persisted,
}

/// A job's log.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Its bytes, the job token overwritten.
    pub bytes: Vec<u8>,
    /// Where they are.
    pub chunks: Chunks,
    /// Whether another writer holds the log.
    pub locked: bool,
    /// Whether somebody looks at it in a browser.
    pub watched: bool,
    /// Whether it may hold secrets, because debug output was on.
    pub debug: bool,
    /// When it was last written to.
    pub written_at: Option<Timestamp>,
}

/// A final report that waits for the log to be stored.
#[derive(Clone, Debug)]
pub struct PendingState {
    /// `success` or `failed`.
    pub state: String,
    /// Checksum of the log, as reported.
    pub checksum: Option<String>,
    /// Size of the log, as reported.
    pub bytesize: Option<u64>,
    /// Reason, as reported.
    pub failure_reason: Option<String>,
    /// When it came.
    pub created_at: Timestamp,
    /// How many reports were answered 202 because of it.
    pub answered: u32,
}

/// One stored artifact.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// `archive`, `junit`…
    pub kind: String,
    /// `zip`, `gzip` or `raw`.
    pub format: String,
    /// Its file name.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256, hex.
    pub sha256: String,
    /// `public`, `private` or `none`.
    pub accessibility: String,
    /// Whether it is in object storage.
    pub remote: bool,
    /// Its bytes.
    pub content: ArtifactContent,
}

/// Who started a job, as far as permissions to other projects go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum User {
    /// Member of every project.
    #[default]
    Everywhere,
    /// Member of the job's own project only.
    OwnProject,
    /// Member of no project.
    Nowhere,
}

/// The wait for `PUT running` on a two-phase server.
#[derive(Clone, Debug)]
pub struct Acknowledgement {
    /// When the job is dropped without one.
    pub until: Timestamp,
    /// Whether a manager is already assigned.
    pub manager_assigned: bool,
}

/// One job.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Its job token.
    pub token: Secret,
    /// Its project.
    pub project: ProjectId,
    /// Its pipeline.
    pub pipeline: u64,
    /// What it is.
    pub spec: JobSpec,
    /// Where it is in its life.
    pub state: JobState,
    /// Why it failed.
    pub failure_reason: Option<String>,
    /// The script's exit code.
    pub exit_code: Option<i64>,
    /// Whether its failure is no failure of the pipeline.
    pub allow_failure: bool,
    /// Who has or had it.
    pub runner: Option<RunnerId>,
    /// The manager who has or had it.
    pub manager: Option<String>,
    /// Whether it was handed to a manager that can cancel gracefully.
    pub cancels_gracefully: bool,
    /// Whether it stands in the queue. Stays true for a stale entry.
    pub queued: bool,
    /// When it was queued.
    pub queued_at: Timestamp,
    /// When it was handed out.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// When its record last changed: what stuck detection reads.
    pub updated_at: Timestamp,
    /// Timeout in force once it is handed out.
    pub timeout: Duration,
    /// When its token ends; `None` before it is handed out.
    pub token_expires_at: Option<Timestamp>,
    /// Whether somebody erased it.
    pub erased: bool,
    /// Its log.
    pub trace: Trace,
    /// A final report that waits.
    pub pending_state: Option<PendingState>,
    /// Its artifacts, by type.
    pub artifacts: BTreeMap<String, Artifact>,
    /// When they go away; `None`: never.
    pub artifacts_expire_at: Option<Timestamp>,
    /// Variables from its dotenv report.
    pub dotenv: Vec<(String, String)>,
    /// How many 201s carried it.
    pub handed_out: u32,
    /// Final reports that were taken: 1 for a job that ended by its runner.
    pub verdicts: u32,
    /// Set while a two-phase server waits for its runner.
    pub waiting_for_ack: Option<Acknowledgement>,
}

impl Job {
    /// The job is handed to `runner` now.
    pub fn start(&mut self, runner: RunnerId, system_id: &str, timeout: Duration, now: Timestamp) {
        self.state = JobState::Running;
        self.runner = Some(runner);
        self.manager = Some(system_id.to_owned());
        self.queued = false;
        self.started_at = Some(now);
        self.updated_at = now;
        self.timeout = timeout;
        self.token_expires_at = Some(after(now, timeout.max(TOKEN_LIFE_MIN) + TOKEN_LEEWAY));
        self.waiting_for_ack = None;
    }

    /// The job is over. `canceling` always ends in `canceled`, whatever was reported; only a failed
    /// job has a reason.
    pub fn end(&mut self, state: JobState, reason: Option<&str>, now: Timestamp) {
        self.state = if self.state == JobState::Canceling { JobState::Canceled } else { state };
        self.failure_reason = if self.state == JobState::Failed { reason.map(str::to_owned) } else { None };
        self.queued = false;
        self.finished_at = Some(now);
        self.updated_at = now;
        self.pending_state = None;
        self.waiting_for_ack = None;
    }

    /// Whether the job token's end has passed.
    #[must_use]
    pub fn token_is_expired(&self, now: Timestamp) -> bool {
        self.token_expires_at.is_some_and(|end| end <= now)
    }
}
