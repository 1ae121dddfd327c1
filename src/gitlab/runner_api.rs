//! The calls that need a runner token: asking for a job, proving the token.

use super::answers;
use super::calls::{Draft, Kind, RUNNER_TOKEN};
use super::payload::{PayloadError, salvage};
use super::transport::Body;
use super::{GitlabError, JobPayload, RunnerToken, Transport};
use crate::failpoint::{Point, reached};
use crate::rng::Rng;
use http::header::CONTENT_ENCODING;
use http::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::Arc;

/// Largest payload that we take.
const PAYLOAD_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Largest answer to `verify`: three short members.
const VERIFIED_BYTES_MAX: usize = 64 * 1024;
/// Longest `X-GitLab-Last-Update` that we carry; GitLab's are 32 characters.
const LAST_UPDATE_BYTES_MAX: usize = 256;

/// `info` of a runner, as its image's own runner sends it (decision D10); kept as raw JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunnerInfo(pub Box<RawValue>);

/// Answer to one poll.
#[derive(Debug)]
pub enum Poll {
    /// A job: GitLab counts on us from here on.
    Job(Box<JobPayload>),
    /// 204: nothing for this runner now.
    Nothing {
        /// `X-GitLab-Last-Update`, to be sent with the next poll; `None`: keep the old one.
        last_update: Option<String>,
    },
}

/// Answer to `verify`.
#[derive(Clone, Debug, Deserialize)]
pub struct Verified {
    /// The runner's id, where the server tells it.
    pub id: Option<u64>,
}

/// One runner at one GitLab.
#[derive(Clone)]
pub struct RunnerApi {
    transport: Arc<dyn Transport>,
    token: RunnerToken,
    system_id: String,
    rng: Rng,
}

/// The body of a poll, in the official runner's order.
#[derive(Serialize)]
struct PollBody<'a> {
    info: &'a RunnerInfo,
    token: &'a str,
    system_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_update: Option<&'a str>,
}

#[derive(Serialize)]
struct VerifyBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    info: Option<&'a RunnerInfo>,
    token: &'a str,
    system_id: &'a str,
}

impl RunnerApi {
    /// No call is made. `system_id` tells this runner manager from others of the same token
    /// (`s_` or `r_` and 12 characters); `rng` makes the requests' ids.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, token: RunnerToken, system_id: String, rng: Rng) -> Self {
        Self { transport, token, system_id, rng }
    }

    /// Asks GitLab for one job. See docs/protocol.md.
    ///
    /// `POST /jobs/request`. GitLab reads the token from the body; the header is what the official
    /// runner sends beside it since 17.11. GitLab may hold the call for minutes (long polling).
    ///
    /// # Errors
    /// All of [`GitlabError`] may come.
    ///
    /// # Cancel safety
    /// None: GitLab may assign a job before the reply is read. Let it finish.
    pub async fn request_job(&self, info: &RunnerInfo, last_update: Option<&str>) -> Result<Poll, GitlabError> {
        let body = PollBody { info, token: self.token.0.expose(), system_id: &self.system_id, last_update };
        let call = self.draft("/api/v4/jobs/request").json(&body, Kind::Poll);
        let response = self.transport.call(call).await?;
        match response.status() {
            StatusCode::CREATED => read_job(response).await.map(|job| Poll::Job(Box::new(job))),
            StatusCode::NO_CONTENT => {
                let last_update = response.headers().get("x-gitlab-last-update").and_then(|value| value.to_str().ok());
                let last_update =
                    last_update.filter(|text| (1..=LAST_UPDATE_BYTES_MAX).contains(&text.len())).map(str::to_owned);
                answers::read_small(response.into_body()).await;
                Ok(Poll::Nothing { last_update })
            }
            _ => Err(self.refused("a request for a job", response).await),
        }
    }

    /// Proves the token, and tells GitLab this runner manager's features.
    ///
    /// # Errors
    /// [`GitlabError::Forbidden`] for a token that GitLab refuses; the transient ones.
    pub async fn verify(&self, info: Option<&RunnerInfo>) -> Result<Verified, GitlabError> {
        let body = VerifyBody { info, token: self.token.0.expose(), system_id: &self.system_id };
        let call = self.draft("/api/v4/runners/verify").json(&body, Kind::Small);
        let response = self.transport.call(call).await?;
        if response.status() != StatusCode::OK || answers::is_page(response.headers()) {
            return Err(self.refused("a verification of the token", response).await);
        }
        // Very old servers answer with a plain `200`: the token is good, and that is all they say.
        let read = answers::read(response.into_body(), VERIFIED_BYTES_MAX).await;
        Ok(serde_json::from_slice(&read.bytes).unwrap_or(Verified { id: None }))
    }

    /// This runner's token, for [`RunnerToken::guest_token`].
    #[must_use]
    pub fn token(&self) -> &RunnerToken {
        &self.token
    }

    fn draft(&self, path: &str) -> Draft {
        Draft::new(Method::POST, path.to_owned(), &self.rng).accept_json().secret(RUNNER_TOKEN, &self.token.0)
    }

    async fn refused(&self, what: &'static str, response: Response<Body>) -> GitlabError {
        match response.status() {
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                answers::read_small(response.into_body()).await;
                GitlabError::Forbidden { status: status.as_u16() }
            }
            _ => answers::error(what, response, &self.token.0).await,
        }
    }
}

/// Reads the payload of a 201. From here on GitLab counts on us, so what cannot be used is still
/// searched for the job's id and token.
async fn read_job(response: Response<Body>) -> Result<JobPayload, GitlabError> {
    let (parts, body) = response.into_parts();
    let request_id = parts.headers.get("x-request-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
    // The head is read, with the 201 in it; the body is not.
    reached(Point::K2);
    let read = answers::read(body, PAYLOAD_BYTES_MAX).await;
    let parsed = if let Some(cut) = read.cut {
        Err(PayloadError::Body(format!("body {cut}")))
    } else if let Some(encoding) = parts.headers.get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        Err(PayloadError::Body(format!("body is encoded as {}, unasked", answers::clean(&format!("{encoding:?}"), 40))))
    } else if !answers::is_json(&parts.headers) {
        let media_type = answers::clean(answers::media_type(&parts.headers).unwrap_or("nothing"), 60);
        Err(PayloadError::Body(format!("body is said to be {media_type}, not JSON")))
    } else {
        JobPayload::parse(read.bytes.clone(), request_id)
    };
    parsed.map_err(|source| GitlabError::UnreadableJob { job: salvage(&read.bytes).map(Box::new), source })
}

impl std::fmt::Debug for RunnerApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RunnerApi({})", self.system_id)
    }
}
