//! An operator's own S3 store in place of the host's disk (`[cache.upstream]`): signed here, streamed through.
//!
//! ```text
//! <bucket>/<prefix>/<tenant>/<space>/<hash of key>.zip
//! ```
//!
//! No credential enters a guest, and nothing of a guest's URL the store's: tenant and space come from the job, the rest is
//! a digest. How much is kept there, and for how long, is the store's own matter (its lifecycle rules).

use super::access::{Key, Space, Tenant};
use super::sigv4::{EMPTY_PAYLOAD, Signed, Signer, UNSIGNED_PAYLOAD, date};
use crate::clock::Clock;
use crate::gitlab::Transport;
use crate::gitlab::transport::{Body, Call, Connection, TransportError, full};
use crate::secret::Secret;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// How long the store may take for the head of an answer: the helper in the guest waits for 30 s.
const HEAD_PATIENCE: Duration = Duration::from_secs(25);

/// A store, and how to speak to it. Clones share its connections.
#[derive(Clone)]
pub struct Upstream(Arc<Parts>);

struct Parts {
    transport: Arc<dyn Transport>,
    signer: Signer,
    /// Of its URL, with the port if that is not the scheme's own: what is signed is what is sent.
    host: String,
    /// `/BUCKET/PREFIX`, below the URL's own path.
    below: String,
    /// The path of its URL, which is signed and not part of a call's.
    root: String,
    clock: Clock,
}

/// What a store is made of.
pub struct UpstreamParts {
    /// Speaks to its URL.
    pub transport: Arc<dyn Transport>,
    /// Its URL.
    pub url: Url,
    /// The bucket.
    pub bucket: String,
    /// Before all names in it; may be empty.
    pub prefix: String,
    /// Its region.
    pub region: String,
    /// Who asks.
    pub access_key: String,
    /// Proves that.
    pub secret_key: Secret,
}

/// Why a store has not answered as it should.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No whole answer.
    #[error("reach the store")]
    Transport(#[from] TransportError),
    /// An answer that says no.
    #[error("the store answers {0}")]
    Status(StatusCode),
    /// What is to be sent is no request.
    #[error("make a request")]
    Request(#[from] http::Error),
}

/// One object of the store, as a job may name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object(String);

impl Upstream {
    /// A store.
    #[must_use]
    pub fn new(parts: UpstreamParts, clock: Clock) -> Self {
        let UpstreamParts { transport, url, bucket, prefix, region, access_key, secret_key } = parts;
        let host = url.host_str().unwrap_or_default();
        let host = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        Self(Arc::new(Parts {
            transport,
            signer: Signer { access_key, secret_key, region },
            host,
            below: format!("/{bucket}{prefix}"),
            root: url.path().trim_end_matches('/').to_owned(),
            clock,
        }))
    }

    /// The object of this key in this space of a tenant's.
    #[must_use]
    pub fn object(&self, tenant: &Tenant, space: Space, key: &Key) -> Object {
        Object(format!("{}/{}/{}/{}.zip", self.0.below, tenant.directory(), space.word(), key.file()))
    }

    /// Asks for an object, or a part of it: `range` as in HTTP, `version` the `etag` that it must have. `None`: there is
    /// none, or not of that version.
    ///
    /// # Errors
    /// [`UpstreamError`].
    pub async fn get(
        &self,
        object: &Object,
        (range, version): (Option<&str>, Option<&str>),
        total: Duration,
    ) -> Result<Option<Response<Body>>, UpstreamError> {
        let more: Vec<_> = [(header::IF_MATCH, version), (header::RANGE, range)]
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?.to_owned())))
            .collect();
        let request = self.request(Method::GET, object, &more, (EMPTY_PAYLOAD, full("")))?;
        let answer = self.call(request, Connection::Shared, total).await?;
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(Some(answer)),
            StatusCode::NOT_FOUND | StatusCode::PRECONDITION_FAILED => Ok(None),
            status => Err(UpstreamError::Status(status)),
        }
    }

    /// Writes an object, of so many bytes. A body that ends in an error leaves the object of before.
    ///
    /// # Errors
    /// [`UpstreamError`].
    pub async fn put(&self, object: &Object, length: u64, body: Body, total: Duration) -> Result<(), UpstreamError> {
        let more = [(header::CONTENT_LENGTH, length.to_string())];
        let request = self.request(Method::PUT, object, &more, (UNSIGNED_PAYLOAD, body))?;
        // Its own: an early answer would leave a half-sent one behind.
        let answer = self.call(request, Connection::Own, total).await?;
        if answer.status().is_success() { Ok(()) } else { Err(UpstreamError::Status(answer.status())) }
    }

    fn request(
        &self,
        method: Method,
        Object(path): &Object,
        more: &[(HeaderName, String)],
        (payload, body): (&str, Body),
    ) -> Result<Request<Body>, UpstreamError> {
        let (parts, now) = (&*self.0, date(self.0.clock.now()));
        let mut headers: Vec<(&str, &str)> = more.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        headers.extend([("host", parts.host.as_str()), ("x-amz-content-sha256", payload), ("x-amz-date", &now)]);
        headers.sort_unstable();
        let whole = format!("{}{path}", parts.root);
        let signed = Signed { method: method.as_str(), path: &whole, query: "", headers: &headers, payload };
        let authorization = parts.signer.authorization(&signed, &now);
        let uri = Uri::try_from(path.as_str()).map_err(http::Error::from)?;
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
            request = request.header(*name, *value);
        }
        let mut authorization = HeaderValue::try_from(authorization).map_err(http::Error::from)?;
        authorization.set_sensitive(true);
        Ok(request.header(header::AUTHORIZATION, authorization).body(body)?)
    }

    async fn call(
        &self,
        request: Request<Body>,
        connection: Connection,
        total_timeout: Duration,
    ) -> Result<Response<Body>, UpstreamError> {
        let call = Call { request, connection, head_timeout: HEAD_PATIENCE, total_timeout };
        Ok(self.0.transport.call(call).await?)
    }
}
