//! Which job does this runner get? Matching, the checks before the hand-out, the hand-out itself.

use super::answer::Answer;
use super::auth;
use super::job::{Acknowledgement, Job, JobState};
use super::model::{InnerFault, Model};
use super::params::Params;
use super::payload;
use super::runner::{LEGACY_SYSTEM_ID, Runner, RunnerId, RunnerType};
use bytes::Bytes;
use dayfly::gitlab::JobId;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value};
use std::net::IpAddr;
use std::time::Duration;

/// How long a two-phase server keeps a job for a silent runner.
const ACKNOWLEDGEMENT: Duration = Duration::from_secs(120);

/// Whether the runner may have this job at all, queue and pauses aside.
fn may_take(model: &Model, runner: &Runner, job: &Job) -> bool {
    let builds_enabled = model.projects.get(&job.project).is_some_and(|project| project.builds_enabled);
    builds_enabled && fits(model, runner, job)
}

/// Whether the job is of the runner's scope and kind: then its queue moves for it, whoever gets it.
pub(super) fn fits(model: &Model, runner: &Runner, job: &Job) -> bool {
    let Some(project) = model.projects.get(&job.project) else { return false };
    let in_scope = match runner.kind {
        RunnerType::Instance => project.shared_runners,
        RunnerType::Group | RunnerType::Project => runner.projects.contains(&job.project),
    };
    let tags_fit = if job.spec.tags.is_empty() { runner.run_untagged } else { job.spec.tags.is_subset(&runner.tags) };
    in_scope && tags_fit && (!runner.protected_only || job.spec.protected)
}

/// What a poll comes to.
enum Offer {
    Job(Bytes),
    Nothing,
    Conflict,
}

/// `POST /jobs/request`, as GitLab proper sees it (the long poll is in front of it).
pub(super) fn request(model: &mut Model, params: &Params, now: Timestamp) -> Result<Answer, Answer> {
    params.object("session")?;
    params.object("info")?;
    let last_update = params.text("last_update")?;
    let runner_id = auth::runner(model, params, true, now)?;
    let Some(runner) = model.runners.get_mut(&runner_id) else { return Ok(Answer::empty(StatusCode::NO_CONTENT)) };
    runner.creation_finished = true;
    let value = runner.queue_value.clone();
    let nothing = || Answer::empty(StatusCode::NO_CONTENT).with("x-gitlab-last-update", &value);
    if runner.paused || last_update.as_deref() == Some(value.as_str()) {
        return Ok(nothing());
    }
    Ok(match offer(model, runner_id, params, now)? {
        Offer::Job(payload) => Answer::json_bytes(StatusCode::CREATED, payload),
        Offer::Nothing => nothing(),
        Offer::Conflict => Answer::refusal(StatusCode::CONFLICT, None),
    })
}

fn offer(model: &mut Model, runner_id: RunnerId, params: &Params, now: Timestamp) -> Result<Offer, Answer> {
    let Some(runner) = model.runners.get(&runner_id) else { return Ok(Offer::Nothing) };
    let candidates: Vec<JobId> =
        model.jobs.values().filter(|job| job.queued && may_take(model, runner, job)).map(|job| job.id).collect();
    let info = params.object("info")?;
    let empty = Map::new();
    let features = info.and_then(|info| info.get("features")).and_then(Value::as_object).unwrap_or(&empty);
    let system_id =
        params.text("system_id")?.filter(|id| !id.is_empty()).unwrap_or_else(|| LEGACY_SYSTEM_ID.to_owned());
    let session = params.object("session")?.and_then(|session| session.get("url")).and_then(Value::as_str);
    let mut conflict = false;
    for id in candidates {
        let Some(job) = model.jobs.get_mut(&id) else { continue };
        if job.state != JobState::Pending {
            // A stale entry: taken out of the queue, and the runner is asked to come again.
            job.queued = false;
            conflict = true;
            continue;
        }
        if let Some(reason) = refusal(model, id, features) {
            if let Some(job) = model.jobs.get_mut(&id) {
                job.end(JobState::Failed, Some(reason), now);
            }
            continue;
        }
        match model.inner_fault {
            Some(InnerFault::ConflictOnAssign) => {
                conflict = true;
                continue;
            }
            Some(InnerFault::ConflictOnFirstAssign) => {
                model.inner_fault = None;
                conflict = true;
                continue;
            }
            _ => {}
        }
        if session.is_some_and(|url| !model.settings.allow_local_requests && is_local(url)) {
            conflict = true;
            continue;
        }
        return Ok(assign(model, id, runner_id, &system_id, features, now));
    }
    let lags = model.inner_fault == Some(InnerFault::ReplicaLag);
    Ok(if conflict || lags { Offer::Conflict } else { Offer::Nothing })
}

/// Why a picked job is failed instead of handed out.
fn refusal(model: &Model, id: JobId, features: &Map<String, Value>) -> Option<&'static str> {
    let job = model.jobs.get(&id)?;
    let project = model.projects.get(&job.project)?;
    let has = |feature: &str| features.get(feature) == Some(&Value::Bool(true));
    let supported = needed_features(model, job).into_iter().all(has);
    [
        (!job.spec.dependencies_valid, "missing_dependency_failure"),
        (!supported, "runner_unsupported"),
        (job.spec.archived, "archived_failure"),
        (project.deleting, "project_deleted"),
        (job.spec.user_blocked, "user_blocked"),
    ]
    .into_iter()
    .find_map(|(applies, reason)| applies.then_some(reason))
}

/// The features without which GitLab fails a picked job.
fn needed_features(model: &Model, job: &Job) -> Vec<&'static str> {
    let spec = &job.spec;
    let filled = |value: Option<&Value>| match value {
        None | Some(Value::Null) => false,
        Some(Value::Object(map)) => !map.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    let artifacts = |key: &str| filled(spec.artifacts.as_ref().and_then(|artifacts| artifacts.get(key)));
    let caches = match &spec.cache {
        Some(Value::Array(entries)) => entries.as_slice(),
        Some(entry) => std::slice::from_ref(entry),
        None => &[],
    };
    let retries_by_code = spec.retry.as_ref().is_some_and(|retry| filled(retry.get("exit_codes")));
    let secrets = model.settings.licensed.contains("ci_secrets_management") && filled(spec.secrets.as_ref());
    [
        (artifacts("reports"), "upload_multiple_artifacts"),
        (spec.merge_request_ref, "refspecs"),
        (artifacts("exclude"), "artifacts_exclude"),
        (filled(spec.release.as_ref()), "multi_build_steps"),
        (spec.exit_codes_allowed.is_some() || retries_by_code, "return_exit_code"),
        (caches.iter().any(|cache| filled(cache.get("fallback_keys"))), "fallback_cache_keys"),
        (secrets, "vault_secrets"),
    ]
    .into_iter()
    .filter_map(|(needed, feature)| needed.then_some(feature))
    .collect()
}

fn assign(
    model: &mut Model,
    id: JobId,
    runner_id: RunnerId,
    system_id: &str,
    features: &Map<String, Value>,
    now: Timestamp,
) -> Offer {
    let has = |feature: &str| features.get(feature) == Some(&Value::Bool(true));
    let two_phase = model.settings.two_phase && has("two_phase_job_commit");
    let timeout = timeout(model, id, runner_id);
    let broken = model.inner_fault == Some(InnerFault::PayloadException);
    let Some(job) = model.jobs.get_mut(&id) else { return Offer::Nothing };
    job.start(runner_id, system_id, timeout, now);
    if broken {
        job.end(JobState::Failed, Some("scheduler_failure"), now);
        return Offer::Nothing;
    }
    job.cancels_gracefully = has("cancel_gracefully");
    job.handed_out += 1;
    if two_phase {
        job.state = JobState::Pending;
        job.waiting_for_ack =
            Some(Acknowledgement { until: super::model::after(now, ACKNOWLEDGEMENT), manager_assigned: false });
    }
    Offer::Job(payload::build(model, id, runner_id, now))
}

/// The least of the job's (or its project's) timeout and the runner's maximum.
fn timeout(model: &Model, id: JobId, runner: RunnerId) -> Duration {
    let Some(job) = model.jobs.get(&id) else { return Duration::ZERO };
    let own = job.spec.timeout.or_else(|| model.projects.get(&job.project).map(|project| project.build_timeout));
    let own = own.unwrap_or(Duration::from_secs(3600));
    let maximum = model.runners.get(&runner).and_then(|runner| runner.maximum_timeout).filter(|max| !max.is_zero());
    maximum.map_or(own, |maximum| own.min(maximum))
}

/// Whether a session server stands where GitLab must not go: not https, loopback, private, link-local.
fn is_local(url: &str) -> bool {
    let Ok(url) = url::Url::parse(url) else { return true };
    let ip: Option<IpAddr> = match url.host() {
        None => return true,
        Some(url::Host::Domain(name)) => return name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => Some(ip.into()),
        Some(url::Host::Ipv6(ip)) => Some(ip.to_ipv4_mapped().map_or(ip.into(), Into::into)),
    };
    url.scheme() != "https"
        || match ip {
            Some(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_unspecified(),
            Some(IpAddr::V6(ip)) => {
                ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local() || ip.is_unspecified()
            }
            None => false,
        }
}
