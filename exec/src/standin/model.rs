//! What the stand-in knows: projects, runners, their managers, jobs, settings, and what happened.
//!
//! Plain data behind one lock (see [`super::Standin`]). Tests and `exec` read and edit it through
//! [`super::Standin::read`] and [`super::Standin::edit`]; the routes in the sibling files are functions
//! over it. Nothing here waits or does I/O.

use super::job::{Job, JobState, Trace};
use super::project::{Project, ProjectId};
use super::runner::{Manager, Runner, RunnerId, RunnerType};
use super::settings::Settings;
use super::spec::JobSpec;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Runner and manager records are refreshed at most this often (GitLab: every 40 to 55 minutes).
pub(super) const CONTACT_REFRESH: Duration = Duration::from_secs(55 * 60);

/// The executors that GitLab knows by name; any other is stored as `unknown`.
const EXECUTORS: [&str; 13] = [
    "custom",
    "shell",
    "docker",
    "docker-windows",
    "docker-ssh",
    "docker-ssh+machine",
    "docker+machine",
    "docker-autoscaler",
    "instance",
    "kubernetes",
    "parallels",
    "ssh",
    "virtualbox",
];

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Final reports whose checksum differs from the log's. GitLab only counts this; tests must look.
    pub trace_invalid: u64,
    /// Final reports whose size differs too.
    pub trace_corrupted: u64,
    /// Final reports about a log of which nothing ever came. GitLab does not even count these.
    pub trace_missing: u64,
    /// Requests with a token that opens nothing.
    pub refused: u64,
    /// Bytes that git's own protocol has carried to jobs.
    pub git_bytes: u64,
    /// And to dayfly itself.
    pub git_bytes_host: u64,
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
    /// Address of the request that is being answered, where a trusted proxy names it.
    pub(super) caller: Option<String>,
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
            caller: None,
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
            runner_limit: None,
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

    /// Moves the queue value of every runner that this job fits.
    pub fn tick_queues(&mut self, job: JobId) {
        let Some(job) = self.jobs.get(&job) else { return };
        let takers: Vec<RunnerId> = self
            .runners
            .values()
            .filter(|runner| super::queue::fits(self, runner, job))
            .map(|runner| runner.id)
            .collect();
        for id in takers {
            self.edit_runner(id, |_| {});
        }
    }

    /// Somebody edits or pauses a runner: its queue moves, so that it does not wait for what it was.
    pub fn edit_runner(&mut self, id: RunnerId, change: impl FnOnce(&mut Runner)) {
        let value = self.random_word(32);
        if let Some(runner) = self.runners.get_mut(&id) {
            change(runner);
            runner.queue_value = value;
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
            let unheard =
                job.waiting_for_ack.as_ref().map(|ack| (ack.until, JobState::Failed, "runner_provisioning_timeout"));
            let (stuck, over) = match job.state {
                JobState::Running => (
                    Some((after(job.updated_at, stuck_after), JobState::Failed, "no_updates_running")),
                    // A quarter of an hour above the job's timeout.
                    job.started_at.map(|started| {
                        let end = after(started, job.timeout + Duration::from_secs(15 * 60));
                        (end, JobState::Failed, "server_timeout_running")
                    }),
                ),
                JobState::Canceling => {
                    (Some((after(job.updated_at, stuck_after), JobState::Canceled, "no_updates_canceling")), None)
                }
                JobState::Pending | JobState::Success | JobState::Failed | JobState::Canceled => (None, None),
            };
            let due = [unheard, stuck, over].into_iter().flatten().min_by_key(|(at, ..)| *at);
            let Some((at, state, reason)) = due else { continue };
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
        let caller = self.caller.clone();
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
            ip_address: None,
            contacted_at: None,
            updated_at: now,
        });
        if !is_old(manager.contacted_at, now) {
            return;
        }
        manager.contacted_at = Some(now);
        manager.updated_at = now;
        manager.ip_address = caller.or_else(|| manager.ip_address.take());
        let Some(info) = info else { return };
        for (key, value) in info {
            match (key.as_str(), value) {
                ("features", Value::Object(features)) => manager.features = features.clone(),
                ("labels", Value::Object(labels)) => manager.labels = labels.clone(),
                ("executor", Value::String(name)) => {
                    let known = EXECUTORS.contains(&name.as_str());
                    manager.info.insert(key.clone(), Value::from(if known { name } else { "unknown" }));
                }
                ("name" | "version" | "revision" | "platform" | "architecture" | "config", _) => {
                    manager.info.insert(key.clone(), value.clone());
                }
                _ => {}
            }
        }
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
