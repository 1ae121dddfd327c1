//! One job of a fact: from the format's members to a spec and a place in its life.

use crate::given::{Kind, Members, Trouble, ago};
use crate::names::{Names, Placeholders, as_text};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{
    Acknowledgement, Artifact, ArtifactContent, Chunks, Job, JobSpec, JobState, Model, PendingState, ProjectId, User,
    Variable,
};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::time::Duration;

/// Which job of the fact it is: decides defaults.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Main,
    More,
    Other,
    Target,
    Upstream(usize),
}

/// What a job is placed into.
pub(crate) struct Context<'a> {
    pub(crate) names: &'a Names,
    pub(crate) manager: &'a str,
    pub(crate) kind: Kind,
    pub(crate) role: Role,
}

/// Makes the job.
pub(crate) fn place(model: &mut Model, context: &Context<'_>, given: &Value, now: Timestamp) -> Result<JobId, Trouble> {
    let mut given = Members::new("job", Some(given))?;
    let project = project_of(model, context, &mut given)?;
    let stored = if context.role == Role::Main { None } else { given.take("artifacts") };
    let spec = spec(model, context, &mut given)?;
    let status = given.text("status")?;
    let default = match (context.role, context.kind) {
        (Role::Main | Role::More, Kind::Request) => "pending",
        (Role::Upstream(_) | Role::Target, _) => "success",
        _ => "running",
    };
    let state = state(status.as_deref().unwrap_or(default))?;
    let id = model.enqueue(project, spec, now);
    let timeout = model.projects.get(&project).map_or(Duration::ZERO, |project| project.build_timeout);
    let runner = context.names.runner;
    let Some(job) = model.jobs.get_mut(&id) else { return Err("the job is gone".to_owned().into()) };
    if let (true, Some(runner)) = (state != JobState::Pending, runner) {
        job.start(runner, context.manager, timeout, now);
    }
    age(job, &mut given, now)?;
    log(job, &mut given, now)?;
    job.state = state;
    job.queued = state == JobState::Pending || given.flag("still_queued")?.unwrap_or(false);
    job.finished_at = state.is_over().then_some(now);
    job.failure_reason = given.text("failure_reason")?;
    job.erased = given.flag("erased")?.unwrap_or(false);
    if given.text("token_state")?.as_deref() == Some("expired") {
        job.token_expires_at = Some(ago(now, 60));
    }
    let manager_assigned = given.flag("manager_assigned")?.unwrap_or(false);
    if given.flag("waiting_for_ack")? == Some(true) {
        job.queued = false;
        job.runner = runner;
        job.manager = Some(context.manager.to_owned());
        job.waiting_for_ack = Some(Acknowledgement { until: ago(now, -120), manager_assigned });
    }
    given.end()?;
    let stored: Vec<Value> = stored.and_then(|stored| serde_json::from_value(stored).ok()).unwrap_or_default();
    store_artifacts(model, id, &stored)?;
    Ok(id)
}

fn state(word: &str) -> Result<JobState, String> {
    Ok(match word {
        "pending" => JobState::Pending,
        "running" => JobState::Running,
        "canceling" => JobState::Canceling,
        "success" => JobState::Success,
        "failed" => JobState::Failed,
        "canceled" => JobState::Canceled,
        other => return Err(format!("given job.status is {other}")),
    })
}

/// The fact's own project, or another one: unnamed, or named.
fn project_of(model: &mut Model, context: &Context<'_>, given: &mut Members) -> Result<ProjectId, Trouble> {
    let own = context.names.project.ok_or_else(|| "no project".to_owned())?;
    let in_other = given.flag("in_other_project")?.unwrap_or(false);
    let named = given.text("project")?;
    if !in_other && named.is_none() {
        return Ok(own);
    }
    let name = named.as_deref().unwrap_or("elsewhere");
    let other = model.add_project(&format!("others/{name}"));
    // A named project's jobs run somewhere; an unnamed one is out of the runner's reach.
    if named.is_some()
        && let Some(runner) = context.names.runner.and_then(|id| model.runners.get_mut(&id))
    {
        runner.projects.insert(other);
    }
    Ok(other)
}

fn spec(model: &Model, context: &Context<'_>, given: &mut Members) -> Result<JobSpec, Trouble> {
    let mut spec = JobSpec::default();
    if let Role::Upstream(index) = context.role {
        spec.name = format!("upstream {index}");
    }
    if let Some(name) = given.text("name")? {
        spec.name = name;
    }
    if let Some(stage) = given.text("stage")? {
        spec.stage = stage;
    }
    spec.stage_idx = given.number("stage_idx")?.unwrap_or(0);
    if let Some(git_ref) = given.text("ref")? {
        spec.git_ref = git_ref;
    }
    spec.is_tag = given.text("ref_type")?.as_deref() == Some("tag");
    spec.merge_request_ref = given.flag("merge_request_ref")?.unwrap_or(false);
    let (protected, ref_protected) = (given.flag("protected")?, given.flag("ref_protected")?);
    spec.protected = protected.or(ref_protected).unwrap_or(false);
    spec.tags = given.texts("tags")?.unwrap_or_default().into_iter().collect();
    if let Some(script) = given.texts("script")? {
        spec.script = script;
    }
    spec.after_script = given.texts("after_script")?.unwrap_or_default();
    for (key, slot) in [
        ("release", &mut spec.release),
        ("hooks", &mut spec.hooks),
        ("run", &mut spec.run),
        ("image", &mut spec.image),
        ("services", &mut spec.services),
        ("artifacts", &mut spec.artifacts),
        ("cache", &mut spec.cache),
        ("secrets", &mut spec.secrets),
        ("policy", &mut spec.policy),
        ("retry", &mut spec.retry),
    ] {
        *slot = given.take(key).filter(|value| !value.is_null());
    }
    spec.inputs_spec = given.object("inputs_spec")?;
    spec.inputs = given.object("inputs")?.unwrap_or_default();
    spec.variables = variables(given.take("variables").as_ref(), true)?;
    let secret = variables(given.take("project_variables").as_ref(), false)?;
    spec.variables.extend(secret);
    let named = given.texts("dependencies")?;
    spec.dependencies = dependencies(model, context, spec.stage_idx, named.as_deref())?;
    spec.dependencies_valid = given.flag("dependencies_valid")?.unwrap_or(true);
    let codes = given.take("exit_codes_allowed").filter(|value| !value.is_null());
    spec.exit_codes_allowed = match codes {
        Some(Value::Array(codes)) => Some(codes.iter().filter_map(Value::as_i64).collect()),
        Some(code) => Some(vec![code.as_i64().ok_or_else(|| format!("given job.exit_codes_allowed is {code}"))?]),
        None => None,
    };
    spec.archived = given.flag("archived")?.unwrap_or(false);
    spec.user_blocked = given.flag("user_blocked")?.unwrap_or(false);
    spec.user = user(given.text("user")?.as_deref())?;
    spec.triggered = given.flag("triggered")?.unwrap_or(false);
    if let Some(source) = given.text("pipeline_source")? {
        spec.pipeline_source = source;
    }
    spec.runtime_environment_key = given.text("runtime_environment_key")?;
    let depends = given.flag("depends_on_target")?.unwrap_or(false);
    let crosses = given.flag("cross_pipeline_dependency")?.unwrap_or(false);
    if depends || crosses {
        spec.dependencies.extend(context.names.target);
    }
    // Jobs that depend on each other are of one pipeline, unless the fact says otherwise.
    let relatives = context.names.upstream.first().copied().or(context.names.target.filter(|_| depends && !crosses));
    spec.pipeline = relatives.and_then(|id| model.jobs.get(&id)).map(|job| job.pipeline);
    Ok(spec)
}

fn user(word: Option<&str>) -> Result<User, Trouble> {
    match word {
        None | Some("owner" | "member" | "other_member" | "member_of_both" | "maintainer" | "developer") => {
            Ok(User::Everywhere)
        }
        Some("member_of_downstream") => Ok(User::OwnProject),
        Some("stranger" | "non_member" | "nobody" | "not_a_member") => Ok(User::Nowhere),
        Some(other) => Err(Trouble::Skip(format!("user {other}"))),
    }
}

/// The named upstream jobs, or all of earlier stages.
fn dependencies(
    model: &Model,
    context: &Context<'_>,
    stage: u64,
    named: Option<&[String]>,
) -> Result<Vec<JobId>, String> {
    let earlier = context.names.upstream.iter().filter_map(|id| model.jobs.get(id));
    match named {
        None => Ok(earlier.filter(|job| job.spec.stage_idx < stage.max(1)).map(|job| job.id).collect()),
        Some(named) => named
            .iter()
            .map(|name| {
                let found = context
                    .names
                    .upstream
                    .iter()
                    .filter_map(|id| model.jobs.get(id))
                    .find(|job| job.spec.name == *name);
                found
                    .map(|job| job.id)
                    .ok_or_else(|| format!("given job.dependencies names {name}, which is no upstream job"))
            })
            .collect(),
    }
}

/// `[{key, value, …}]` or a map of key to value.
fn variables(given: Option<&Value>, public: bool) -> Result<Vec<Variable>, Trouble> {
    let entries: Vec<Value> = match given {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list.clone(),
        Some(Value::Object(map)) => map.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect(),
        Some(other) => return Err(format!("given variables are {other}").into()),
    };
    let variable = |entry: &Value| {
        let mut entry = Members::new("variable", Some(entry))?;
        let key = entry.text("key")?.ok_or("a variable without key")?;
        let value = entry
            .take("value")
            .map_or_else(String::new, |value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let is_file = entry.text("variable_type")?.as_deref() == Some("file");
        let variable = Variable {
            key,
            value,
            public: entry.flag("public")?.unwrap_or(public),
            masked: entry.flag("masked")?.unwrap_or(false),
            file: entry.flag("file")?.unwrap_or(is_file),
            raw: entry.flag("raw")?.unwrap_or(false),
        };
        // Whether a protected variable reaches this job was decided by the fact.
        entry.flag("protected")?;
        entry.end()?;
        Ok::<_, String>(variable)
    };
    Ok(entries.iter().map(variable).collect::<Result<_, _>>()?)
}

fn age(job: &mut Job, given: &mut Members, now: Timestamp) -> Result<(), Trouble> {
    let seconds =
        |number: Option<u64>, default: i64| number.and_then(|number| i64::try_from(number).ok()).unwrap_or(default);
    job.queued_at = ago(now, seconds(given.number("queued_s_ago")?, 0));
    job.updated_at = ago(now, seconds(given.number("idle_s")?, 10));
    Ok(())
}

fn log(job: &mut Job, given: &mut Members, now: Timestamp) -> Result<(), Trouble> {
    let nothing = Placeholders::none();
    if let Some(trace) = given.take("trace").filter(|trace| !trace.is_null()) {
        job.trace.bytes = crate::names::bytes_of(&trace, &nothing)?;
    }
    job.trace.chunks = match given.text("trace_chunks")?.as_deref() {
        Some("live") => Chunks::Live,
        Some("none") => Chunks::None,
        Some("persisted") => Chunks::Persisted,
        None if job.trace.bytes.is_empty() => Chunks::None,
        None => Chunks::Persisted,
        Some(other) => return Err(format!("given job.trace_chunks is {other}").into()),
    };
    job.trace.locked = given.flag("trace_locked")?.unwrap_or(false);
    job.trace.watched = given.flag("watched")?.unwrap_or(false);
    if let Some(pending) = given.take("pending_state").filter(|pending| !pending.is_null()) {
        let mut pending = Members::new("job.pending_state", Some(&pending))?;
        let age = pending.number("age_s")?.and_then(|age| i64::try_from(age).ok()).unwrap_or(0);
        job.pending_state = Some(PendingState {
            state: pending.text("state")?.unwrap_or_else(|| "success".into()),
            checksum: pending.text("checksum")?,
            bytesize: pending.number("bytesize")?,
            failure_reason: pending.text("failure_reason")?,
            created_at: ago(now, age),
            answered: 1,
        });
        pending.end()?;
    }
    Ok(())
}

/// Artifacts that are already there.
pub(crate) fn store_artifacts(model: &mut Model, id: JobId, stored: &[Value]) -> Result<(), Trouble> {
    for given in stored {
        let mut given = Members::new("artifact", Some(given))?;
        let kind = given.text("type")?.unwrap_or_else(|| "archive".into());
        let filename = given.text("filename")?.unwrap_or_else(|| "artifacts.zip".into());
        let size = given.number("size")?.unwrap_or(0);
        let remote = given.text("store")?.as_deref() == Some("remote");
        let format =
            given.text("format")?.unwrap_or_else(|| if kind == "archive" { "zip".into() } else { "gzip".into() });
        let expires = given.optional_number("expires_in_s")?.flatten();
        given.end()?;
        let artifact = Artifact {
            kind: kind.clone(),
            format,
            filename,
            size,
            sha256: "0".repeat(64),
            accessibility: "public".into(),
            remote,
            content: ArtifactContent::Pattern,
        };
        if let Some(job) = model.jobs.get_mut(&id) {
            job.artifacts_expire_at = expires.map(|seconds| ago(job.queued_at, -seconds));
            job.artifacts.insert(kind, artifact);
        }
    }
    Ok(())
}

/// The log as the format compares it.
pub(crate) fn trace_of(job: &Job) -> Value {
    as_text(&job.trace.bytes)
}
