//! What the stand-in knows: projects, runners, their managers, jobs, settings, and what happened.
//!
//! Plain data behind one lock (see [`super::Standin`]). Tests and `exec` read and edit it through
//! [`super::Standin::read`] and [`super::Standin::edit`]; the routes in the sibling files are functions
//! over it. Nothing here waits or does I/O.

use super::artifacts::ArtifactContent;
use super::spec::JobSpec;
use crate::gitlab::JobId;
use crate::rng::Rng;
use crate::secret::Secret;
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

/// GitLab's id of a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProjectId(pub u64);

/// GitLab's id of a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunnerId(pub u64);

/// The manager of requests without `system_id`.
pub const LEGACY_SYSTEM_ID: &str = "<legacy>";

/// How long a job token outlives its job's timeout.
pub const TOKEN_LEEWAY: Duration = Duration::from_secs(5 * 60);

/// A job token lives at least this long (plus [`TOKEN_LEEWAY`]), however short the timeout.
const TOKEN_LIFE_MIN: Duration = Duration::from_secs(60);

/// Runner and manager records are refreshed at most this often (GitLab: every 40 to 55 minutes).
pub(super) const CONTACT_REFRESH: Duration = Duration::from_secs(55 * 60);

/// GitLab's settings, as far as a runner notices them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where clients reach GitLab: goes into payloads, without a slash at the end.
    pub external_url: String,
    /// Workhorse's long poll; zero switches it off.
    pub long_poll: Duration,
    /// Whether logs are kept live in chunks first: only then can a final report get 202.
    pub live_trace: bool,
    /// When live chunks have become permanent.
    pub live_trace_persist_after: Persist,
    /// What `X-GitLab-Trace-Update-Interval` says; `None`: 3 s for a watched log, else 60 s.
    pub trace_update_interval: Option<Duration>,
    /// Calls a minute by limiter: `runner_jobs_request_api`, `runner_jobs_api`, `runner_jobs_patch_trace_api`.
    pub rate_limits: BTreeMap<String, u64>,
    /// Database migrations: every runner endpoint answers 429 with `Retry-After: 60`.
    pub migrations_backoff: bool,
    /// Registry host, if there is a container registry.
    pub registry: Option<String>,
    /// Whether artifacts are on at all (else 405).
    pub artifacts_enabled: bool,
    /// Whether new artifacts go to object storage.
    pub remote_artifacts: bool,
    /// Largest artifact, in MiB.
    pub max_artifacts_size_mib: u64,
    /// As in `expire_in`; `"0"`: never.
    pub default_artifacts_expire_in: String,
    /// What happens to the bytes of uploads.
    pub artifact_keep: ArtifactKeep,
    /// Whether the old way of registering (`POST /runners`) is allowed.
    pub registration_allowed: bool,
    /// How long fresh runner tokens live.
    pub runner_token_expiry: Option<Duration>,
    /// Address of the job router, if it is on.
    pub job_router: Option<String>,
    /// Whether runners may name session servers in the local network.
    pub allow_local_requests: bool,
    /// Above this many running jobs a project's count reads `N+`.
    pub running_jobs_bucket: u64,
    /// GitLab 18.5/18.6: a job waits for `PUT running` of runners that know `two_phase_job_commit`.
    pub two_phase: bool,
    /// GitLab 17.10 to 18.0: an orphaned runner gets 403.
    pub refuse_orphaned_runners: bool,
    /// Whether `GET …/runtime_environment_key` exists.
    pub runtime_environment_keys: bool,
    /// Enterprise features that are licensed; empty: Community Edition.
    pub licensed: BTreeSet<String>,
    /// When running and canceling jobs without a sign of life are dropped.
    pub stuck_after: Duration,
}

/// When live log chunks have become permanent storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persist {
    /// With the write.
    AtOnce,
    /// After this many final reports were answered 202.
    AfterReports(u32),
    /// This long after the last write.
    After(Duration),
    /// Not before a test says so; GitLab itself gives up after 5 minutes.
    Never,
}

/// What happens to the bytes of uploaded artifacts.
#[derive(Clone, Debug)]
pub enum ArtifactKeep {
    /// Kept in memory; larger ones get 413.
    Memory {
        /// Bytes of one artifact.
        bytes_max: u64,
    },
    /// Written to files in this directory, which exists.
    Directory(PathBuf),
    /// Counted and hashed, then forgotten.
    Discard,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            external_url: "https://gitlab.test".into(),
            long_poll: Duration::ZERO,
            live_trace: true,
            live_trace_persist_after: Persist::AtOnce,
            trace_update_interval: None,
            rate_limits: BTreeMap::new(),
            migrations_backoff: false,
            registry: None,
            artifacts_enabled: true,
            remote_artifacts: false,
            max_artifacts_size_mib: 100,
            default_artifacts_expire_in: "30 days".into(),
            artifact_keep: ArtifactKeep::Memory { bytes_max: 256 << 20 },
            registration_allowed: false,
            runner_token_expiry: None,
            job_router: None,
            allow_local_requests: false,
            running_jobs_bucket: 100,
            two_phase: false,
            refuse_orphaned_runners: false,
            runtime_environment_keys: false,
            licensed: BTreeSet::new(),
            stuck_after: Duration::from_secs(60 * 60),
        }
    }
}

/// One project.
#[derive(Clone, Debug)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// `group/name`.
    pub path: String,
    /// Legacy registration token.
    pub runners_token: Secret,
    /// Whether instance runners may take its jobs.
    pub shared_runners: bool,
    /// Whether CI is on.
    pub builds_enabled: bool,
    /// Whether it is being deleted: its jobs are over for their runners.
    pub deleting: bool,
    /// Clone depth; `None` or 0: everything.
    pub default_git_depth: Option<u64>,
    /// Job timeout.
    pub build_timeout: Duration,
    /// Whether protected and other refs have separate caches.
    pub separated_caches: bool,
    /// Counter behind cache keys, if it was raised.
    pub jobs_cache_index: Option<u64>,
    /// Largest log, in MiB; `None`: no limit.
    pub trace_size_limit_mib: Option<u64>,
    /// Largest artifact in MiB, if the project sets one.
    pub max_artifacts_size_mib: Option<u64>,
    /// The same, if its group sets one.
    pub group_max_artifacts_size_mib: Option<u64>,
    /// Whether everybody may read it.
    pub public: bool,
    /// Whether everybody who may read it may see its pipelines.
    pub public_builds: bool,
    /// Names of other projects whose job tokens it accepts.
    pub job_token_allowlist: BTreeSet<String>,
    /// Whether the allow list grants single permissions only.
    pub job_token_policies_enabled: bool,
    /// Running jobs on instance runners beyond those in the model.
    pub extra_instance_runner_jobs: u64,
    /// Bare repository to serve at `/<path>.git`.
    pub repository: Option<PathBuf>,
}

impl Project {
    /// Last part of the path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The largest artifact in bytes: the lowest level that says something decides.
    #[must_use]
    pub fn artifact_bytes_max(&self, settings: &Settings) -> u64 {
        self.max_artifacts_size_mib
            .or(self.group_max_artifacts_size_mib)
            .unwrap_or(settings.max_artifacts_size_mib)
            .saturating_mul(1 << 20)
    }
}

/// Whose jobs a runner takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunnerType {
    /// Of all projects with `shared_runners`.
    Instance,
    /// Of its group's projects ([`Runner::projects`]).
    Group,
    /// Of its projects ([`Runner::projects`]).
    Project,
}

impl RunnerType {
    /// GitLab's short word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Instance => "instance",
            Self::Group => "group",
            Self::Project => "project",
        }
    }
}

/// One runner: what a runner token stands for.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Its id.
    pub id: RunnerId,
    /// Its token.
    pub token: Secret,
    /// When the token ends.
    pub token_expires_at: Option<Timestamp>,
    /// Whose jobs it takes.
    pub kind: RunnerType,
    /// For group and project runners.
    pub projects: BTreeSet<ProjectId>,
    /// What people read.
    pub description: String,
    /// A note of the administrators.
    pub maintenance_note: Option<String>,
    /// No jobs for now.
    pub paused: bool,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// Whether it takes jobs without tags.
    pub run_untagged: bool,
    /// Whether it takes jobs of protected refs only.
    pub protected_only: bool,
    /// Whether it may not be given to other projects.
    pub locked: bool,
    /// Upper limit of its jobs' timeouts.
    pub maximum_timeout: Option<Duration>,
    /// When it was last seen.
    pub contacted_at: Option<Timestamp>,
    /// When its record last changed, for `If-Unmodified-Since`.
    pub updated_at: Timestamp,
    /// Whether its first poll is still to come (`started`), or came (`finished`).
    pub creation_finished: bool,
    /// Whether its owner is gone.
    pub orphaned: bool,
    /// Its managers, by `system_id`.
    pub managers: BTreeMap<String, Manager>,
    /// The value that `X-GitLab-Last-Update` shows; changes when a job is queued for it.
    pub queue_value: String,
}

/// A process that uses a runner token.
#[derive(Clone, Debug)]
pub struct Manager {
    /// Its `system_id`.
    pub system_id: String,
    /// `info.features` as it last sent them.
    pub features: Map<String, Value>,
    /// `info.labels` likewise.
    pub labels: Map<String, Value>,
    /// The rest of `info`: name, version, revision, platform, architecture, executor, config.
    pub info: Map<String, Value>,
    /// When its record was last refreshed.
    pub contacted_at: Option<Timestamp>,
    /// When its record last changed.
    pub updated_at: Timestamp,
}

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

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Final reports whose checksum differs from the log's. GitLab only counts this; tests must look.
    pub trace_invalid: u64,
    /// Final reports whose size differs too.
    pub trace_corrupted: u64,
    /// Requests with a token that opens nothing.
    pub refused: u64,
}

/// A planned misbehaviour of GitLab's own database or storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InnerFault {
    /// Every assignment meets a conflict.
    ConflictOnAssign,
    /// The next assignment does.
    ConflictOnFirstAssign,
    /// The replica lags: an empty queue is not trusted.
    ReplicaLag,
    /// The payload cannot be built.
    PayloadException,
    /// Object storage fails.
    ObjectStorage,
}

/// Everything the stand-in knows.
pub struct Model {
    /// Settings.
    pub settings: Settings,
    /// Projects.
    pub projects: BTreeMap<ProjectId, Project>,
    /// Runners.
    pub runners: BTreeMap<RunnerId, Runner>,
    /// Jobs.
    pub jobs: BTreeMap<JobId, Job>,
    /// Counters.
    pub metrics: Metrics,
    /// The instance's legacy registration token.
    pub registration_token: Secret,
    /// What GitLab's front proxy signs internal calls with.
    pub workhorse_token: Secret,
    /// Misbehaviour from inside.
    pub inner_fault: Option<InnerFault>,
    /// Every request, oldest first, a bounded number.
    pub history: super::history::History,
    pub(super) script: super::fault::Script,
    pub(super) throttle: super::throttle::Throttle,
    pub(super) rng: Rng,
    next_id: u64,
}

impl Model {
    pub(super) fn new(rng: Rng) -> Self {
        let mut model = Self {
            settings: Settings::default(),
            projects: BTreeMap::new(),
            runners: BTreeMap::new(),
            jobs: BTreeMap::new(),
            metrics: Metrics::default(),
            registration_token: Secret::new(""),
            workhorse_token: Secret::new(""),
            inner_fault: None,
            history: super::history::History::default(),
            script: super::fault::Script::default(),
            throttle: super::throttle::Throttle::default(),
            rng,
            // Above 2^31: ids that do not fit 32 bits are an ordinary thing on large instances.
            next_id: 4_300_000_000,
        };
        model.registration_token = Secret::new(format!("GR1348941{}", model.random_word(20)));
        model.workhorse_token = Secret::new(model.random_word(32));
        model
    }

    /// A fresh id.
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// `length` random letters and digits.
    pub(super) fn random_word(&self, length: usize) -> String {
        const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let mut bytes = vec![0; length];
        self.rng.fill(&mut bytes);
        bytes.iter().map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect()
    }

    /// Adds a project with GitLab's defaults.
    pub fn add_project(&mut self, path: &str) -> ProjectId {
        let id = ProjectId(self.new_id());
        let runners_token = Secret::new(format!("GR1348941{}", self.random_word(20)));
        let project = Project {
            id,
            path: path.into(),
            runners_token,
            shared_runners: false,
            builds_enabled: true,
            deleting: false,
            default_git_depth: Some(20),
            build_timeout: Duration::from_secs(3600),
            separated_caches: true,
            jobs_cache_index: None,
            trace_size_limit_mib: Some(100),
            max_artifacts_size_mib: None,
            group_max_artifacts_size_mib: None,
            public: false,
            public_builds: false,
            job_token_allowlist: BTreeSet::new(),
            job_token_policies_enabled: false,
            extra_instance_runner_jobs: 0,
            repository: None,
        };
        self.projects.insert(id, project);
        id
    }

    /// Adds a project runner of `projects`, or an instance runner if there are none; its token is
    /// `prefix` and random characters.
    pub fn add_runner(&mut self, prefix: &str, projects: &[ProjectId], now: Timestamp) -> RunnerId {
        let id = RunnerId(self.new_id());
        let token = Secret::new(format!("{prefix}{}", self.random_word(20)));
        let queue_value = self.random_word(32);
        let runner = Runner {
            id,
            token,
            token_expires_at: None,
            kind: if projects.is_empty() { RunnerType::Instance } else { RunnerType::Project },
            projects: projects.iter().copied().collect(),
            description: "stand-in runner".into(),
            maintenance_note: None,
            paused: false,
            tags: BTreeSet::new(),
            run_untagged: true,
            protected_only: false,
            locked: false,
            maximum_timeout: None,
            contacted_at: None,
            updated_at: now,
            creation_finished: false,
            orphaned: false,
            managers: BTreeMap::new(),
            queue_value,
        };
        self.runners.insert(id, runner);
        id
    }

    /// Queues a job of `project` in a pipeline of its own unless the spec names one.
    pub fn enqueue(&mut self, project: ProjectId, spec: JobSpec, now: Timestamp) -> JobId {
        let id = spec.id.unwrap_or_else(|| JobId(self.new_id()));
        let token = match &spec.token {
            Some(token) => token.clone(),
            None => Secret::new(format!("glcbt-64_{}", self.random_word(20))),
        };
        let pipeline = spec.pipeline.unwrap_or_else(|| self.new_id());
        let job = Job {
            id,
            token,
            project,
            pipeline,
            allow_failure: spec.allow_failure,
            spec,
            state: JobState::Pending,
            failure_reason: None,
            exit_code: None,
            runner: None,
            manager: None,
            cancels_gracefully: false,
            queued: true,
            queued_at: now,
            started_at: None,
            finished_at: None,
            updated_at: now,
            timeout: Duration::ZERO,
            token_expires_at: None,
            erased: false,
            trace: Trace::default(),
            pending_state: None,
            artifacts: BTreeMap::new(),
            artifacts_expire_at: None,
            dotenv: Vec::new(),
            handed_out: 0,
            verdicts: 0,
            waiting_for_ack: None,
        };
        self.jobs.insert(id, job);
        self.tick_queues(id);
        id
    }

    /// Moves the queue value of every runner that may take this job.
    pub fn tick_queues(&mut self, job: JobId) {
        let Some(job) = self.jobs.get(&job) else { return };
        let takers: Vec<RunnerId> = self
            .runners
            .values()
            .filter(|runner| super::queue::may_take(self, runner, job))
            .map(|runner| runner.id)
            .collect();
        for id in takers {
            let value = self.random_word(32);
            if let Some(runner) = self.runners.get_mut(&id) {
                runner.queue_value = value;
            }
        }
    }

    /// Somebody cancels the job: `canceling` if its manager can do that and nobody forces it.
    pub fn cancel(&mut self, id: JobId, force: bool, now: Timestamp) {
        let Some(job) = self.jobs.get(&id) else { return };
        let manager = job.runner.and_then(|runner| self.runners.get(&runner)).zip(job.manager.as_ref());
        let manager_can = manager
            .and_then(|(runner, system_id)| runner.managers.get(system_id))
            .is_some_and(|manager| manager.features.get("cancel_gracefully") == Some(&Value::Bool(true)));
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let graceful = !force && (job.cancels_gracefully || manager_can);
        match job.state {
            JobState::Running if graceful => {
                job.state = JobState::Canceling;
                job.updated_at = now;
            }
            JobState::Pending | JobState::Running => job.end(JobState::Canceled, None, now),
            JobState::Canceling if force => job.end(JobState::Canceled, None, now),
            JobState::Canceling | JobState::Success | JobState::Failed | JobState::Canceled => {}
        }
    }

    /// Fails jobs that GitLab's own workers would fail by now; `Some` is when to look again.
    pub fn reap(&mut self, now: Timestamp) -> Option<Timestamp> {
        let stuck_after = self.settings.stuck_after;
        let mut next: Option<Timestamp> = None;
        for job in self.jobs.values_mut() {
            let mut due = Vec::new();
            if let Some(ack) = &job.waiting_for_ack {
                due.push((ack.until, JobState::Failed, "runner_provisioning_timeout"));
            }
            match job.state {
                JobState::Running => {
                    due.push((after(job.updated_at, stuck_after), JobState::Failed, "no_updates_running"));
                    if let Some(started) = job.started_at {
                        // A quarter of an hour above the job's timeout.
                        let end = after(started, job.timeout + Duration::from_secs(15 * 60));
                        due.push((end, JobState::Failed, "server_timeout_running"));
                    }
                }
                JobState::Canceling => {
                    due.push((after(job.updated_at, stuck_after), JobState::Canceled, "no_updates_canceling"));
                }
                JobState::Pending | JobState::Success | JobState::Failed | JobState::Canceled => {}
            }
            let Some((at, state, reason)) = due.into_iter().min_by_key(|(at, ..)| *at) else { continue };
            if at <= now {
                job.end(state, Some(reason), now);
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        next
    }

    /// The runner that this token belongs to, if the token still lives.
    pub(super) fn runner_by_token(&self, token: &str, now: Timestamp) -> Option<RunnerId> {
        let runner = self.runners.values().find(|runner| runner.token.matches(token))?;
        runner.token_expires_at.is_none_or(|end| now < end).then_some(runner.id)
    }

    /// The job that this token belongs to.
    pub(super) fn job_by_token(&self, token: &str) -> Option<JobId> {
        if token.is_empty() {
            return None;
        }
        self.jobs.values().find(|job| job.token.matches(token)).map(|job| job.id)
    }

    /// Notes that a runner and its manager were seen; their records move at most every 55 minutes.
    pub(super) fn heartbeat(
        &mut self,
        runner: RunnerId,
        system_id: Option<&str>,
        info: Option<&Map<String, Value>>,
        now: Timestamp,
    ) {
        let Some(runner) = self.runners.get_mut(&runner) else { return };
        if is_old(runner.contacted_at, now) {
            runner.contacted_at = Some(now);
            runner.updated_at = now;
        }
        let Some(system_id) = system_id else { return };
        let manager = runner.managers.entry(system_id.to_owned()).or_insert_with(|| Manager {
            system_id: system_id.to_owned(),
            features: Map::new(),
            labels: Map::new(),
            info: Map::new(),
            contacted_at: None,
            updated_at: now,
        });
        if !is_old(manager.contacted_at, now) {
            return;
        }
        manager.contacted_at = Some(now);
        manager.updated_at = now;
        let Some(info) = info else { return };
        for (key, value) in info {
            match (key.as_str(), value) {
                ("features", Value::Object(features)) => manager.features = features.clone(),
                ("labels", Value::Object(labels)) => manager.labels = labels.clone(),
                ("name" | "version" | "revision" | "platform" | "architecture" | "executor" | "config", _) => {
                    manager.info.insert(key.clone(), value.clone());
                }
                _ => {}
            }
        }
    }
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

fn is_old(contacted_at: Option<Timestamp>, now: Timestamp) -> bool {
    contacted_at.is_none_or(|then| age(then, now) >= CONTACT_REFRESH)
}

/// `then` plus `duration`.
pub(super) fn after(then: Timestamp, duration: Duration) -> Timestamp {
    then.saturating_add(duration).unwrap_or(Timestamp::MAX)
}

/// From `then` to `now`; zero if that is in the future.
pub(super) fn age(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or(Duration::ZERO)
}
