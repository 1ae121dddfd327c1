//! The stand-in's state as one JSON document: what `after` paths and `$changed` look at.

use crate::job::trace_of;
use crate::names::Names;
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Job, Manager, Model, Runner, RunnerId};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// A moment.
pub(crate) struct Snapshot {
    document: Value,
    pub(crate) runners: BTreeSet<RunnerId>,
}

impl Snapshot {
    /// What stands at a dotted path. Artifact types and counts are paths of their own.
    pub(crate) fn get(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(&self.document, |value, part| value.get(part))
    }

    /// The same moment with one more member.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        if let Some(members) = self.document.as_object_mut() {
            members.insert(key.to_owned(), value);
        }
        self
    }
}

/// Whether a path is one that the format names.
pub(crate) fn is_known(path: &str) -> bool {
    let first = path.split('.').next().unwrap_or_default();
    ["job", "other_job", "target", "artifacts", "runner", "new_runner", "runners", "manager", "managers", "metrics"]
        .contains(&first)
        || path == "elapsed_s"
}

/// Takes a snapshot. `known` are the runners that are not new.
pub(crate) fn snapshot(
    model: &Model,
    names: &Names,
    system_id: Option<&str>,
    known: Option<&BTreeSet<RunnerId>>,
    now: Timestamp,
) -> Snapshot {
    let job = |id: Option<JobId>| id.and_then(|id| model.jobs.get(&id)).map_or(Value::Null, |job| job_state(job, now));
    let runner = names.runner.and_then(|id| model.runners.get(&id));
    let runners: BTreeSet<RunnerId> = model.runners.keys().copied().collect();
    let new = known
        .and_then(|known| runners.iter().rev().find(|id| !known.contains(id)))
        .and_then(|id| model.runners.get(id));
    let exists =
        |runner: Option<&Runner>| runner.map_or_else(|| json!({ "exists": false }), |runner| runner_state(runner, now));
    let held_by = names.job.and_then(|id| model.jobs.get(&id)).and_then(|job| job.manager.as_deref());
    let manager = runner.or(new).and_then(|runner| {
        let by_name = |name: Option<&str>| name.and_then(|name| runner.managers.get(name));
        by_name(system_id).or_else(|| by_name(held_by)).or_else(|| runner.managers.values().next())
    });
    let managers = runner.map_or(0, |runner| runner.managers.len());
    let document = json!({
        "job": job(names.job),
        "other_job": job(names.other_job),
        "target": job(names.target),
        "artifacts": names.job.and_then(|id| model.jobs.get(&id)).map_or(Value::Null, artifacts),
        "runner": exists(runner),
        "new_runner": exists(new),
        "runners": { "count": runners.len() },
        "manager": manager.map_or(Value::Null, manager_state),
        "managers": { "count": managers },
        "metrics": {
            "trace_invalid": model.metrics.trace_invalid,
            "trace_corrupted": model.metrics.trace_corrupted,
        },
    });
    Snapshot { document, runners }
}

fn date(at: Option<Timestamp>) -> Value {
    at.map_or(Value::Null, |at| json!(at.to_string()))
}

fn seconds_from(now: Timestamp, at: Option<Timestamp>) -> Value {
    at.map_or(Value::Null, |at| json!(at.duration_since(now).as_secs_f64()))
}

fn job_state(job: &Job, now: Timestamp) -> Value {
    let pending = job.pending_state.as_ref().map_or(Value::Null, |pending| {
        json!({
            "state": pending.state,
            "checksum": pending.checksum,
            "bytesize": pending.bytesize,
            "failure_reason": pending.failure_reason,
        })
    });
    json!({
        "id": job.id,
        "status": job.state.as_str(),
        "failure_reason": job.failure_reason,
        "trace": trace_of(job),
        "trace_size": job.trace.bytes.len(),
        "updated_at": date(Some(job.updated_at)),
        "started_at": date(job.started_at),
        "finished_at": date(job.finished_at),
        "pending_state": pending,
        "exit_code": job.exit_code,
        "allow_failure": job.allow_failure,
        "debug_trace": job.trace.debug,
        "runner": job.runner.map(|id| id.0),
        "manager": job.manager,
        "waiting_for_ack": job.waiting_for_ack.is_some(),
        "artifacts_expire_in_s": seconds_from(now, job.artifacts_expire_at),
        "dotenv_variables": { "count": job.dotenv.len() },
    })
}

fn artifacts(job: &Job) -> Value {
    let mut members = Map::new();
    members.insert("count".into(), json!(job.artifacts.len()));
    for (kind, artifact) in &job.artifacts {
        let shown = json!({
            "type": artifact.kind,
            "format": artifact.format,
            "filename": artifact.filename,
            "size": artifact.size,
            "sha256": artifact.sha256,
            "accessibility": artifact.accessibility,
            "store": if artifact.remote { "remote" } else { "local" },
        });
        members.insert(kind.clone(), shown);
    }
    Value::Object(members)
}

fn runner_state(runner: &Runner, now: Timestamp) -> Value {
    json!({
        "exists": true,
        "id": runner.id.0,
        "type": runner.kind.as_str(),
        "token": runner.token.expose(),
        "token_expires_in_s": seconds_from(now, runner.token_expires_at),
        "contacted_at": date(runner.contacted_at),
        "creation_state": if runner.creation_finished { "finished" } else { "started" },
        "paused": runner.paused,
        "description": runner.description,
        "maintenance_note": runner.maintenance_note,
        "tags": runner.tags,
        "run_untagged": runner.run_untagged,
        "locked": runner.locked,
        "access_level": if runner.protected_only { "ref_protected" } else { "not_protected" },
        "maximum_timeout": runner.maximum_timeout.map(|timeout| timeout.as_secs()),
    })
}

fn manager_state(manager: &Manager) -> Value {
    let mut members = manager.info.clone();
    members.insert("system_id".into(), json!(manager.system_id));
    members.insert("features".into(), json!(manager.features));
    members.insert("labels".into(), json!(manager.labels));
    members.insert("contacted_at".into(), date(manager.contacted_at));
    members.insert("ip_address".into(), json!(manager.ip_address));
    Value::Object(members)
}
