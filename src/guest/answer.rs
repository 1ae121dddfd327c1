//! What does a guest get to read? Our own answers: constant texts, in GitLab's form.
//!
//! Nothing of an error's cause goes in: no address, no URL, no library's message (threats.md §6.2).

use super::GuestView;
use crate::gitlab::{Body, JobStatus, transport};
use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RANGE, RETRY_AFTER};
use http::{Response, StatusCode};
use std::time::Duration;

/// An answer on its way to hyper.
pub(super) type Answer = Response<Body>;

const JOB_STATUS: HeaderName = HeaderName::from_static("job-status");
const UPDATE_INTERVAL: HeaderName = HeaderName::from_static("x-gitlab-trace-update-interval");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// An empty body.
pub(super) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(transport::full(Bytes::new()));
    *answer.status_mut() = status;
    answer
}

/// A JSON body.
pub(super) fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(transport::full(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, JSON);
    answer
}

/// The status as text, which is GitLab's body to a PUT.
pub(super) fn text(status: StatusCode) -> Answer {
    let mut answer = Response::new(transport::full(status.as_str().to_owned()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    answer
}

/// GitLab's form of an error: `{"message":"404 Not Found"}`.
pub(super) fn error(status: StatusCode) -> Answer {
    json(status, format!(r#"{{"message":"{status}"}}"#))
}

/// 405, with what the path takes.
pub(super) fn method_not_allowed(allowed: &'static str) -> Answer {
    let mut answer = error(StatusCode::METHOD_NOT_ALLOWED);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

/// An error after which the guest shall come again at once: no answer of ours says more than a
/// second, for 19.3 obeys any value (decision D13).
pub(super) fn come_again(status: StatusCode) -> Answer {
    come_again_after(status, Duration::from_secs(1))
}

/// The same for artifacts, where nothing but the transfer waits: the runner's trace and verdict go on.
pub(super) fn come_again_after(status: StatusCode, wait: Duration) -> Answer {
    let mut answer = error(status);
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    answer
}

/// 403 to a call about a job that is over: at GitLab, or by its verdict.
pub(super) fn over(view: &GuestView) -> Answer {
    let mut answer = error(StatusCode::FORBIDDEN);
    let word = match &view.verdict {
        _ if view.status == JobStatus::Over => "canceled",
        Some(verdict) if verdict.success => "success",
        Some(_) => "failed",
        // The spool was closed a moment before the view said why.
        None => "canceled",
    };
    answer.headers_mut().insert(JOB_STATUS, HeaderValue::from_static(word));
    answer
}

/// Adds what each good answer about a running job tells: its status, and how often to call.
pub(super) fn with_job(mut answer: Answer, view: &GuestView) -> Answer {
    let word = if view.status == JobStatus::Canceling { "canceling" } else { "running" };
    answer.headers_mut().insert(JOB_STATUS, HeaderValue::from_static(word));
    // The guest's interval is ours, 1 to 3 s, whatever GitLab asks of us (decision D6).
    let interval = view.update_interval.as_secs().clamp(1, 3);
    answer.headers_mut().insert(UPDATE_INTERVAL, HeaderValue::from(interval));
    answer
}

/// Adds `Range: 0-N`, where N is the guest's next offset: a size, not an inclusive end.
pub(super) fn with_range(mut answer: Answer, next: u64) -> Answer {
    let value = HeaderValue::try_from(format!("0-{next}")).expect("digits are a header value");
    answer.headers_mut().insert(RANGE, value);
    answer
}

/// Says that the connection ends with this answer.
pub(super) fn closing(mut answer: Answer) -> Answer {
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}
