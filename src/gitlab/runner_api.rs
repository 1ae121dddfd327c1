//! The calls that need a runner token: asking for a job, proving the token.

use super::{GitlabError, JobPayload, RunnerToken, Transport};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::sync::Arc;

/// `info` of a runner, as its image's own runner sends it (design D10); kept as raw JSON.
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
}

impl RunnerApi {
    /// No call is made.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, token: RunnerToken, system_id: String) -> Self {
        Self { transport, token, system_id }
    }

    /// Asks GitLab for one job. See docs/protocol.md.
    ///
    /// # Errors
    /// All of [`GitlabError`] may come.
    ///
    /// # Cancel safety
    /// None: GitLab may assign a job before the reply is read. Let it finish.
    pub async fn request_job(&self, info: &RunnerInfo, last_update: Option<&str>) -> Result<Poll, GitlabError> {
        let _ = (&self.transport, &self.token, &self.system_id, info, last_update);
        unimplemented!()
    }

    /// Proves the token, and tells GitLab this runner manager's features.
    ///
    /// # Errors
    /// [`GitlabError::Forbidden`] for a token that GitLab refuses; the transient ones.
    pub async fn verify(&self, info: Option<&RunnerInfo>) -> Result<Verified, GitlabError> {
        let _ = info;
        unimplemented!()
    }

    /// This runner's token, for [`RunnerToken::guest_token`].
    #[must_use]
    pub fn token(&self) -> &RunnerToken {
        &self.token
    }
}
