//! The calls that need a runner token: asking for a job, proving the token.

use super::answers;
use super::calls::{Draft, Kind, RUNNER_TOKEN};
use super::payload::{PayloadError, salvage};
use super::transport::Body;
use super::{GitlabError, JobPayload, RunnerToken, Transport};
use crate::failpoint::{Point, reached};
use crate::rng::Rng;
use crate::secret::Secret;
use http::header::CONTENT_ENCODING;
use http::{Method, Response, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::Arc;
use tokio::sync::{Mutex, MutexGuard, watch};

/// Largest payload that we take.
const PAYLOAD_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Largest answer about a runner and its token: three short members.
const CREDENTIALS_BYTES_MAX: usize = 64 * 1024;
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// The runner's id, where the server tells it.
    pub id: Option<u64>,
    /// When its token ends, where it does.
    pub expires_at: Option<Timestamp>,
}

/// A token that GitLab has made; the one before is no longer good.
#[derive(Clone, Debug)]
pub struct FreshToken {
    /// The token.
    pub token: RunnerToken,
    /// When it ends, where it does.
    pub expires_at: Option<Timestamp>,
}

/// One runner at one GitLab. Clones share the token, which may change ([`RunnerApi::adopt`]).
#[derive(Clone)]
pub struct RunnerApi {
    transport: Arc<dyn Transport>,
    token: Arc<watch::Sender<Current>>,
    /// Held while another token is on its way.
    changing: Arc<Mutex<()>>,
    system_id: String,
    rng: Rng,
}

/// The token in force, and when it ends.
struct Current {
    token: RunnerToken,
    expires_at: Option<Timestamp>,
}

/// What GitLab says of a runner and its token.
#[derive(Deserialize)]
struct Credentials {
    #[serde(default)]
    id: Option<u64>,
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    token_expires_at: Option<String>,
}

impl Credentials {
    /// A date that is none is as good as no date.
    fn expires_at(&self) -> Option<Timestamp> {
        self.token_expires_at.as_ref()?.parse().ok()
    }
}

/// The body of a call about the runner itself.
#[derive(Serialize)]
struct TokenBody<'a> {
    token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_id: Option<&'a str>,
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
        let token = Arc::new(watch::Sender::new(Current { token, expires_at: None }));
        Self { transport, token, changing: Arc::default(), system_id, rng }
    }

    /// From now on all calls, of clones too, carry this token.
    pub fn adopt(&self, token: RunnerToken, expires_at: Option<Timestamp>) {
        self.token.send_replace(Current { token, expires_at });
    }

    /// When the token ends, as far as GitLab has told.
    #[must_use]
    pub fn token_expires_at(&self) -> Option<Timestamp> {
        self.token.borrow().expires_at
    }

    /// While this is held, a call that GitLab refuses waits: the token may have changed on the way.
    pub async fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// The token in force, if it is another than the one that GitLab has refused: it may have changed on the way.
    async fn newer_than(&self, used: &RunnerToken) -> Option<RunnerToken> {
        drop(self.changing.lock().await);
        Some(self.token()).filter(|token| !token.same_as(used))
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
        let used = self.token();
        match self.request_job_with(&used, info, last_update).await {
            Err(error @ GitlabError::Forbidden { .. }) => match self.newer_than(&used).await {
                Some(newer) => self.request_job_with(&newer, info, last_update).await,
                None => Err(error),
            },
            answer => answer,
        }
    }

    async fn request_job_with(
        &self,
        token: &RunnerToken,
        info: &RunnerInfo,
        last_update: Option<&str>,
    ) -> Result<Poll, GitlabError> {
        let body = PollBody { info, token: token.0.expose(), system_id: &self.system_id, last_update };
        let call = self.draft(Method::POST, "/api/v4/jobs/request", token).json(&body, Kind::Poll);
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
            _ => Err(refused("a request for a job", response, token).await),
        }
    }

    /// Proves the token, and tells GitLab this runner manager's features.
    ///
    /// # Errors
    /// [`GitlabError::Forbidden`] for a token that GitLab refuses; the transient ones.
    pub async fn verify(&self, info: Option<&RunnerInfo>) -> Result<Verified, GitlabError> {
        let mut token = self.token();
        let mut answer = self.verify_with(&token, info).await;
        if matches!(answer, Err(GitlabError::Forbidden { .. }))
            && let Some(newer) = self.newer_than(&token).await
        {
            answer = self.verify_with(&newer, info).await;
            token = newer;
        }
        let verified = answer?;
        self.token.send_if_modified(|current| {
            let is_it = current.token.same_as(&token);
            if is_it {
                current.expires_at = verified.expires_at;
            }
            is_it
        });
        Ok(verified)
    }

    async fn verify_with(&self, token: &RunnerToken, info: Option<&RunnerInfo>) -> Result<Verified, GitlabError> {
        let body = VerifyBody { info, token: token.0.expose(), system_id: &self.system_id };
        let call = self.draft(Method::POST, "/api/v4/runners/verify", token).json(&body, Kind::Small);
        let response = self.transport.call(call).await?;
        if response.status() != StatusCode::OK || answers::is_page(response.headers()) {
            return Err(refused("a verification of the token", response, token).await);
        }
        // Very old servers answer with a plain `200`: the token is good, and that is all they say.
        let read = answers::read(response.into_body(), CREDENTIALS_BYTES_MAX).await;
        let said: Option<Credentials> = serde_json::from_slice(&read.bytes).ok();
        Ok(said.map_or_else(Verified::default, |said| Verified { id: said.id, expires_at: said.expires_at() }))
    }

    /// Has GitLab make the token anew. The caller adopts it: from GitLab's answer on the one before is no longer good.
    ///
    /// # Errors
    /// [`GitlabError::Forbidden`]; the transient ones, after which the token may have changed all the same.
    ///
    /// # Cancel safety
    /// None: the answer is the only copy of the new token.
    pub async fn reset_token(&self) -> Result<FreshToken, GitlabError> {
        const WHAT: &str = "a reset of the token";
        let token = self.token();
        // Without the system id GitLab would list a manager of no name.
        let body = TokenBody { token: token.0.expose(), system_id: Some(&self.system_id) };
        let path = "/api/v4/runners/reset_authentication_token";
        let call = self.draft(Method::POST, path, &token).json(&body, Kind::Small);
        let response = self.transport.call(call).await?;
        let status = response.status();
        if status != StatusCode::CREATED || answers::is_page(response.headers()) {
            return Err(refused(WHAT, response, &token).await);
        }
        let read = answers::read(response.into_body(), CREDENTIALS_BYTES_MAX).await;
        let said: Option<Credentials> = serde_json::from_slice(&read.bytes).ok();
        let fresh = said.as_ref().and_then(|said| Some((said.token.clone()?, said.expires_at())));
        match fresh.map(|(token, expires_at)| (RunnerToken::new(Secret::new(token)), expires_at)) {
            Some((token, expires_at)) if !token.0.expose().is_empty() => Ok(FreshToken { token, expires_at }),
            _ => {
                let message = "it tells no new token; if the old one is refused from now on, register anew".to_owned();
                Err(GitlabError::Unexpected { what: WHAT, status: status.as_u16(), message })
            }
        }
    }

    /// Takes this runner manager away at GitLab; of a runner that a registration token made, the runner itself. One
    /// that is not there is fine.
    ///
    /// # Errors
    /// [`GitlabError::Forbidden`] for a token that GitLab does not know; the transient ones.
    pub async fn unregister(&self) -> Result<(), GitlabError> {
        let token = self.token();
        let (path, system_id) = if token.is_of_a_runner_made_in_gitlab() {
            ("/api/v4/runners/managers", Some(self.system_id.as_str()))
        } else {
            ("/api/v4/runners", None)
        };
        let body = TokenBody { token: token.0.expose(), system_id };
        let call = self.draft(Method::DELETE, path, &token).json(&body, Kind::Small);
        let response = self.transport.call(call).await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(()),
            StatusCode::NOT_FOUND if answers::is_json(response.headers()) => Ok(()),
            _ => Err(refused("a removal of the runner", response, &token).await),
        }
    }

    /// This runner's token, as it is now.
    #[must_use]
    pub fn token(&self) -> RunnerToken {
        self.token.borrow().token.clone()
    }

    fn draft(&self, method: Method, path: &str, token: &RunnerToken) -> Draft {
        Draft::new(method, path.to_owned(), &self.rng).accept_json().secret(RUNNER_TOKEN, &token.0)
    }
}

async fn refused(what: &'static str, response: Response<Body>, token: &RunnerToken) -> GitlabError {
    match response.status() {
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            answers::read_small(response.into_body()).await;
            GitlabError::Forbidden { status: status.as_u16() }
        }
        _ => answers::error(what, response, &token.0).await,
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
