//! Who asks? Runner tokens from the body, job tokens from body, query or `JOB-TOKEN` header.
//!
//! In GitLab's order: a `token` parameter decides alone, even a wrong one beside a right header. The
//! token is judged before it is compared with the id in the path.

use super::answer::Answer;
use super::job::JobState;
use super::model::Model;
use super::params::Params;
use super::runner::{LEGACY_SYSTEM_ID, RunnerId};
use dayfly::gitlab::JobId;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;

/// A header as Rack reads it: `_` counts as `-`, several values are joined with `, `.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let values: Vec<String> = headers
        .iter()
        .filter(|(key, _)| key.as_str().len() == name.len() && key.as_str().replace('_', "-") == name)
        .map(|(_, value)| String::from_utf8_lossy(value.as_bytes()).into_owned())
        .collect();
    (!values.is_empty()).then(|| values.join(", "))
}

/// The job token that a request shows.
pub(super) fn shown_job_token(params: &Params, headers: &HeaderMap) -> Result<Option<String>, Answer> {
    Ok(params.text("token")?.or_else(|| header(headers, "job-token")))
}

/// The runner of the `token` parameter, or 403. With `contact`, runner and manager count as seen.
pub(super) fn runner(model: &mut Model, params: &Params, contact: bool, now: Timestamp) -> Result<RunnerId, Answer> {
    let token = params.required_text("token")?;
    let Some(id) = model.runner_by_token(&token, now) else {
        model.metrics.refused += 1;
        return Err(Answer::refusal(StatusCode::FORBIDDEN, None));
    };
    let runner_is_orphaned = model.runners.get(&id).is_some_and(|runner| runner.orphaned);
    if model.settings.refuse_orphaned_runners && runner_is_orphaned {
        return Err(Answer::refusal(StatusCode::FORBIDDEN, Some("Runner is orphaned")));
    }
    if contact {
        let system_id = params.text("system_id")?.filter(|id| !id.is_empty());
        let info = params.object("info")?.cloned();
        model.heartbeat(id, Some(system_id.as_deref().unwrap_or(LEGACY_SYSTEM_ID)), info.as_ref(), now);
    }
    Ok(id)
}

/// What a job route makes of an expired job token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expired {
    /// The job is failed (update, trace).
    FailsTheJob,
    /// Only the request is refused (artifacts).
    Refused,
}

/// The job in the path, if the request shows its token and the job executes; else 403, with
/// `Job-Status` where the job is over.
pub(super) fn job(
    model: &mut Model,
    id: JobId,
    token: Option<&str>,
    expired: Expired,
    now: Timestamp,
) -> Result<JobId, Answer> {
    let Some(found) = token.and_then(|token| model.job_by_token(token)) else {
        model.metrics.refused += 1;
        return Err(Answer::refusal(StatusCode::FORBIDDEN, None));
    };
    let forbidden = |detail| Answer::refusal(StatusCode::FORBIDDEN, Some(detail));
    let deleting =
        model.jobs.get(&found).and_then(|job| model.projects.get(&job.project)).is_none_or(|project| project.deleting);
    let job = model.jobs.get_mut(&found).ok_or_else(|| forbidden("Job is not processing on runner"))?;
    if deleting {
        return Err(forbidden("Project has been deleted!"));
    }
    if job.erased {
        return Err(forbidden("Job has been erased!"));
    }
    let waits = job.waiting_for_ack.is_some();
    if !job.state.is_executing() && !waits {
        return Err(forbidden("Job is not processing on runner").with_job_status(job.state));
    }
    if job.token_is_expired(now) {
        if expired == Expired::FailsTheJob && job.id == id {
            job.end(JobState::Failed, Some("job_token_expired"), now);
        }
        return Err(forbidden("Job token has expired").with_job_status(job.state));
    }
    if found != id {
        model.metrics.refused += 1;
        return Err(Answer::refusal(StatusCode::FORBIDDEN, None));
    }
    Ok(found)
}

/// Notes that the job's runner and manager were seen.
pub(super) fn job_heartbeat(model: &mut Model, id: JobId, now: Timestamp) {
    let Some(job) = model.jobs.get(&id) else { return };
    let (runner, manager) = (job.runner, job.manager.clone());
    if let Some(runner) = runner {
        model.heartbeat(runner, manager.as_deref(), None, now);
    }
}
