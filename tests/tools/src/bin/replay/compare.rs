//! What must hold: each answer is what the official runner needs, and in the end GitLab has the trace
//! and the verdict that the recorded runner gave.

use crate::gitlab::Gitlab;
use crate::message::content;
use crate::recording::{Body, Class, Recording, Request};
use dayfly_exec::standin::{Job, JobState, Recorded, Route};
use dayfly_test_guest::Answer;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// Seconds that a payload's timeout may have lost since GitLab's 201 (decision D8): as long as we wait
/// for anything here.
const TIMEOUT_LOST_MAX: u64 = 60;

/// Judges one answer. `sent`: bytes of trace that were sent and taken before.
pub(crate) fn answer(request: &Request, answer: &Answer, sent: &mut u64) -> Result<(), String> {
    let expected = request.answer.status.unwrap_or_default();
    let same = || same_payload(&request.answer.body, &answer.body);
    if answer.status != expected {
        return Err(format!(
            "answered {} instead of {expected}: {}",
            answer.status,
            String::from_utf8_lossy(&answer.body)
        ));
    }
    if let Some(word) = answer.header("job-status").filter(|word| *word != "running") {
        return Err(format!("answered with Job-Status `{word}`"));
    }
    // 19.3 obeys any value (decision D13).
    if let Some(pause) = answer.header("retry-after").filter(|pause| !matches!(*pause, "0" | "1")) {
        return Err(format!("answered with Retry-After `{pause}`"));
    }
    match request.class {
        Class::Ask if expected == 201 && !same() => Err("the payload is not the recorded one".into()),
        Class::Ask | Class::Git | Class::Other => Ok(()),
        // To a verdict the runner wants 200, and reads no further.
        Class::Put if verdict_of(request).is_some() => Ok(()),
        Class::Put => about_a_live_job(answer),
        Class::Patch => {
            let Body::Text(text) = &request.body else { return Err("a PATCH without a text".into()) };
            *sent += text.len() as u64;
            let range = answer.header("range").unwrap_or_default();
            if range != format!("0-{sent}") {
                return Err(format!("answered with Range `{range}`, but {sent} bytes were sent"));
            }
            about_a_live_job(answer)
        }
        Class::Upload if answer.body.is_empty() => Err("the answer to an upload is empty".into()),
        Class::Upload => Ok(()),
        Class::Download => {
            let bytes = request.answer.body_bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default();
            if answer.body == content(bytes) { Ok(()) } else { Err("the archive is another one than GitLab's".into()) }
        }
    }
}

/// What each answer about a job that goes on must say.
fn about_a_live_job(answer: &Answer) -> Result<(), String> {
    if answer.header("job-status").is_none() {
        return Err("answered without Job-Status".into());
    }
    match answer.header("x-gitlab-trace-update-interval") {
        Some("1" | "2" | "3") => Ok(()),
        other => Err(format!("answered with an update interval of {other:?}")),
    }
}

/// Whether two payloads are the same bytes, but for what the timeout has lost on the way.
fn same_payload(recorded: &str, handed_out: &[u8]) -> bool {
    if recorded.as_bytes() == handed_out {
        return true;
    }
    let Ok(handed_out) = std::str::from_utf8(handed_out) else { return false };
    let timeout = |text: &str| {
        let payload: serde_json::Value = serde_json::from_str(text).ok()?;
        payload.get("runner_info")?.get("timeout")?.as_u64()
    };
    let (Some(before), Some(after)) = (timeout(recorded), timeout(handed_out)) else { return false };
    let lost = before.saturating_sub(after);
    let splices = recorded.match_indices(&before.to_string()).any(|(at, digits)| {
        let (head, tail) = (&recorded[..at], &recorded[at + digits.len()..]);
        format!("{head}{after}{tail}") == handed_out
    });
    before > after && lost <= TIMEOUT_LOST_MAX && splices
}

/// A final report, or what GitLab holds of one.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Verdict {
    state: String,
    #[serde(default)]
    failure_reason: Option<String>,
    /// 0 is left out on the wire.
    #[serde(default)]
    exit_code: i64,
}

/// The verdict of a runner that gives none, because it was killed or could not read its payload: its
/// machine is gone, and that is no fault of the job's.
fn no_verdict() -> Verdict {
    Verdict { state: "failed".into(), failure_reason: Some("runner_system_failure".into()), exit_code: 0 }
}

/// Judges what GitLab has when all is over.
pub(crate) fn trace_and_verdict(gitlab: &Gitlab, recording: &Recording) -> Result<(), String> {
    let job = gitlab.standin.job(gitlab.job).ok_or("the job is gone at GitLab")?;
    trace(&job, recording)?;
    let invalid = gitlab.standin.read(|model| model.metrics.trace_invalid);
    if invalid != 0 {
        return Err("the checksum of the verdict is not that of GitLab's trace".into());
    }
    let recorded = recording.requests.iter().rev().find_map(verdict_of);
    verdict(&job, &gitlab.standin.requests(), &recorded.unwrap_or_else(no_verdict))?;
    artifacts(&job, recording)
}

fn verdict_of(request: &Request) -> Option<Verdict> {
    match &request.body {
        Body::Json(json) if request.class == Class::Put => report(json.as_bytes()),
        _ => None,
    }
}

/// A final report; `None` for one that the job still runs.
fn report(body: &[u8]) -> Option<Verdict> {
    serde_json::from_slice(body).ok().filter(|verdict: &Verdict| verdict.state != "running")
}

/// GitLab took one verdict, and its checksum is that of the trace.
pub(crate) fn one_verdict(gitlab: &Gitlab, job: &Job) -> Result<(), String> {
    let invalid = gitlab.standin.read(|model| model.metrics.trace_invalid);
    match (job.verdicts, invalid) {
        (1, 0) => Ok(()),
        (1, _) => Err("the checksum of the verdict is not that of GitLab's trace".into()),
        (verdicts, _) => Err(format!("GitLab took {verdicts} verdicts")),
    }
}

fn verdict(job: &Job, requests: &[Recorded], expected: &Verdict) -> Result<(), String> {
    let taken = requests.iter().filter(|r| r.route == Route::UpdateJob && r.status.is_some_and(|s| s.as_u16() == 200));
    let taken: Vec<Verdict> = taken.filter_map(|r| report(r.body.as_deref()?)).collect();
    if taken.len() != 1 || job.verdicts != 1 {
        return Err(format!("GitLab took {} verdicts: {taken:?}", job.verdicts));
    }
    if taken[0] != *expected {
        return Err(format!("the verdict is {:?} instead of {expected:?}", taken[0]));
    }
    let state = if expected.state == "success" { JobState::Success } else { JobState::Failed };
    if job.state == state { Ok(()) } else { Err(format!("the job is {:?} instead of {state:?}", job.state)) }
}

/// The recorded trace stands in GitLab's, whole; before and after it are whole lines of our own.
fn trace(job: &Job, recording: &Recording) -> Result<(), String> {
    let recorded = recording.trace.as_ref().ok_or("its trace was not kept")?;
    let crc = |bytes: &[u8]| format!("crc32:{:08x}", crc32fast::hash(bytes));
    if crc(&recorded.bytes) != recorded.crc {
        return Err("the recorded trace has not its recorded checksum".into());
    }
    let (bytes, length) = (&job.trace.bytes, recorded.bytes.len());
    if length == 0 {
        return Ok(());
    }
    let at = bytes.windows(length).position(|window| window == recorded.bytes);
    let Some(at) = at else {
        return Err(format!("GitLab's trace lacks the recorded one:\n{}", String::from_utf8_lossy(bytes)));
    };
    if at > 0 && bytes[at - 1] != b'\n' {
        return Err("the runner's trace does not begin on a line of its own".into());
    }
    if crc(&bytes[at..at + length]) != recorded.crc {
        return Err("the runner's part of GitLab's trace has not the recorded checksum".into());
    }
    Ok(())
}

fn artifacts(job: &Job, recording: &Recording) -> Result<(), String> {
    for request in recording.requests.iter().filter(|request| request.class == Class::Upload) {
        let Body::Form { content_bytes, .. } = request.body else { continue };
        let kind = request.target.split(['?', '&']).find_map(|pair| pair.strip_prefix("artifact_type="));
        let kind = kind.unwrap_or("archive");
        let stored = job.artifacts.get(kind).ok_or_else(|| format!("GitLab has no artifact of type {kind}"))?;
        let digest: String = Sha256::digest(content(content_bytes)).iter().map(|byte| format!("{byte:02x}")).collect();
        if (stored.size, &stored.sha256) != (content_bytes as u64, &digest) {
            return Err(format!("GitLab's artifact of type {kind} is another one than was sent"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_may_lose_some_of_its_timeout_and_nothing_else() {
        let recorded = r#"{"id":20,"runner_info":{"timeout":20}}"#;
        let same = |text: &str| same_payload(recorded, text.as_bytes());
        assert!(same(recorded));
        assert!(same(r#"{"id":20,"runner_info":{"timeout":19}}"#));
        assert!(!same(r#"{"id":19,"runner_info":{"timeout":20}}"#));
        assert!(!same(r#"{"id":20,"runner_info":{"timeout":21}}"#));
        assert!(!same(r#"{"id":20, "runner_info":{"timeout":19}}"#));
    }

    #[test]
    fn a_report_that_the_job_runs_is_no_verdict() {
        assert_eq!(report(br#"{"state":"running","output":{}}"#), None);
        let verdict = report(br#"{"state":"failed","failure_reason":"script_failure","exit_code":3}"#).unwrap();
        assert_eq!((verdict.state.as_str(), verdict.exit_code), ("failed", 3));
    }
}
