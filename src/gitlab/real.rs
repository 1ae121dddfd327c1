//! The real transport: reqwest on rustls, HTTP/1.1 only.
//!
//! Each option that matters is spelled out in [`Inner::client`]: redirects are never followed
//! (reqwest would carry our tokens along, threats.md F1), nothing is retried, decompressed or
//! remembered, and every wait has a limit. TLS files are looked at before each call, and read
//! again when they have changed (G9).

use super::bodies::{Answer, Upload};
use super::calls::OUR_USER_AGENT;
use super::proxy::ProxyEnvironment;
use super::tls::{Fingerprint, Material};
use super::transport::{Body, Call, Connection, Endpoint, OpenError, OpenTransport, Transport, TransportError};
use crate::BoxFuture;
use crate::failpoint::{Point, reached};
use http::Response;
use http_body_util::BodyExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout_at};
use url::Url;

/// Limits of connections to GitLab (threats.md §6.5). Those of single calls are in each [`Call`].
#[derive(Clone, Debug)]
pub struct RealLimits {
    /// Name resolution, TCP, proxy and TLS together. One limit, because reqwest has only one: the
    /// shorter of the two that are wanted (TCP 5 s, TLS 10 s). Short, because a GitLab that comes
    /// back must be noticed within 15 s.
    pub connect: Duration,
    /// An idle connection of the pool. GitLab's own proxies keep them for 65 s and more.
    pub idle: Duration,
    /// Age at which the pool is given up for a new one: certificates rotate, and load balancers
    /// spread only new connections.
    pub pool_age: Duration,
    /// Longest pause in an answer's body.
    pub read_idle: Duration,
    /// How long what we have sent may stay unacknowledged, or GitLab's window shut. By the kernel
    /// (`TCP_USER_TIMEOUT`), so it holds too for what hyper finishes behind our back.
    pub write_stall: Duration,
}

impl Default for RealLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            idle: Duration::from_secs(60),
            pool_age: Duration::from_secs(15 * 60),
            read_idle: Duration::from_secs(300),
            write_stall: Duration::from_secs(60),
        }
    }
}

/// Makes transports over real sockets. The default has the process's proxy environment.
#[derive(Clone, Debug)]
pub struct RealOpenTransport {
    limits: RealLimits,
    proxies: ProxyEnvironment,
}

impl Default for RealOpenTransport {
    fn default() -> Self {
        Self::new(RealLimits::default(), ProxyEnvironment::of_process())
    }
}

impl RealOpenTransport {
    /// With limits and proxies of one's own.
    #[must_use]
    pub fn new(limits: RealLimits, proxies: ProxyEnvironment) -> Self {
        Self { limits, proxies }
    }
}

impl OpenTransport for RealOpenTransport {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        let secure = match endpoint.url.scheme() {
            "https" => true,
            "http" if endpoint.allow_insecure_http => false,
            _ => return Err(OpenError::InsecureHttp(endpoint.url.clone())),
        };
        let material = Material::of(endpoint);
        if secure && material.trusts_nobody() {
            let text = "this host has no CA certificates: install the package ca-certificates, or set `tls_ca_file`";
            return Err(OpenError::Tls(text.into()));
        }
        let fingerprint = material.fingerprint();
        let tls = material.read()?;
        let base = endpoint.url.as_str().trim_end_matches('/').to_owned();
        let mut inner =
            Inner { base, material, limits: self.limits.clone(), proxies: self.proxies.clone(), pool: None };
        let client = inner.client(&tls, true)?;
        inner.pool = Some(Mutex::new(Pool { client, tls, fingerprint, made: Instant::now() }));
        Ok(Arc::new(RealTransport(Arc::new(inner))))
    }
}

/// One GitLab over real sockets.
struct RealTransport(Arc<Inner>);

struct Inner {
    /// The endpoint's URL without a slash at its end.
    base: String,
    material: Material,
    limits: RealLimits,
    proxies: ProxyEnvironment,
    /// Some from `open` on. The lock is held for a few lines, never across an await.
    pool: Option<Mutex<Pool>>,
}

/// The client whose connections are shared, and what it was made of.
struct Pool {
    client: reqwest::Client,
    tls: rustls::ClientConfig,
    fingerprint: Fingerprint,
    made: Instant,
}

impl Transport for RealTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response<Body>, TransportError>> {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.call(call).await })
    }
}

impl Inner {
    async fn call(self: Arc<Self>, call: Call) -> Result<Response<Body>, TransportError> {
        let deadline = Instant::now() + call.total_timeout;
        let late = |_| TransportError::Timeout(call.total_timeout);
        let client = timeout_at(deadline, Arc::clone(&self).current(call.connection)).await.map_err(late)??;

        let (parts, body) = call.request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let url = Url::parse(&format!("{}{path}", self.base)).map_err(|error| TransportError::Broken(error.into()))?;
        let (upload, watch) = Upload::new(body);
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(reqwest::Body::wrap(upload));

        let answer = async {
            let mut answer = std::pin::pin!(client.execute(request));
            let mut sent = watch.sent;
            // The answer first, for it may come before the body has ended. Both are safe to drop:
            // `sent` says only once what it says, and an answer not taken closes its connection.
            tokio::select! { biased;
                answer = &mut answer => return answer.map_err(broken),
                // An error is the sender dropped, which is what it means to have ended.
                _ = &mut sent => {}
            }
            // On its way: GitLab may have assigned a job by now.
            if path.ends_with("/jobs/request") {
                reached(Point::K1);
            }
            tokio::select! { biased;
                answer = &mut answer => answer.map_err(broken),
                () = sleep_until(Instant::now() + call.head_timeout) => Err(TransportError::Timeout(call.head_timeout)),
            }
        };
        let response: Response<reqwest::Body> = timeout_at(deadline, answer).await.map_err(late)??.into();
        let (limits, total) = (&self.limits, call.total_timeout);
        Ok(response.map(|body| Answer::new(body, limits.read_idle, total, deadline, watch.answered).boxed_unsync()))
    }

    /// The client for one call, made of the TLS files as they are now.
    async fn current(self: Arc<Self>, connection: Connection) -> Result<reqwest::Client, TransportError> {
        let fresh = if self.material.may_change() {
            let inner = Arc::clone(&self);
            // Looks at files, so off the runtime's threads. It cannot panic, and nobody aborts it.
            tokio::task::spawn_blocking(move || inner.changed_files())
                .await
                .map_err(|error| TransportError::Connect(error.into()))?
        } else {
            None
        };
        let mut pool = self.pool.as_ref().expect("set by `open`").lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fingerprint, tls)) = fresh {
            pool.fingerprint = fingerprint;
            if let Some(tls) = tls {
                pool.tls = tls;
                // The connections that trusted the old files go with the old client.
                pool.made = Instant::now();
                pool.client = self.client(&pool.tls, true).map_err(|error| TransportError::Connect(error.into()))?;
            }
        }
        if connection == Connection::Own {
            return self.client(&pool.tls, false).map_err(|error| TransportError::Connect(error.into()));
        }
        if pool.made.elapsed() >= self.limits.pool_age {
            pool.made = Instant::now();
            pool.client = self.client(&pool.tls, true).map_err(|error| TransportError::Connect(error.into()))?;
        }
        Ok(pool.client.clone())
    }

    /// If the TLS files are not those that the pool was made of: their fingerprint, and what they
    /// say, if they can be used. If not, the old ones stay in force, and it is said once.
    fn changed_files(&self) -> Option<(Fingerprint, Option<rustls::ClientConfig>)> {
        // Before reading, so that a change during it is seen the next time.
        let fingerprint = self.material.fingerprint();
        if self.pool.as_ref().expect("set by `open`").lock().unwrap_or_else(PoisonError::into_inner).fingerprint
            == fingerprint
        {
            return None;
        }
        let tls = match self.material.read() {
            Ok(tls) => {
                tracing::info!(gitlab = self.base, "TLS files have changed and were read again");
                Some(tls)
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(
                    gitlab = self.base,
                    error = format!("{error}: {cause}"),
                    "TLS files have changed and cannot be used; the old ones stay in force"
                );
                None
            }
        };
        Some((fingerprint, tls))
    }

    fn client(&self, tls: &rustls::ClientConfig, pooled: bool) -> Result<reqwest::Client, OpenError> {
        let failed = |source: reqwest::Error| OpenError::Tls(source.without_url().into());
        // reqwest's own reading of the environment is off; ours can be given by tests.
        let mut builder = reqwest::Client::builder().no_proxy();
        for proxy in self.proxies.proxies().map_err(failed)? {
            builder = builder.proxy(proxy);
        }
        builder
            .tls_backend_preconfigured(tls.clone())
            .http1_only()
            // Answers with more fields than hyper's own 100 are odd but whole; the head's size is
            // bounded by its read buffer (about 400 KiB).
            .http1_max_headers(512)
            .user_agent(OUR_USER_AGENT)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .retry(reqwest::retry::never())
            .connect_timeout(self.limits.connect)
            .pool_idle_timeout(self.limits.idle)
            // 20 connections per job are the bound of the whole (threats.md §6.5); idle ones beyond
            // this many are closed.
            .pool_max_idle_per_host(if pooled { 32 } else { 0 })
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .tcp_user_timeout(self.limits.write_stall)
            .build()
            .map_err(failed)
    }
}

/// What reqwest says, by kind. Without the URL: it may have a proxy's password in it, and the log
/// line has the host.
fn broken(error: reqwest::Error) -> TransportError {
    let error = error.without_url();
    if error.is_connect() { TransportError::Connect(error.into()) } else { TransportError::Broken(error.into()) }
}
