//! GitLab's settings, as far as a runner notices them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

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
    /// Whether repositories are served by git's own protocol, too: else as files only, and a fetch has all of a history.
    pub smart_git: bool,
    /// A git whose `User-Agent` begins so gets 403.
    pub refuse_git_of: Option<String>,
    /// Whether artifacts are on at all (else 405).
    pub artifacts_enabled: bool,
    /// Whether new artifacts go to object storage.
    pub remote_artifacts: bool,
    /// Largest artifact, in MiB.
    pub max_artifacts_size_mib: u64,
    /// As in `expire_in`, for artifacts that say nothing; `None` or `"0"`: never.
    pub default_artifacts_expire_in: Option<String>,
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
    /// Whether `X-Forwarded-For` names the address that is shown for a manager.
    pub trust_forwarded_for: bool,
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
            smart_git: false,
            refuse_git_of: None,
            artifacts_enabled: true,
            remote_artifacts: false,
            max_artifacts_size_mib: 100,
            default_artifacts_expire_in: Some("30 days".into()),
            artifact_keep: ArtifactKeep::Memory { bytes_max: 256 << 20 },
            registration_allowed: false,
            runner_token_expiry: None,
            job_router: None,
            allow_local_requests: false,
            trust_forwarded_for: false,
            running_jobs_bucket: 100,
            two_phase: false,
            refuse_orphaned_runners: false,
            runtime_environment_keys: false,
            licensed: BTreeSet::new(),
            stuck_after: Duration::from_secs(60 * 60),
        }
    }
}
