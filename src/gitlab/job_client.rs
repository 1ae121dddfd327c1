//! The calls that need one job's token: update, trace, and forwarding for its guest.
//!
//! No call here retries; the uploader does, and the guest runner does for what is forwarded.

use super::answers;
use super::calls::{Draft, JOB_TOKEN, Kind, REQUEST_ID, is_request_id, query};
use super::transport::{Body, Call};
use super::{GitlabError, JobId, JobStatus, Transport};
use crate::rng::Rng;
use crate::secret::Secret;
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RANGE};
use http::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// 202 to a PUT without an interval: the official runner's first pause.
const ASK_AGAIN_DEFAULT: Duration = Duration::from_secs(1);

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
    /// By which the job's environment is found again, if its runner has kept one; GitLab's since September 2026.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_environment_key: Option<String>,
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

/// One job at one GitLab. Clones share the job's token, see [`JobClient::renew`].
#[derive(Clone)]
pub struct JobClient {
    transport: Arc<dyn Transport>,
    id: JobId,
    /// Set at the beginning, and by `renew`; a watch channel, so that one can wait for that.
    token: Arc<watch::Sender<Secret>>,
    rng: Rng,
}

/// The body of a PUT, in the official runner's order (19.3); `info`, which GitLab ignores there,
/// is left out.
#[derive(Serialize)]
struct UpdateBody<'a> {
    token: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'a str>,
    output: Output<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runtime_environment_key: Option<&'a str>,
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'a str>,
    /// Left out for an empty trace, as the official runner does.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytesize: Option<u64>,
}

impl JobClient {
    /// No call is made. `rng` makes the requests' ids.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, id: JobId, token: Secret, rng: Rng) -> Self {
        Self { transport, id, token: Arc::new(watch::Sender::new(token)), rng }
    }

    /// From now on all calls, of clones too, carry this token: GitLab has issued the job anew
    /// (threats.md G17). Calls under way end with the one before.
    pub fn renew(&self, token: Secret) {
        self.token.send_replace(token);
    }

    /// Tells of renewals.
    #[must_use]
    pub fn renewals(&self) -> watch::Receiver<Secret> {
        self.token.subscribe()
    }

    fn token(&self) -> Secret {
        self.token.borrow().clone()
    }

    /// `PUT /jobs/:id`. A 403 (job over) is an answer, [`JobStatus::Over`], not an error.
    ///
    /// Sent again with the same content it has the same effect: GitLab keeps the first final
    /// state, and answers 403 with `Job-Status` once that is stored.
    ///
    /// # Errors
    /// The transient ones (404 counts as unavailable: GitLab never sends it here), and
    /// [`GitlabError::Unexpected`].
    ///
    /// # Cancel safety
    /// A call that is dropped may have taken effect.
    pub async fn update_job(&self, update: &JobUpdate) -> Result<UpdateAnswer, GitlabError> {
        let checksum = update.trace.map(|(crc, _)| format!("crc32:{crc:08x}"));
        let verdict = update.verdict.as_ref();
        let token = self.token();
        let body = UpdateBody {
            token: token.expose(),
            state: verdict.map_or("running", |v| if v.success { "success" } else { "failed" }),
            failure_reason: verdict.filter(|v| !v.success).and_then(|v| v.failure_reason.as_deref()),
            checksum: checksum.as_deref(),
            output: Output {
                checksum: checksum.as_deref(),
                bytesize: update.trace.map(|(_, size)| size).filter(|size| *size > 0),
            },
            exit_code: verdict.and_then(|v| v.exit_code).filter(|code| *code != 0),
            runtime_environment_key: verdict.and_then(|v| v.runtime_environment_key.as_deref()),
        };
        let call = self.draft(Method::PUT, "", &token).json(&body, Kind::Small);
        let response = self.send("an update of the job", call, &token).await?;
        let (status, interval) = (answers::job_status(&response), answers::update_interval(response.headers()));
        let (ask_again, resend_trace) = match response.status() {
            StatusCode::OK | StatusCode::FORBIDDEN => (None, false),
            StatusCode::ACCEPTED => (Some(interval.unwrap_or(ASK_AGAIN_DEFAULT)), false),
            StatusCode::PRECONDITION_FAILED => (None, true),
            _ => return Err(answers::error("an update of the job", response, &token).await),
        };
        answers::read_small(response.into_body()).await;
        Ok(UpdateAnswer { status, ask_again, resend_trace, interval })
    }

    /// `PATCH /jobs/:id/trace` with `bytes` (at most 1 MiB, at least one) at `offset`. A 403 and a
    /// 416 are answers. Sending the same bytes again at the same offset does no harm: GitLab
    /// answers 202 if they are its last, else 416.
    ///
    /// # Errors
    /// As [`JobClient::update_job`].
    ///
    /// # Cancel safety
    /// A call that is dropped may have taken effect.
    pub async fn append_trace(&self, offset: u64, bytes: Bytes, debug_trace: bool) -> Result<TraceAnswer, GitlabError> {
        let last = offset.saturating_add((bytes.len() as u64).saturating_sub(1));
        let range = HeaderValue::try_from(format!("{offset}-{last}")).expect("digits are a header value");
        let token = self.token();
        let call = self
            .draft(Method::PATCH, &format!("/trace?debug_trace={debug_trace}"), &token)
            .header(CONTENT_RANGE, range)
            .header(CONTENT_TYPE, HeaderValue::from_static("text/plain"))
            .bytes(bytes, Kind::Small);
        let response = self.send("a piece of trace", call, &token).await?;
        let (status, interval) = (answers::job_status(&response), answers::update_interval(response.headers()));
        let continue_at = match response.status() {
            StatusCode::ACCEPTED | StatusCode::FORBIDDEN => None,
            StatusCode::RANGE_NOT_SATISFIABLE => Some(answers::range_size(response.headers())),
            _ => return Err(answers::error("a piece of trace", response, &token).await),
        };
        answers::read_small(response.into_body()).await;
        Ok(TraceAnswer { status, continue_at, interval })
    }

    /// Sends a guest's request on, on a connection of its own, and streams the answer back.
    /// Never retried, never redirected. `token` overrides the job's own (a dependency's).
    ///
    /// The answer is GitLab's, whatever its status; its headers are the caller's to filter. Once
    /// its body has ended, or is dropped, the rest of the request's body is not read any more.
    ///
    /// # Errors
    /// [`GitlabError::Unavailable`] if no head of a response came.
    pub async fn forward(&self, forward: Forward, token: Option<&Secret>) -> Result<Response<Body>, GitlabError> {
        let (method, path, kind) = match forward.route {
            ForwardRoute::UploadArtifacts => {
                (Method::POST, format!("/api/v4/jobs/{}/artifacts", self.id), Kind::Artifacts)
            }
            ForwardRoute::DownloadArtifacts(id) => {
                (Method::GET, format!("/api/v4/jobs/{id}/artifacts"), Kind::Artifacts)
            }
            ForwardRoute::RuntimeEnvironmentKey => {
                (Method::GET, format!("/api/v4/jobs/{}/runtime_environment_key", self.id), Kind::Forwarded)
            }
        };
        let own = self.token();
        let mut draft =
            Draft::new(method, path + &query(&forward.query), &self.rng).secret(JOB_TOKEN, token.unwrap_or(&own));
        // The caller has filtered already; that only these can pass is held here as well.
        for name in [CONTENT_TYPE, ACCEPT, RANGE] {
            if let Some(value) = forward.headers.get(&name) {
                draft = draft.header(name, value.clone());
            }
        }
        if let Some(id) = forward.headers.get(&REQUEST_ID).filter(|id| id.to_str().is_ok_and(is_request_id)) {
            draft = draft.header(REQUEST_ID, id.clone());
        }
        Ok(self.transport.call(draft.body(forward.body, kind)).await?)
    }

    fn draft(&self, method: Method, below: &str, token: &Secret) -> Draft {
        Draft::new(method, format!("/api/v4/jobs/{}{below}", self.id), &self.rng).secret(JOB_TOKEN, token)
    }

    /// Sends one of our own calls. What may come from something in between (a page for people; a
    /// 404, which GitLab never sends on these routes) is an error here.
    async fn send(&self, what: &'static str, call: Call, token: &Secret) -> Result<Response<Body>, GitlabError> {
        let response = self.transport.call(call).await?;
        if response.status() == StatusCode::NOT_FOUND {
            let (retry_after, status) = (answers::retry_after(response.headers()), Some(404));
            answers::read_small(response.into_body()).await;
            return Err(GitlabError::Unavailable { status, retry_after, source: None });
        }
        if response.status().is_success() && answers::is_page(response.headers()) {
            return Err(answers::error(what, response, token).await);
        }
        Ok(response)
    }
}

impl std::fmt::Debug for JobClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JobClient({})", self.id)
    }
}
