//! Which recordings a replay can run: those whose answers dayfly's door would give.
//!
//! In the others the recording server misbehaved on purpose, or the runner never had a job, or had
//! two: they show what a runner does then, and dayfly must not answer like that.

use crate::recording::{Body, Class, Recording};
use dayfly::gitlab::JobPayload;
use dayfly::telemetry::chain;

/// Why a recording is not run; `None`: it is.
pub(crate) fn reason_to_skip(recording: &Recording) -> Option<String> {
    let mut jobs = 0;
    for (number, request) in recording.requests.iter().enumerate() {
        let status = request.answer.status;
        let good = match request.class {
            Class::Ask => matches!(status, Some(201 | 204)),
            Class::Put | Class::Download => status == Some(200),
            Class::Patch => status == Some(202),
            Class::Upload => status == Some(201),
            Class::Git => continue,
            Class::Other => return Some(format!("{} {} is not about a job", request.method, request.target)),
        };
        let called = || format!("request {} ({:?})", number + 1, request.class);
        if !good {
            let said = status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
            return Some(format!("{} got {said}", called()));
        }
        if let Some(word) = request.answer.job_status.as_deref().filter(|word| *word != "running") {
            return Some(format!("{} got Job-Status `{word}`", called()));
        }
        if matches!(request.body, Body::Lost) {
            return Some(format!("{} has a body that was not kept", called()));
        }
        if status == Some(201) && request.class == Class::Ask {
            jobs += 1;
            if let Err(error) = JobPayload::parse(request.answer.body.clone().into(), None) {
                return Some(format!("dayfly hands out no such payload: {}", chain(&error)));
            }
        }
    }
    match jobs {
        1 if recording.trace.is_none() => Some("its trace was not kept".into()),
        1 => None,
        jobs => Some(format!("{jobs} jobs")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::parse;

    /// A run of one job whose PATCH got this status, and this word about the job.
    fn recording(status: u16, word: &str) -> Recording {
        let request = |class: &str, status: u16, word: &str| {
            serde_json::json!({
                "kind": "request", "cls": class, "conn": "c", "method": "M", "target": "/t", "headers": [],
                "framing": "none", "body": {"bytes": 0},
                "answer": {"status": status, "headers": [["Job-Status", word]], "body": r#"{"id":1,"token":"j"}"#},
            })
            .to_string()
        };
        let lines = [
            r#"{"kind":"meta","scenario":"s","runner":"v1","runner_token":"r","job_token":"j"}"#.to_owned(),
            request("request", 201, "running"),
            request("patch", status, word),
            r#"{"kind":"final_trace","text":"","crc":"crc32:00000000"}"#.to_owned(),
        ];
        parse(&lines.join("\n"), "f").unwrap().remove(0)
    }

    #[test]
    fn a_payload_that_nobody_could_read_is_skipped() {
        let mut unreadable = recording(202, "running");
        unreadable.requests[0].answer.body = r#"{"id":"1","token":"j"}"#.into();
        assert!(reason_to_skip(&unreadable).unwrap().starts_with("dayfly hands out no such payload"));
    }

    #[test]
    fn a_recording_runs_only_with_answers_that_the_door_would_give() {
        assert_eq!(reason_to_skip(&recording(202, "running")), None);
        assert_eq!(reason_to_skip(&recording(416, "running")).unwrap(), "request 2 (Patch) got 416");
        assert_eq!(
            reason_to_skip(&recording(202, "canceling")).unwrap(),
            "request 2 (Patch) got Job-Status `canceling`"
        );
        let mut twice = recording(202, "running");
        let ask = recording(202, "running").requests.remove(0);
        twice.requests.push(ask);
        assert_eq!(reason_to_skip(&twice).unwrap(), "2 jobs");
    }
}
