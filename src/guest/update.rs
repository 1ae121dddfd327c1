//! `PUT /jobs/:id`: signs of life, and the guest's verdict.
//!
//! The verdict is the job's to take; here it is read and bounded. `running` is answered from local
//! state, and the first one is always 200: 19.3 holds the job's start on it and polls for ever
//! after a 403 (decision D13). Never 404, which counts as delivered.

use super::GuestEvent;
use super::VerdictAnswer;
use super::answer::{self, Answer};
use super::body::{RequestBody, object};
use super::handler::Handler;
use super::trace::is_over;
use crate::gitlab::{JobStatus, Verdict};
use http::StatusCode;
use serde::Deserialize;
use std::sync::atomic::Ordering;

/// Bytes of one update at most; the official runner sends 1 KiB.
const UPDATE_BODY_BYTES_MAX: usize = 64 * 1024;
/// Characters of a failure reason at most; GitLab's longest has 34.
const FAILURE_REASON_CHARS_MAX: usize = 64;
/// Bytes of an environment's key at most: it is a name.
const ENVIRONMENT_KEY_BYTES_MAX: usize = 255;
/// What GitLab makes of a reason that it does not know.
const UNKNOWN_FAILURE: &str = "unknown_failure";

/// An update, as far as we read it: `output`, `checksum` and `info` are about the guest's own view
/// of its trace, and ours is what counts. A repeated member is an error of serde's.
#[derive(Deserialize)]
pub struct Update {
    /// The job's token, as the guest has it.
    #[serde(default)]
    pub token: Option<String>,
    #[serde(default)]
    state: String,
    #[serde(default)]
    failure_reason: Option<String>,
    #[serde(default)]
    exit_code: Option<serde_json::Number>,
    #[serde(default)]
    runtime_environment_key: Option<String>,
}

/// What an update says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// The job goes on.
    Running,
    /// The job is over.
    Verdict(Verdict),
}

impl Update {
    /// `None`: a state that no runner reports.
    pub fn said(self) -> Option<Said> {
        let success = match self.state.as_str() {
            "running" => return Some(Said::Running),
            "success" => true,
            "failed" => false,
            _ => return None,
        };
        let reason = self.failure_reason.filter(|reason| !success && !reason.is_empty());
        Some(Said::Verdict(Verdict {
            success,
            failure_reason: reason.map(|reason| if is_reason(&reason) { reason } else { UNKNOWN_FAILURE.into() }),
            exit_code: self.exit_code.as_ref().map(exit_code),
            runtime_environment_key: self.runtime_environment_key.filter(|key| is_key(key)),
        }))
    }
}

fn is_reason(text: &str) -> bool {
    text.len() <= FAILURE_REASON_CHARS_MAX && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

/// What is no key is passed over: it says nothing of how the job ended.
fn is_key(text: &str) -> bool {
    (1..=ENVIRONMENT_KEY_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Any number, brought into 64 bits; GitLab brings it into 16.
fn exit_code(number: &serde_json::Number) -> i64 {
    match (number.as_i64(), number.as_f64()) {
        (Some(code), _) => code,
        (None, Some(code)) if code < 0.0 => i64::MIN,
        _ => i64::MAX,
    }
}

impl Handler {
    /// Takes an update. `proven`: a header held the job token already.
    pub(super) async fn update(&self, proven: bool, mut body: RequestBody) -> Result<Answer, Answer> {
        let body = self.read(&mut body, UPDATE_BODY_BYTES_MAX).await?;
        let update: Update = object(&body).ok_or_else(|| self.refuse(StatusCode::BAD_REQUEST, "body"))?;
        // A token in the body must be right even beside a right header: GitLab would read it first.
        let right = update.token.as_deref().map_or(proven, |token| self.job_token.matches(token));
        if !right {
            return Err(self.refuse(StatusCode::UNAUTHORIZED, "token"));
        }
        self.spoke();
        match update.said() {
            Some(Said::Running) => Ok(self.running()),
            Some(Said::Verdict(verdict)) => self.verdict(verdict).await,
            None => Err(self.refuse(StatusCode::BAD_REQUEST, "state")),
        }
    }

    fn running(&self) -> Answer {
        let first = !self.running_answered.swap(true, Ordering::AcqRel);
        let view = self.view();
        if !first && is_over(&view) {
            return self.refuse_over();
        }
        answer::with_job(answer::text(StatusCode::OK), &view)
    }

    async fn verdict(&self, verdict: Verdict) -> Result<Answer, Answer> {
        let view = self.view();
        let answered = match &view.verdict {
            _ if view.status == JobStatus::Over => VerdictAnswer::Over,
            Some(known) if *known == verdict => VerdictAnswer::Taken,
            Some(_) => VerdictAnswer::Over,
            // A job that does not listen any more could not write it either.
            None => self.ask(|reply| GuestEvent::Verdict { verdict, reply }).await.unwrap_or(VerdictAnswer::Later),
        };
        match answered {
            VerdictAnswer::Taken => Ok(answer::text(StatusCode::OK)),
            VerdictAnswer::Over => Err(self.refuse_over()),
            VerdictAnswer::Later => Err(answer::come_again(StatusCode::SERVICE_UNAVAILABLE)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expected: Option<(bool, Option<&str>, Option<i64>)>) {
        let said = object::<Update>(body.as_bytes()).and_then(Update::said);
        let expected = expected.map(|(success, reason, exit_code)| {
            Said::Verdict(Verdict {
                success,
                failure_reason: reason.map(str::to_owned),
                exit_code,
                runtime_environment_key: None,
            })
        });
        assert_eq!(said, expected, "{body}");
    }

    #[test]
    fn a_verdict_is_read_within_bounds() {
        check(r#"{"state":"success"}"#, Some((true, None, None)));
        check(r#"{"state":"success","failure_reason":"x","exit_code":0}"#, Some((true, None, Some(0))));
        check(
            r#"{"state":"failed","failure_reason":"script_failure","exit_code":3}"#,
            Some((false, Some("script_failure"), Some(3))),
        );
        check(r#"{"state":"failed","failure_reason":""}"#, Some((false, None, None)));
        check(r#"{"state":"failed","failure_reason":"Not One"}"#, Some((false, Some("unknown_failure"), None)));
        let long = format!(r#"{{"state":"failed","failure_reason":"{}"}}"#, "a".repeat(65));
        check(&long, Some((false, Some("unknown_failure"), None)));
        check(r#"{"state":"failed","exit_code":18446744073709551615}"#, Some((false, None, Some(i64::MAX))));
        check(r#"{"state":"failed","exit_code":-1e300}"#, Some((false, None, Some(i64::MIN))));
        check(
            r#"{"state":"failed","exit_code":null,"output":{"checksum":"crc32:0"},"new":[1]}"#,
            Some((false, None, None)),
        );
    }

    /// U43: the key of a kept environment goes on with the verdict; what can be none is left out.
    #[test]
    fn the_key_of_an_environment_is_part_of_the_verdict() {
        let key = |key: &str| {
            let body = format!(r#"{{"state":"success","runtime_environment_key":{key}}}"#);
            match object::<Update>(body.as_bytes()).and_then(Update::said) {
                Some(Said::Verdict(verdict)) => verdict.runtime_environment_key,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(key("\"rt-1/abc\"").as_deref(), Some("rt-1/abc"));
        for none in ["null", "\"\"", "\"a b\"", "\"a\\n\"", &format!("\"{}\"", "x".repeat(256))] {
            assert_eq!(key(none), None, "{none}");
        }
    }

    /// T11: unknown states.
    /// T5: a token twice.
    #[test]
    fn what_is_no_update_is_refused() {
        for body in [
            "",
            "[]",
            "{}",
            r#"[null,"success",null,0]"#,
            r#"{"state":"pending"}"#,
            r#"{"state":"Success"}"#,
            r#"{"state":7}"#,
            r#"{"state":"failed","exit_code":"3"}"#,
            r#"{"token":"a","token":"b","state":"failed"}"#,
        ] {
            check(body, None);
        }
    }
}
