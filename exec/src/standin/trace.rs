//! `PATCH /jobs/:id/trace`: the log grows by offset.
//!
//! Only the start of the range and the length of the body count. The size limit is tested before the
//! offset. A piece whose end is already the end of the log is taken again without effect: so re-sending
//! the last piece is harmless, and anything else at a wrong place is 416 with the size to go on from.

use super::answer::Answer;
use super::auth::{self, Expired};
use super::job::{Chunks, Job, JobState};
use super::model::{Model, age};
use super::params::Params;
use super::settings::Persist;
use super::update::TOUCH_AGE;
use dayfly::gitlab::JobId;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;

const MIB: u64 = 1 << 20;

/// Appends `body`.
pub(super) fn append(
    model: &mut Model,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    body: &[u8],
    now: Timestamp,
) -> Result<Answer, Answer> {
    let debug = params.boolean("debug_trace")?.unwrap_or(false);
    let token = auth::shown_job_token(params, headers)?;
    auth::job(model, id, token.as_deref(), Expired::FailsTheJob, now)?;
    auth::job_heartbeat(model, id, now);
    let range = auth::header(headers, "content-range")
        .ok_or_else(|| Answer::message(StatusCode::BAD_REQUEST, "400 Missing header Content-Range"))?;
    let start = leading_number(&range);
    let persist = model.settings.live_trace_persist_after;
    let interval = model.settings.trace_update_interval;
    let Model { jobs, projects, .. } = model;
    let Some(job) = jobs.get_mut(&id) else { return Err(Answer::refusal(StatusCode::FORBIDDEN, None)) };
    let limit = projects.get(&job.project).and_then(|project| project.trace_size_limit_mib);

    let end = start.saturating_add(length(body));
    if limit.is_some_and(|limit| end / MIB >= limit) {
        job.end(JobState::Failed, Some("trace_size_exceeded"), now);
        return Err(Answer::refusal(StatusCode::FORBIDDEN, None));
    }
    if debug && start == 0 {
        job.trace.debug = true;
    }
    if job.trace.locked {
        return Err(Answer::refusal(StatusCode::CONFLICT, None).with_message("409 Conflict: Resource lock"));
    }
    if length(&job.trace.bytes) == start && !body.is_empty() {
        write(job, body, persist, now);
    }
    // A sign of life even if nothing was written.
    if age(job.updated_at, now) >= TOUCH_AGE {
        job.updated_at = now;
    }
    let size = length(&job.trace.bytes);
    if size != end {
        return Err(Answer::refusal(StatusCode::RANGE_NOT_SATISFIABLE, None)
            .with_message("416 Range Not Satisfiable")
            .with("range", &format!("0-{size}")));
    }
    let seconds = match interval {
        Some(interval) => interval.as_secs(),
        None if job.trace.watched => 3,
        None => 60,
    };
    Ok(Answer::number(StatusCode::ACCEPTED)
        .with_job_status(job.state)
        .with("range", &format!("0-{size}"))
        .with("x-gitlab-trace-update-interval", &seconds.to_string()))
}

fn write(job: &mut Job, body: &[u8], persist: Persist, now: Timestamp) {
    job.trace.bytes.extend_from_slice(body);
    // GitLab overwrites the job token with as many filler characters; a token cut in two pieces
    // stays, as it does there.
    let from = job.trace.bytes.len() - body.len();
    mask(&mut job.trace.bytes[from..], job.token.expose().as_bytes());
    job.trace.written_at = Some(now);
    if persist != Persist::AtOnce || job.trace.chunks == Chunks::None {
        job.trace.chunks = if persist == Persist::AtOnce { Chunks::Persisted } else { Chunks::Live };
    }
}

fn mask(bytes: &mut [u8], token: &[u8]) {
    if token.is_empty() {
        return;
    }
    let mut at = 0;
    while at + token.len() <= bytes.len() {
        if &bytes[at..at + token.len()] == token {
            bytes[at..at + token.len()].fill(b'x');
            at += token.len();
        } else {
            at += 1;
        }
    }
}

/// As Ruby's `to_i` of what stands before the first dash: leading digits, else 0.
fn leading_number(range: &str) -> u64 {
    let first = range.split('-').next().unwrap_or_default().trim_start();
    let digits: &str = first.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    if digits.is_empty() { 0 } else { digits.parse().unwrap_or(u64::MAX) }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_reads_like_ruby_reads_it() {
        for (range, start) in [
            ("11-17", 11),
            ("11", 11),
            ("nonsense", 0),
            ("-5-3", 0),
            ("", 0),
            ("7x-9", 7),
            ("99999999999999999999999-1", u64::MAX),
        ] {
            assert_eq!(leading_number(range), start, "{range}");
        }
    }

    #[test]
    fn the_token_is_overwritten_in_place() {
        let mut bytes = b"a glcbt-1 b glcbt-1".to_vec();
        mask(&mut bytes, b"glcbt-1");
        assert_eq!(bytes, b"a xxxxxxx b xxxxxxx");
    }
}
