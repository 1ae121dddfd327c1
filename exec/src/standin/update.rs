//! `PUT /jobs/:id`: signs of life and the final report.
//!
//! A final report with a checksum waits (202) while the log is not in permanent storage or somebody
//! holds its lock; without one it counts at once. A wrong checksum is only counted, as GitLab does.

use super::answer::Answer;
use super::auth::{self, Expired};
use super::job::{Chunks, Job, JobState, PendingState};
use super::model::{Metrics, Model, age};
use super::params::{self, Params};
use super::payload::FAILURE_REASONS;
use super::settings::Persist;
use dayfly::gitlab::JobId;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::Value;
use std::time::Duration;

/// After this GitLab no longer waits for the log.
const PENDING_STATE_AGE_MAX: Duration = Duration::from_secs(5 * 60);

/// A running job's record is touched only when it is at least this old.
pub(super) const TOUCH_AGE: Duration = Duration::from_secs(15 * 60);

/// What a final report says about the log.
struct Report {
    checksum: Option<String>,
    bytesize: Option<u64>,
    exit_code: Option<i64>,
    failure_reason: Option<String>,
}

/// Answers an update.
pub(super) fn update(model: &mut Model, id: JobId, params: &Params, now: Timestamp) -> Result<Answer, Answer> {
    let token = params.required_text("token")?;
    let state = params.text("state")?;
    let report = read_report(params)?;
    auth::job(model, id, Some(&token), Expired::FailsTheJob, now)?;
    auth::job_heartbeat(model, id, now);
    let (live_trace, persist) = (model.settings.live_trace, model.settings.live_trace_persist_after);
    let two_phase = model.settings.two_phase;
    let Model { jobs, metrics, .. } = model;
    let Some(job) = jobs.get_mut(&id) else { return Err(Answer::refusal(StatusCode::FORBIDDEN, None)) };
    if let Some(answer) = acknowledge(job, two_phase, state.as_deref(), now) {
        return Ok(answer);
    }
    let ends = state.as_deref() != Some("running");
    if ends && live_trace && report.checksum.is_some() {
        if job.trace.locked {
            return Ok(wait(job, state.as_deref(), &report, now));
        }
        persist_if_due(job, persist, now);
        if job.trace.chunks == Chunks::Live {
            let pending_since = job.pending_state.as_ref().map(|pending| pending.created_at);
            if pending_since.is_none_or(|since| age(since, now) <= PENDING_STATE_AGE_MAX) {
                return Ok(wait(job, state.as_deref(), &report, now));
            }
        } else {
            verify(job, &report, metrics);
        }
    }
    let status = apply(job, state.as_deref(), &report, now);
    Ok(Answer::number(status).with_job_status(job.state))
}

fn read_report(params: &Params) -> Result<Report, Answer> {
    let output = params.object("output")?;
    let member = |key: &str| output.and_then(|output| output.get(key));
    let checksum = member("checksum").and_then(Value::as_str).map(str::to_owned);
    let checksum = match checksum {
        Some(checksum) => Some(checksum),
        None => params.text("checksum")?,
    };
    let bytesize =
        params::integer(member("bytesize")).map_err(|()| Answer::bad_parameter("output[bytesize] is invalid"))?;
    Ok(Report {
        checksum: checksum.filter(|checksum| !checksum.is_empty()),
        bytesize: bytesize.and_then(|size| u64::try_from(size).ok()),
        exit_code: params.integer("exit_code")?,
        failure_reason: params.text("failure_reason")?,
    })
}

/// Two-phase servers: the job waits for `running`; there is no decline.
fn acknowledge(job: &mut Job, two_phase: bool, state: Option<&str>, now: Timestamp) -> Option<Answer> {
    let answer = |status, job: &Job| Some(Answer::number(status).with_job_status(job.state));
    let Some(ack) = &mut job.waiting_for_ack else {
        // A job that runs cannot go back; without the flag `pending` is no state of a runner.
        return if two_phase && state == Some("pending") { answer(StatusCode::BAD_REQUEST, job) } else { None };
    };
    match state {
        Some("pending") if ack.manager_assigned => answer(StatusCode::CONFLICT, job),
        Some("pending") => {
            ack.until = super::model::after(now, Duration::from_secs(120));
            answer(StatusCode::OK, job)
        }
        Some("running") => {
            job.waiting_for_ack = None;
            job.state = JobState::Running;
            job.started_at = Some(now);
            job.updated_at = now;
            answer(StatusCode::OK, job)
        }
        _ => answer(StatusCode::BAD_REQUEST, job),
    }
}

/// 202: the report is kept, the interval grows with its age.
fn wait(job: &mut Job, state: Option<&str>, report: &Report, now: Timestamp) -> Answer {
    let pending = job.pending_state.get_or_insert_with(|| PendingState {
        state: state.unwrap_or_default().to_owned(),
        checksum: report.checksum.clone(),
        bytesize: report.bytesize,
        failure_reason: report.failure_reason.clone(),
        created_at: now,
        answered: 0,
    });
    pending.answered += 1;
    let seconds = backoff(age(pending.created_at, now));
    Answer::number(StatusCode::ACCEPTED)
        .with_job_status(job.state)
        .with("x-gitlab-trace-update-interval", &seconds.to_string())
}

/// 1 s for the first two seconds, then half the age, rounded down to a power of two, at most 64 s.
fn backoff(age: Duration) -> u64 {
    let slot = age.as_secs().checked_ilog2().unwrap_or(0).saturating_sub(1);
    1 << slot.min(6)
}

fn persist_if_due(job: &mut Job, persist: Persist, now: Timestamp) {
    let answered = job.pending_state.as_ref().map_or(0, |pending| pending.answered);
    let due = match persist {
        Persist::AtOnce | Persist::Never => false,
        Persist::AfterReports(reports) => answered >= reports,
        Persist::After(duration) => job.trace.written_at.is_none_or(|written| age(written, now) >= duration),
    };
    if due && job.trace.chunks == Chunks::Live {
        job.trace.chunks = Chunks::Persisted;
    }
}

/// Counts what the report says about the log and is not so. GitLab does not look at empty logs.
fn verify(job: &Job, report: &Report, metrics: &mut Metrics) {
    let crc = format!("crc32:{:08x}", crc32fast::hash(&job.trace.bytes));
    let size = u64::try_from(job.trace.bytes.len()).unwrap_or(u64::MAX);
    let wrong_sum = report.checksum.as_deref().is_some_and(|checksum| !checksum.eq_ignore_ascii_case(&crc));
    let wrong_size = report.bytesize.is_some_and(|bytesize| bytesize != size);
    if job.trace.bytes.is_empty() {
        metrics.trace_missing += u64::from(wrong_sum || wrong_size);
        return;
    }
    metrics.trace_invalid += u64::from(wrong_sum);
    metrics.trace_corrupted += u64::from(wrong_sum && wrong_size);
}

fn apply(job: &mut Job, state: Option<&str>, report: &Report, now: Timestamp) -> StatusCode {
    match state {
        Some("running") => {
            if age(job.updated_at, now) >= TOUCH_AGE {
                job.updated_at = now;
            }
        }
        Some("success") => {
            job.end(JobState::Success, None, now);
            job.verdicts += 1;
        }
        Some("failed") => {
            let reason = report.failure_reason.as_deref().filter(|reason| FAILURE_REASONS.contains(reason));
            // A 16-bit column.
            job.exit_code = report.exit_code.map(|code| code.clamp(i64::from(i16::MIN), i64::from(i16::MAX)));
            if let Some(allowed) = &job.spec.exit_codes_allowed {
                job.allow_failure = report.exit_code.is_some_and(|code| allowed.contains(&code));
            }
            job.end(JobState::Failed, Some(reason.unwrap_or("unknown_failure")), now);
            job.verdicts += 1;
        }
        _ => return StatusCode::BAD_REQUEST,
    }
    StatusCode::OK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_64_seconds() {
        let steps = [(0, 1), (1, 1), (3, 1), (4, 2), (6, 2), (8, 4), (130, 64), (290, 64)];
        for (age, wait) in steps {
            assert_eq!(backoff(Duration::from_secs(age)), wait, "{age} s");
        }
    }
}
