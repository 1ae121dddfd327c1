//! How we speak GitLab's runner API. The only module that knows its URLs, headers and statuses.
//!
//! Split by what a caller may hold: [`RunnerApi`] has the runner token and is for `poller` and
//! `register`; [`JobClient`] has one job's token and is all that `job` and `guest` ever see.
//! Both speak through [`Transport`], the seam. Source of outside facts: GitLab's runner API as
//! described in docs/protocol.md.

mod answers;
mod bodies;
mod calls;
mod job_client;
mod json;
mod payload;
mod proxy;
mod reach;
mod real;
mod runner_api;
mod runner_token;
mod tls;
mod token_file;
pub mod transport;
mod verifier;

/// What reads GitLab's bytes: any bytes (`dayfly_doubles::fuzzing` tries them).
pub mod readers {
    pub use super::answers::{
        error, is_json, is_page, job_status, media_type, range_size, retry_after, update_interval,
    };
    pub use super::calls::query;
    pub use super::payload::salvage;
}

pub use job_client::{Forward, ForwardRoute, JobClient, JobUpdate, TraceAnswer, UpdateAnswer, Verdict};
pub use payload::{Asked, Containers, Dependency, JobPayload, PayloadError, Source};
pub use proxy::ProxyEnvironment;
pub use reach::{Outage, PATIENCE, Reach};
pub use real::{RealLimits, RealOpenTransport};
pub use runner_api::{FreshToken, Poll, RunnerApi, RunnerInfo, Verified};
pub use runner_token::{RunnerToken, TokenFileError};
pub use tls::{expired_cas, server as server_tls};
pub use token_file::Replacement;
pub use transport::{Body, Call, Connection, Endpoint, OpenTransport, Transport, TransportError};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// GitLab's id of one CI job. Unique within one GitLab only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What GitLab's newest answer said about the job, from its `Job-Status` header or a 403.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It counts on us.
    #[default]
    Running,
    /// Somebody canceled it; `after_script` may still run.
    Canceling,
    /// It is over at GitLab, by cancel, timeout, deletion; nothing of ours is wanted any more.
    Over,
}

impl JobStatus {
    /// One word for people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Canceling => "canceling",
            Self::Over => "over",
        }
    }
}

/// Why a call to GitLab did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum GitlabError {
    /// No complete answer, or 408, 404 on a job route, 5xx; transient.
    #[error("reach GitLab{}", status.map(|s| format!(" (status {s})")).unwrap_or_default())]
    Unavailable {
        /// Status, if there was one.
        status: Option<u16>,
        /// `Retry-After` or `RateLimit-ResetTime`, clamped to 5 min.
        retry_after: Option<Duration>,
        /// Cause.
        #[source]
        source: Option<TransportError>,
    },
    /// 429; transient.
    #[error("GitLab limits our requests")]
    RateLimited {
        /// When to come back, clamped to 5 min.
        retry_after: Duration,
    },
    /// 401 or 403 to a runner token: revoked, removed or never valid. Not transient.
    #[error("GitLab refuses the runner token (status {status}); check `token_file` or register anew")]
    Forbidden {
        /// The status.
        status: u16,
    },
    /// 409: a conflict that another try resolves; transient.
    #[error("GitLab reports a conflict")]
    Conflict,
    /// Any other answer that makes no sense here.
    #[error("GitLab answered {status} to {what}: {message}")]
    Unexpected {
        /// The call.
        what: &'static str,
        /// The status.
        status: u16,
        /// GitLab's message, cleaned of control characters, at most 200 characters.
        message: String,
    },
    /// A 201 that cannot be read; the job is lost to us unless id and token can be made out.
    #[error("read the job that GitLab assigned")]
    UnreadableJob {
        /// Id and token, where they could be made out.
        job: Option<Box<(JobId, crate::secret::Secret)>>,
        /// Cause.
        #[source]
        source: PayloadError,
    },
}

impl GitlabError {
    /// The answer's status, if there was one that says something of its own.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Unavailable { status, .. } => *status,
            Self::Forbidden { status } | Self::Unexpected { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether trying again may help without anybody's doing.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::RateLimited { .. } | Self::Conflict)
    }

    /// Whether nobody that is trusted here has signed GitLab's certificate.
    #[must_use]
    pub fn is_of_unknown_issuer(&self) -> bool {
        match self {
            Self::Unavailable {
                source: Some(TransportError::Connect(source) | TransportError::Broken(source)),
                ..
            } => tls::is_of_unknown_issuer(&**source),
            _ => false,
        }
    }

    /// GitLab's own word on when to come back, clamped to 5 min.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => *retry_after,
            Self::RateLimited { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// What an operator can do about it, as a sentence; `None` where waiting is all there is.
    #[must_use]
    pub fn explain(&self) -> Option<String> {
        match self {
            Self::Unavailable { source: Some(source), .. } => source.explain(),
            Self::Unavailable { status: Some(200..=299), .. } => Some(
                "what answers there is a page for people, perhaps a proxy's login page, and not GitLab's API: let \
                 requests below /api/v4/ pass it, or give the address behind it"
                    .to_owned(),
            ),
            Self::Unexpected { status: 301..=399, message, .. } => Some(answers::redirect_remedy(message)),
            Self::Unexpected { status: 404 | 405, .. } => {
                Some("check `url`: it must be the address that GitLab itself shows for its runners".to_owned())
            }
            Self::Unexpected { status: 407, .. } => {
                Some("the proxy wants a name and a password: put them into the proxy's URL".to_owned())
            }
            _ => None,
        }
    }
}
