//! Sets up what a fact starts from: settings, project, runner, manager, jobs, in the order in which
//! they need each other. Members that are left out have the defaults of the format's description.

use crate::fact::Fact;
use crate::job;
use crate::names::Names;
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{InnerFault, Manager, Model, ProjectId, RunnerId, RunnerType, Settings, Standin, manager};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Why a fact was not set up.
pub(crate) enum Trouble {
    /// The stand-in cannot do that.
    Skip(String),
    /// The fact says something that nobody here understands.
    Error(String),
}

impl From<String> for Trouble {
    fn from(text: String) -> Self {
        Self::Error(text)
    }
}

/// The members of one object, taken out one by one; what is left at the end is unknown.
pub(crate) struct Members {
    what: String,
    left: Map<String, Value>,
}

impl Members {
    pub(crate) fn new(what: &str, value: Option<&Value>) -> Result<Self, String> {
        match value {
            None => Ok(Self { what: what.into(), left: Map::new() }),
            Some(Value::Object(members)) => Ok(Self { what: what.into(), left: members.clone() }),
            Some(other) => Err(format!("given {what} is {other}")),
        }
    }

    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.left.remove(key)
    }

    fn wrong(&self, key: &str, value: &Value) -> String {
        format!("given {}.{key} is {value}", self.what)
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, String> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, &other)),
        }
    }

    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong(key, &other)),
        }
    }

    pub(crate) fn number(&mut self, key: &str) -> Result<Option<u64>, String> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| self.wrong(key, &value)),
        }
    }

    /// `None`: left out; `Some(None)`: null.
    pub(crate) fn optional_number(&mut self, key: &str) -> Result<Option<Option<i64>>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(None)),
            Some(value) => value.as_i64().map(|number| Some(Some(number))).ok_or_else(|| self.wrong(key, &value)),
        }
    }

    pub(crate) fn texts(&mut self, key: &str) -> Result<Option<Vec<String>>, String> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(|_| self.wrong(key, &value)),
        }
    }

    pub(crate) fn object(&mut self, key: &str) -> Result<Option<Map<String, Value>>, String> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(members)) => Ok(Some(members)),
            Some(other) => Err(self.wrong(key, &other)),
        }
    }

    pub(crate) fn end(self) -> Result<(), String> {
        match self.left.keys().next() {
            Some(key) => Err(format!("given {}.{key} is unknown", self.what)),
            None => Ok(()),
        }
    }
}

/// A time that far back; negative: ahead.
pub(crate) fn ago(now: Timestamp, seconds: i64) -> Timestamp {
    now.saturating_sub(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MIN)
}

/// What the endpoint decides about the defaults.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    JobRoute,
    RunnerRoute,
}

impl Kind {
    fn of(fact: &Fact) -> Self {
        match &fact.endpoint {
            endpoint if endpoint.ends_with("/jobs/request") => Self::Request,
            endpoint if endpoint.contains("/jobs/") => Self::JobRoute,
            _ => Self::RunnerRoute,
        }
    }
}

/// Sets the stand-in up.
pub(crate) fn set_up(standin: &Standin, fact: &Fact) -> Result<Names, Trouble> {
    let now = standin.now();
    standin.edit(|model| build(model, fact, now))
}

fn build(model: &mut Model, fact: &Fact, now: Timestamp) -> Result<Names, Trouble> {
    let kind = Kind::of(fact);
    let mut given = Members::new("", Some(&Value::Object(fact.given.clone())))?;
    server(&mut model.settings, given.take("server").as_ref())?;
    model.settings.refuse_orphaned_runners = fact.needs.iter().any(|need| need == "old_era");
    // Facts that are about age set it themselves; GitLab's periodic workers are not in this picture.
    model.settings.stuck_after = Duration::from_secs(10 * 365 * 86_400);
    let mut names = Names::default();
    names.project = Some(project(model, given.take("project").as_ref(), now)?);
    names.runner = runner(model, &names, given.take("runner").as_ref(), now)?;
    let given_manager = given.take("manager");
    let manager_name = place_manager(model, &names, kind, given_manager.as_ref(), now)?;
    let first_queue = queue_value(model, &names);

    for (index, upstream) in list(given.take("upstream_jobs"))?.iter().enumerate() {
        let id = job::place(
            model,
            &job::Context { names: &names, manager: &manager_name, kind, role: job::Role::Upstream(index) },
            upstream,
            now,
        )?;
        names.upstream.push(id);
    }
    let target = given.take("target");
    if let Some(target) = &target {
        let context = job::Context { names: &names, manager: &manager_name, kind, role: job::Role::Target };
        names.target = Some(job::place(model, &context, target, now)?);
    }
    let given_job = given.take("job");
    names.job = match (&given_job, kind) {
        (Some(Value::Null), _) | (None, Kind::RunnerRoute) => None,
        (job, _) => {
            let empty = json!({});
            let context = job::Context { names: &names, manager: &manager_name, kind, role: job::Role::Main };
            Some(job::place(model, &context, job.as_ref().unwrap_or(&empty), now)?)
        }
    };
    if given.flag("target_is_job")? == Some(true) {
        names.target = names.job;
    }
    let stored = list(given.take("job_artifacts"))?;
    if let Some(id) = names.job {
        job::store_artifacts(model, id, &stored)?;
    }
    for more in list(given.take("more_jobs"))? {
        let context = job::Context { names: &names, manager: &manager_name, kind, role: job::Role::More };
        job::place(model, &context, &more, now)?;
    }
    if let Some(other) = given.take("other_job") {
        let context = job::Context { names: &names, manager: &manager_name, kind, role: job::Role::Other };
        names.other_job = Some(job::place(model, &context, &other, now)?);
    }
    queue(model, &mut names, given.take("queue").as_ref(), first_queue)?;
    if let Some(fault) = given.text("fault")? {
        model.inner_fault = Some(inner_fault(&fault)?);
    }
    // Played by the caller.
    for key in ["history", "then", "during"] {
        given.take(key);
    }
    given.end()?;
    if let Some(runner) = names.runner.and_then(|id| model.runners.get(&id)) {
        names.first_runner_token = runner.token.expose().to_owned();
    }
    Ok(names)
}

fn inner_fault(name: &str) -> Result<InnerFault, Trouble> {
    Ok(match name {
        "db_conflict_on_assign" => InnerFault::ConflictOnAssign,
        "db_conflict_on_first_assign" => InnerFault::ConflictOnFirstAssign,
        "replica_lag" => InnerFault::ReplicaLag,
        "payload_exception" => InnerFault::PayloadException,
        "object_storage_io_error" => InnerFault::ObjectStorage,
        other => return Err(Trouble::Skip(format!("fault {other}"))),
    })
}

fn list(value: Option<Value>) -> Result<Vec<Value>, String> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(format!("given {other} is no list")),
    }
}

fn queue_value(model: &Model, names: &Names) -> String {
    names.runner.and_then(|id| model.runners.get(&id)).map(|runner| runner.queue_value.clone()).unwrap_or_default()
}

/// `{queue.stale}`: an older value, or the current one if nothing moved.
fn queue(model: &mut Model, names: &mut Names, given: Option<&Value>, first: String) -> Result<(), String> {
    let mut given = Members::new("queue", given)?;
    let moved = given.flag("ticked_after_last_update")?;
    given.end()?;
    let now = queue_value(model, names);
    let ticked = moved.unwrap_or(now != first);
    if ticked
        && now == first
        && let Some(runner) = names.runner.and_then(|id| model.runners.get_mut(&id))
    {
        runner.queue_value = format!("{first}1");
    }
    names.stale_queue = if ticked { first } else { now };
    Ok(())
}

fn server(settings: &mut Settings, given: Option<&Value>) -> Result<(), Trouble> {
    let mut given = Members::new("server", given)?;
    let edition = given.text("edition")?;
    let licensed = given.texts("licensed")?.unwrap_or_default();
    if edition.as_deref() == Some("ee") {
        settings.licensed = licensed.into_iter().collect();
    }
    for (flag, value) in given.object("flags")?.unwrap_or_default() {
        let on = value.as_bool().ok_or_else(|| format!("given server.flags.{flag} is {value}"))?;
        match flag.as_str() {
            "two_phase_ack" => settings.two_phase = on,
            "ci_suspendable_environment_runner_routing" => settings.runtime_environment_keys = on,
            _ => return Err(Trouble::Skip(format!("flag {flag}"))),
        }
    }
    settings.long_poll = Duration::from_secs(given.number("long_poll_s")?.unwrap_or(0));
    settings.live_trace = given.flag("live_trace")?.unwrap_or(true);
    for (limiter, calls) in given.object("rate_limit")?.unwrap_or_default() {
        let calls = calls.as_u64().ok_or_else(|| format!("given server.rate_limit.{limiter} is {calls}"))?;
        settings.rate_limits.insert(limiter, calls);
    }
    settings.migrations_backoff = given.flag("migrations_backoff")?.unwrap_or(false);
    if let Some(registry) = given.take("registry") {
        let mut registry = Members::new("server.registry", Some(&registry))?;
        let host = registry.text("host_port")?.unwrap_or_else(|| "registry.gitlab.test".into());
        settings.registry = registry.flag("enabled")?.unwrap_or(true).then_some(host);
        registry.end()?;
    }
    settings.remote_artifacts = given.text("artifact_store")?.as_deref() == Some("remote");
    // Whether the front proxy or GitLab proper moves the bytes there shows in no answer of ours.
    given.flag("direct_upload")?;
    settings.artifacts_enabled = given.flag("artifacts_enabled")?.unwrap_or(true);
    if let Some(mib) = given.number("max_artifacts_size_mib")? {
        settings.max_artifacts_size_mib = mib;
    }
    settings.default_artifacts_expire_in = given.text("default_artifacts_expire_in")?;
    settings.runner_token_expiry = given.number("runner_token_expiry_s")?.map(Duration::from_secs);
    if let Some(registration) = given.take("registration") {
        let mut registration = Members::new("server.registration", Some(&registration))?;
        settings.registration_allowed = registration.flag("allowed")?.unwrap_or(false);
        registration.end()?;
    }
    settings.job_router = given.flag("job_router")?.unwrap_or(false).then(|| "wss://kas.gitlab.test".into());
    settings.allow_local_requests = given.flag("allow_local_requests")?.unwrap_or(false);
    if let Some(bucket) = given.number("running_jobs_bucket")? {
        settings.running_jobs_bucket = bucket;
    }
    settings.trust_forwarded_for = given.flag("trust_forwarded_for")?.unwrap_or(false);
    Ok(given.end()?)
}

fn project(model: &mut Model, given: Option<&Value>, now: Timestamp) -> Result<ProjectId, Trouble> {
    let mut given = Members::new("project", given.filter(|value| !value.is_null()))?;
    let name = given.text("name")?.unwrap_or_else(|| "lint".into());
    let id = model.add_project(&format!("tools/{name}"));
    let runners = given.number("runners")?.unwrap_or(0);
    for _ in 0..runners {
        model.add_runner("glrt-", &[id], now);
    }
    let Some(project) = model.projects.get_mut(&id) else { return Ok(id) };
    project.shared_runners = given.flag("shared_runners")?.unwrap_or(false);
    project.builds_enabled = given.flag("builds_enabled")?.unwrap_or(true);
    project.deleting = given.flag("deleting")?.unwrap_or(false);
    let unsigned = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok());
    if let Some(depth) = given.optional_number("default_git_depth")? {
        project.default_git_depth = unsigned(depth);
    }
    if let Some(timeout) = given.number("build_timeout")? {
        project.build_timeout = Duration::from_secs(timeout);
    }
    project.separated_caches = given.flag("separated_caches")?.unwrap_or(true);
    project.jobs_cache_index = given.number("jobs_cache_index")?;
    if let Some(limit) = given.optional_number("trace_size_limit_mib")? {
        project.trace_size_limit_mib = unsigned(limit);
    }
    project.max_artifacts_size_mib = given.number("max_artifacts_size_mib")?;
    project.group_max_artifacts_size_mib = given.number("group_max_artifacts_size_mib")?;
    project.public = given.text("visibility")?.as_deref() == Some("public");
    project.public_builds = given.flag("public_builds")?.unwrap_or(false);
    project.job_token_allowlist = given.texts("job_token_allowlist")?.unwrap_or_default().into_iter().collect();
    project.job_token_policies_enabled = given.flag("job_token_policies_enabled")?.unwrap_or(false);
    project.extra_instance_runner_jobs = given.number("instance_runner_running_jobs")?.unwrap_or(0);
    project.runner_limit = given.number("runner_limit")?;
    given.end()?;
    Ok(id)
}

fn runner(
    model: &mut Model,
    names: &Names,
    given: Option<&Value>,
    now: Timestamp,
) -> Result<Option<RunnerId>, Trouble> {
    if given == Some(&Value::Null) {
        return Ok(None);
    }
    let mut given = Members::new("runner", given)?;
    let prefix = given.text("token_prefix")?.unwrap_or_else(|| "glrt-".into());
    let project = names.project.into_iter().collect::<Vec<_>>();
    let id = model.add_runner(&prefix, &project, now);
    let Some(runner) = model.runners.get_mut(&id) else { return Ok(None) };
    runner.kind = match given.text("type")?.as_deref() {
        None | Some("project") => RunnerType::Project,
        Some("group") => RunnerType::Group,
        Some("instance") => RunnerType::Instance,
        Some(other) => return Err(format!("given runner.type is {other}").into()),
    };
    runner.paused = given.flag("paused")?.unwrap_or(false);
    runner.tags = given.texts("tags")?.unwrap_or_default().into_iter().collect();
    runner.run_untagged = given.flag("run_untagged")?.unwrap_or(true);
    runner.protected_only = given.text("access_level")?.as_deref() == Some("ref_protected");
    runner.maximum_timeout = given.number("maximum_timeout")?.map(Duration::from_secs);
    let ends = given.optional_number("token_expires_in_s")?.flatten();
    runner.token_expires_at = ends.map(|seconds| ago(now, -seconds));
    let contacted = given.optional_number("contacted_s_ago")?.unwrap_or(Some(10));
    runner.contacted_at = contacted.map(|seconds| ago(now, seconds));
    runner.creation_finished = given.text("creation_state")?.as_deref() != Some("started");
    runner.orphaned = given.flag("orphaned")?.unwrap_or(false);
    given.end()?;
    Ok(Some(id))
}

/// The manager that jobs are held by; none yet where the request is what makes one.
fn place_manager(
    model: &mut Model,
    names: &Names,
    kind: Kind,
    given: Option<&Value>,
    now: Timestamp,
) -> Result<String, Trouble> {
    let default_id = "s_0123456789ab".to_owned();
    let is_there = match given {
        None => kind == Kind::JobRoute,
        Some(given) => !given.is_null(),
    };
    if !is_there {
        return Ok(default_id);
    }
    let graceful = given.is_none();
    let mut given = Members::new("manager", given)?;
    let system_id = given.text("system_id")?.unwrap_or(default_id);
    let default_features =
        if graceful || kind == Kind::JobRoute { json!({ "cancel_gracefully": true }) } else { json!({}) };
    let features = given.object("features")?.or_else(|| default_features.as_object().cloned()).unwrap_or_default();
    let contacted = given.optional_number("contacted_s_ago")?.unwrap_or(Some(10));
    let labels = given.object("labels")?.unwrap_or_default();
    given.end()?;
    let contacted_at = contacted.map(|seconds| ago(now, seconds));
    let manager = Manager { labels, contacted_at, ..manager(&system_id, features, now) };
    if let Some(runner) = names.runner.and_then(|id| model.runners.get_mut(&id)) {
        runner.managers.insert(system_id.clone(), manager);
    }
    Ok(system_id)
}

/// `enqueue_job`: a job that comes while the fact runs.
pub(crate) fn enqueue_another(model: &mut Model, names: &Names, now: Timestamp) -> Option<JobId> {
    names.project.map(|project| model.enqueue(project, dayfly_exec::standin::JobSpec::default(), now))
}
