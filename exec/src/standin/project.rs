//! One project, and what it allows.

use super::settings::Settings;
use dayfly::secret::Secret;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// GitLab's id of a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProjectId(pub u64);

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
    /// How many runners may be registered for it the old way.
    pub runner_limit: Option<u64>,
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
