//! How far a replay can follow a recording: to its end, where dayfly's door would give every answer in
//! it, or to the first answer that the door would not give.
//!
//! There the recording server misbehaved on purpose, or spoke of another job: what the runner did
//! then it did to that answer. From there a runner that can still decide takes the job on (`finish`).

use crate::recording::{Body, Class, Recording};
use dayfly::gitlab::JobPayload;
use dayfly::telemetry::chain;

/// How far.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// To the end.
    Whole,
    /// Up to this request, which is not sent, and why.
    Until(usize, String),
    /// Not at all, and why.
    No(String),
}

/// How far a replay of this recording reaches.
pub(crate) fn reach(recording: &Recording) -> Reach {
    let mut handed_out = false;
    for (number, request) in recording.requests.iter().enumerate() {
        let until = |why: String| Reach::Until(number, format!("request {} ({:?}) {why}", number + 1, request.class));
        let status = request.answer.status;
        let good = match request.class {
            Class::Ask if !handed_out => {
                // dayfly has a job before it has a guest: of the asks in vain before it there is none.
                if status == Some(201) {
                    if let Err(error) = JobPayload::parse(request.answer.body.clone().into(), None) {
                        return Reach::No(format!("dayfly hands out no such payload: {}", chain(&error)));
                    }
                    handed_out = true;
                }
                continue;
            }
            Class::Ask if status == Some(201) => return until("got another job".into()),
            Class::Ask => status == Some(204),
            Class::Put | Class::Download => status == Some(200),
            Class::Patch => status == Some(202),
            Class::Upload => status == Some(201),
            // Not to the door, or not about a job: never sent.
            Class::Git | Class::Other => continue,
        };
        if !handed_out {
            return until("came without a job".into());
        }
        if !good {
            let said = status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
            return until(format!("got {said}"));
        }
        if let Some(word) = request.answer.job_status.as_deref().filter(|word| *word != "running") {
            return until(format!("got Job-Status `{word}`"));
        }
        if matches!(request.body, Body::Lost) {
            return until("has a body that was not kept".into());
        }
    }
    match &recording.trace {
        _ if !handed_out => Reach::No("its runner never had a job".into()),
        None => Reach::Until(recording.requests.len(), "its trace was not kept".into()),
        Some(_) => Reach::Whole,
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
            request("request", 503, "running"),
            request("request", 201, "running"),
            request("patch", status, word),
            r#"{"kind":"final_trace","text":"","crc":"crc32:00000000"}"#.to_owned(),
        ];
        parse(&lines.join("\n"), "f").unwrap().remove(0)
    }

    #[test]
    fn a_payload_that_nobody_could_read_is_skipped() {
        let mut unreadable = recording(202, "running");
        unreadable.requests[1].answer.body = r#"{"id":"1","token":"j"}"#.into();
        assert!(matches!(reach(&unreadable), Reach::No(why) if why.starts_with("dayfly hands out no such payload")));
        unreadable.requests.truncate(1);
        assert_eq!(reach(&unreadable), Reach::No("its runner never had a job".into()));
    }

    #[test]
    fn a_recording_is_followed_to_the_first_answer_that_the_door_would_not_give() {
        let until = |number, why: &str| Reach::Until(number, why.to_owned());
        assert_eq!(reach(&recording(202, "running")), Reach::Whole);
        assert_eq!(reach(&recording(416, "running")), until(2, "request 3 (Patch) got 416"));
        assert_eq!(reach(&recording(202, "canceling")), until(2, "request 3 (Patch) got Job-Status `canceling`"));
        let mut twice = recording(202, "running");
        let ask = recording(202, "running").requests.remove(1);
        twice.requests.push(ask);
        assert_eq!(reach(&twice), until(3, "request 4 (Ask) got another job"));
        twice.requests.pop();
        twice.trace = None;
        assert_eq!(reach(&twice), until(3, "its trace was not kept"));
    }
}
