//! The GitLab seam: one request in, one response out, bodies streaming both ways.
//!
//! [`RealOpenTransport`](super::RealOpenTransport) is behind it in production, a stand-in in
//! simulations and `exec`.

use super::{GitlabError, tls};
use crate::BoxFuture;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// A streaming body.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Why a body ended early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A whole body.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A GitLab and how to trust it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `https://gitlab.example[/root]`.
    pub url: Url,
    /// PEM file of CAs, besides the system's; read again when it changes.
    pub tls_ca_file: Option<PathBuf>,
    /// Client certificate and key, PEM files.
    pub tls_client: Option<(PathBuf, PathBuf)>,
    /// Whether `http://` is allowed.
    pub allow_insecure_http: bool,
}

/// Which connection a call uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// One of the pool.
    Shared,
    /// Its own, gone after the answer: artifacts (threats.md F4).
    Own,
}

/// One call.
pub struct Call {
    /// Its URI is a path below the endpoint's URL, with query: `/api/v4/jobs/request`.
    pub request: http::Request<Body>,
    /// Its connection.
    pub connection: Connection,
    /// How long the head of the response may take, from the end of the request's body.
    pub head_timeout: Duration,
    /// How long the whole exchange may take, response body included.
    pub total_timeout: Duration,
}

/// No whole response.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No connection: DNS, refused, TLS.
    #[error("connect")]
    Connect(#[source] BodyError),
    /// A time limit passed.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The connection broke.
    #[error("exchange")]
    Broken(#[source] BodyError),
}

impl TransportError {
    /// What an operator can do about it, as a sentence; `None` where waiting is all there is.
    #[must_use]
    pub fn explain(&self) -> Option<String> {
        match self {
            Self::Connect(source) | Self::Broken(source) => tls::explain(&**source),
            Self::Timeout(_) => None,
        }
    }
}

/// Speaks to one GitLab.
pub trait Transport: Send + Sync + 'static {
    /// Sends the request and waits for the response's head.
    ///
    /// Redirects are answers like any other. Dropping the future closes the connection.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>>;
}

/// Makes the transport to a GitLab: the part of the seam that `daemon` is given.
pub trait OpenTransport: Send + Sync + 'static {
    /// Reads CA and key files; opens no connection.
    ///
    /// # Errors
    /// A file that cannot be read or holds no certificate, `http://` without permission.
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError>;
}

/// Why no transport to this GitLab can be made; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// `http://`, and nobody allowed it.
    #[error("`{0}` is not https; set `allow_insecure_http = true` to send tokens in the clear")]
    InsecureHttp(Url),
    /// A file with certificates or a key.
    #[error("read `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: BodyError,
    },
    /// The client cannot be made.
    #[error("set up TLS")]
    Tls(#[source] BodyError),
}

impl From<TransportError> for GitlabError {
    fn from(source: TransportError) -> Self {
        Self::Unavailable { status: None, retry_after: None, source: Some(source) }
    }
}
