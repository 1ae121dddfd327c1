//! The calls that need one job's token: update, trace, and forwarding for its guest.
//!
//! No call here retries; the uploader does, and the guest runner does for what is forwarded.

use super::transport::Body;
use super::{GitlabError, JobId, JobStatus, Transport};
use crate::secret::Secret;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// `success` or `failed`.
    pub success: bool,
    /// With `failed` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_reason: Option<String>,
    /// The script's exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
}

/// `PUT /jobs/:id`.
#[derive(Clone, Debug)]
pub struct JobUpdate {
    /// `None`: `running`.
    pub verdict: Option<Verdict>,
    /// CRC-32 and size of the trace; `None` leaves `output` empty.
    pub trace: Option<(u32, u64)>,
}

/// Answer to an update that GitLab took.
#[derive(Clone, Debug)]
pub struct UpdateAnswer {
    /// What it says about the job.
    pub status: JobStatus,
    /// 202: the verdict is noted, the trace is still being stored; ask again after this time.
    pub ask_again: Option<Duration>,
    /// 412: the whole trace is wanted again, then the update.
    pub resend_trace: bool,
    /// `X-GitLab-Trace-Update-Interval`, clamped to 1 s–15 min.
    pub interval: Option<Duration>,
}

/// Answer to a piece of trace.
#[derive(Clone, Debug)]
pub struct TraceAnswer {
    /// What it says about the job.
    pub status: JobStatus,
    /// `None`: taken (202). Else 416: GitLab holds this many bytes.
    pub continue_at: Option<u64>,
    /// `X-GitLab-Trace-Update-Interval`, clamped to 1 s–15 min.
    pub interval: Option<Duration>,
}

/// A guest's request that goes on to GitLab, its credentials already dropped.
pub struct Forward {
    /// The route.
    pub route: ForwardRoute,
    /// Allowed query pairs, still percent-encoded, in order.
    pub query: Vec<(String, String)>,
    /// Allowed headers.
    pub headers: http::HeaderMap,
    /// The body, streamed.
    pub body: Body,
}

/// The three routes that are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardRoute {
    /// `POST /jobs/:own/artifacts`.
    UploadArtifacts,
    /// `GET /jobs/:id/artifacts`, own or a dependency's.
    DownloadArtifacts(JobId),
    /// `GET /jobs/:own/runtime_environment_key`.
    RuntimeEnvironmentKey,
}

/// One job at one GitLab.
#[derive(Clone)]
pub struct JobClient {
    transport: Arc<dyn Transport>,
    id: JobId,
    token: Secret,
}

impl JobClient {
    /// No call is made.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, id: JobId, token: Secret) -> Self {
        Self { transport, id, token }
    }

    /// `PUT /jobs/:id`. A 403 (job over) is an answer, [`JobStatus::Over`], not an error.
    ///
    /// # Errors
    /// The transient ones (404 counts as unavailable: GitLab never sends it here), and
    /// [`GitlabError::Unexpected`].
    pub async fn update_job(&self, update: &JobUpdate) -> Result<UpdateAnswer, GitlabError> {
        let _ = (&self.transport, &self.id, &self.token, update);
        unimplemented!()
    }

    /// `PATCH /jobs/:id/trace` with `bytes` at `offset`. A 403 and a 416 are answers.
    ///
    /// # Errors
    /// As [`JobClient::update_job`].
    pub async fn append_trace(&self, offset: u64, bytes: Bytes, debug_trace: bool) -> Result<TraceAnswer, GitlabError> {
        let _ = (offset, bytes, debug_trace);
        unimplemented!()
    }

    /// Sends a guest's request on, on a connection of its own, and streams the answer back.
    /// Never retried, never redirected. `token` overrides the job's own (a dependency's).
    ///
    /// # Errors
    /// [`GitlabError::Unavailable`] if no head of a response came.
    pub async fn forward(&self, forward: Forward, token: Option<&Secret>) -> Result<http::Response<Body>, GitlabError> {
        let _ = (forward, token);
        unimplemented!()
    }
}
