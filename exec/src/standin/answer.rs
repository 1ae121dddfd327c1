//! Answers as GitLab words them: JSON bodies, plain statuses, errors.

use super::job::JobState;
use bytes::Bytes;
use dayfly::gitlab::Body;
use dayfly::gitlab::transport::full;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use serde_json::{Value, json};

/// One answer; its body is small unless it streams.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

impl Answer {
    /// A status without a body.
    pub(super) fn empty(status: StatusCode) -> Self {
        Self { status, headers: HeaderMap::new(), body: full(Bytes::new()) }
    }

    /// A JSON body.
    pub(super) fn json(status: StatusCode, value: &Value) -> Self {
        Self::json_bytes(status, value.to_string())
    }

    /// A JSON body, already as text.
    pub(super) fn json_bytes(status: StatusCode, bytes: impl Into<Bytes>) -> Self {
        let answer = Self { status, headers: HeaderMap::new(), body: full(bytes) };
        answer.with("content-type", "application/json")
    }

    /// The status number as a JSON text, as the update and upload routes answer.
    pub(super) fn number(status: StatusCode) -> Self {
        Self::json(status, &Value::String(status.as_u16().to_string()))
    }

    /// `{"message": "<status> <reason>"}`, with ` - <detail>` where there is one.
    pub(super) fn refusal(status: StatusCode, detail: Option<&str>) -> Self {
        let phrase = status.canonical_reason().unwrap_or_default();
        let message = match detail {
            Some(detail) => format!("{} {phrase} - {detail}", status.as_u16()),
            None => format!("{} {phrase}", status.as_u16()),
        };
        Self::message(status, &message)
    }

    /// `{"message": …}`.
    pub(super) fn message(status: StatusCode, message: &str) -> Self {
        Self::json(status, &json!({ "message": message }))
    }

    /// `{"error": …}`: what parameter checks answer.
    pub(super) fn error(status: StatusCode, error: &str) -> Self {
        Self::json(status, &json!({ "error": error }))
    }

    /// 400 for a parameter.
    pub(super) fn bad_parameter(error: &str) -> Self {
        Self::error(StatusCode::BAD_REQUEST, error)
    }

    /// The same with another `message`.
    pub(super) fn with_message(self, message: &str) -> Self {
        let Self { status, headers, .. } = self;
        let other = Self::message(status, message);
        Self { status, headers, body: other.body }
    }

    /// Adds a header.
    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(HeaderName::from_static(name), value);
        }
        self
    }

    /// Adds `Job-Status`.
    pub(super) fn with_job_status(self, state: JobState) -> Self {
        self.with("job-status", state.as_str())
    }

    /// The whole response.
    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}
