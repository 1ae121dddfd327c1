//! The job as GitLab sent it: the raw bytes, and the few fields that we read.
//!
//! The payload passes through whole. Nothing here re-serialises it; the one edit (design D8) is a
//! number spliced into the raw bytes.

use super::JobId;
use crate::secret::Secret;
use bytes::Bytes;
use std::time::Duration;

/// A dependency whose artifacts the job may fetch.
#[derive(Clone, Debug)]
pub struct Dependency {
    /// Its job id.
    pub id: JobId,
    /// The token to present for it.
    pub token: Secret,
}

/// One job, ready to hand out.
#[derive(Clone, Debug)]
pub struct JobPayload {
    raw: RawPayload,
    /// Its id.
    pub id: JobId,
    /// The job token.
    pub token: Secret,
    /// `runner_info.timeout`, if it is a positive integer.
    pub timeout: Option<Duration>,
    /// Name of the job, cleaned of control characters and cut to 255 characters: for people only.
    pub name: String,
    /// Path of its project, likewise.
    pub project: String,
    /// Its dependencies.
    pub dependencies: Vec<Dependency>,
    /// Whether CI_DEBUG_TRACE or CI_DEBUG_SERVICES is true.
    pub debug_trace: bool,
    /// `features.trace_sections`.
    pub trace_sections: bool,
    /// `features.failure_reasons`.
    pub failure_reasons: Vec<String>,
    /// `X-Request-Id` of the 201, if it was well-formed.
    pub request_id: Option<String>,
}

/// Why a payload cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The body broke off or was too large.
    #[error("{0}")]
    Body(String),
    /// Not JSON.
    #[error("parse as JSON")]
    Json(#[source] serde_json::Error),
    /// No usable id.
    #[error("member `id` is no positive integer")]
    Id,
    /// No job token.
    #[error("member `token` is missing")]
    Token,
}

/// The raw bytes: secrets in most of them, so they never print.
#[derive(Clone)]
struct RawPayload(Bytes);

impl std::fmt::Debug for RawPayload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

impl JobPayload {
    /// Reads the fields of a 201's body (at most 32 MiB, JSON depth at most 64).
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn parse(raw: Bytes, request_id: Option<String>) -> Result<Self, PayloadError> {
        let _ = (raw, request_id);
        unimplemented!()
    }

    /// The bytes as GitLab sent them.
    #[must_use]
    pub fn raw(&self) -> &Bytes {
        &self.raw.0
    }

    /// The bytes with `runner_info.timeout` lowered to `remaining` whole seconds, as a number
    /// spliced into the raw text; unchanged if it is no positive integer (design D8).
    #[must_use]
    pub fn with_timeout(&self, remaining: Duration) -> Bytes {
        let _ = remaining;
        unimplemented!()
    }
}
