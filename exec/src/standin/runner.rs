//! One runner, and the managers that use its token.

use super::project::ProjectId;
use dayfly::secret::Secret;
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// GitLab's id of a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunnerId(pub u64);

/// The manager of requests without `system_id`.
pub const LEGACY_SYSTEM_ID: &str = "<legacy>";

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
    /// The value that `X-GitLab-Last-Update` shows; changes when a job is queued for it or it is edited
    /// ([`super::Model::edit_runner`]).
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
    /// Where it calls from, as a trusted proxy says.
    pub ip_address: Option<String>,
    /// When its record was last refreshed.
    pub contacted_at: Option<Timestamp>,
    /// When its record last changed.
    pub updated_at: Timestamp,
}

/// A manager as it would be after a first contact; for tests that start in the middle.
#[must_use]
pub fn manager(system_id: &str, features: Map<String, Value>, now: Timestamp) -> Manager {
    Manager {
        system_id: system_id.to_owned(),
        features,
        labels: Map::new(),
        info: Map::new(),
        ip_address: None,
        contacted_at: Some(now),
        updated_at: now,
    }
}
