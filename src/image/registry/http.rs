//! Calls to a registry and to whom it refers us: which server may be asked for what, and who learns our credentials.
//!
//! Credentials go to the registry and, by HTTPS, to the place that it names for tokens. A blob may lie elsewhere (a
//! registry's object storage): that is followed by HTTPS and without credentials, for its digest tells whether it is the
//! right one. Nothing else is followed anywhere.

use super::{Access, RegistryError};
use crate::gitlab::transport::full;
use crate::gitlab::{Body, Call, Connection, Endpoint, OpenTransport, Transport};
use crate::secret::Secret;
use crate::telemetry::chain;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::BodyExt as _;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Until a server begins to answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// A whole exchange: a piece is 64 MiB at most, for a line of 1 Mbit/s.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Steps to where a blob is.
const REDIRECTS_MAX: u32 = 3;

/// What is asked.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: &'static str,
    pub(super) authorization: Option<Secret>,
    pub(super) content: Option<(&'static str, Bytes)>,
    /// The first byte that is wanted of the answer.
    pub(super) from: u64,
}

impl Ask {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self { method, url, accept: "*/*", authorization: None, content: None, from: 0 }
    }
}

/// Who speaks.
pub(super) struct Http {
    open: Arc<dyn OpenTransport>,
    ca_file: Option<PathBuf>,
    /// The registry. It alone may be asked in the clear, if at all.
    base: Url,
    transports: BTreeMap<String, Arc<dyn Transport>>,
}

impl Http {
    pub(super) fn new(open: Arc<dyn OpenTransport>, access: &Access, base: Url) -> Self {
        Self { open, ca_file: access.ca_file.clone(), base, transports: BTreeMap::new() }
    }

    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// Whether it is the registry itself that is asked there.
    pub(super) fn is_registry(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Whether something may be sent there that others must not read.
    pub(super) fn is_trusted(&self, url: &Url) -> bool {
        self.is_registry(url) || url.scheme() == "https"
    }

    /// Asks, and follows nothing.
    pub(super) async fn send(&mut self, ask: Ask) -> Result<Response<Body>, RegistryError> {
        let url = shown(&ask.url);
        let odd = |error: http::Error| RegistryError::Answer { url: shown(&ask.url), why: chain(&error) };
        let path = match ask.url.query() {
            Some(query) => format!("{}?{query}", ask.url.path()),
            None => ask.url.path().to_owned(),
        };
        let mut request = Request::builder().method(ask.method.clone()).uri(path).header(ACCEPT, ask.accept);
        if ask.from > 0 {
            request = request.header(RANGE, format!("bytes={}-", ask.from));
        }
        if let Some(secret) = ask.authorization.as_ref().filter(|_| self.is_trusted(&ask.url)) {
            let mut value = HeaderValue::from_str(secret.expose()).map_err(|error| odd(error.into()))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let body = match &ask.content {
            Some((kind, bytes)) => {
                request = request.header(CONTENT_TYPE, *kind).header(CONTENT_LENGTH, bytes.len());
                bytes.clone()
            }
            // An upload begins with an empty body, whose length some registries want to know.
            None if ask.method == Method::POST => {
                request = request.header(CONTENT_LENGTH, 0);
                Bytes::new()
            }
            None => Bytes::new(),
        };
        let request = request.body(full(body)).map_err(odd)?;
        let transport = self.transport(&ask.url)?;
        let connection = if self.is_registry(&ask.url) { Connection::Shared } else { Connection::Own };
        let call = Call { request, connection, head_timeout: HEAD_TIMEOUT, total_timeout: TOTAL_TIMEOUT };
        transport.call(call).await.map_err(|source| RegistryError::Transport { url, source })
    }

    /// Asks for a blob, wherever the registry keeps it.
    pub(super) async fn send_for_blob(&mut self, mut ask: Ask) -> Result<Response<Body>, RegistryError> {
        for _ in 0..=REDIRECTS_MAX {
            let url = ask.url.clone();
            let answer = self.send(ask.clone()).await?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            let to = location(&url, &answer)?;
            if !self.is_trusted(&to) {
                let why = "in the clear, where it is not even the registry's own; a mirror that answers itself will do";
                return Err(RegistryError::Redirect { url: shown(&url), to: shown(&to), why });
            }
            if !self.is_registry(&to) {
                ask.authorization = None;
            }
            ask.url = to;
        }
        let why = "and so on, without an end";
        Err(RegistryError::Redirect { url: shown(&ask.url), to: "another place".into(), why })
    }

    fn transport(&mut self, url: &Url) -> Result<Arc<dyn Transport>, RegistryError> {
        let origin = url.origin().ascii_serialization();
        if let Some(transport) = self.transports.get(&origin) {
            return Ok(Arc::clone(transport));
        }
        let failed = |place: &str| {
            let place = place.to_owned();
            move |source| RegistryError::Open { place, source: Box::new(source) }
        };
        let root = Url::parse(&origin)
            .map_err(|_| RegistryError::Answer { url: shown(url), why: "it is the address of no server".into() })?;
        let allow_insecure_http = self.is_registry(url) && self.base.scheme() == "http";
        let endpoint = Endpoint { url: root, tls_ca_file: self.ca_file.clone(), tls_client: None, allow_insecure_http };
        let transport = self.open.open(&endpoint).map_err(failed(&origin))?;
        self.transports.insert(origin, Arc::clone(&transport));
        Ok(transport)
    }
}

/// Where an answer leads.
pub(super) fn location(url: &Url, answer: &Response<Body>) -> Result<Url, RegistryError> {
    let to = header(answer, &LOCATION).and_then(|to| url.join(to).ok());
    let to = to.filter(|to| matches!(to.scheme(), "http" | "https") && to.host().is_some());
    to.ok_or_else(|| RegistryError::Answer { url: shown(url), why: "it names no place to go on".into() })
}

/// One header as text.
pub(super) fn header<'a>(answer: &'a Response<Body>, name: &HeaderName) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

/// Reads a small body whole.
pub(super) async fn whole(url: &Url, mut body: Body, most: usize) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let broken = |_| RegistryError::BrokeOff { url: shown(url), bytes: bytes.len() as u64 };
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if bytes.len() + data.len() > most {
            let why = format!("more than {most} bytes, which is nothing that was asked for");
            return Err(RegistryError::Answer { url: shown(url), why });
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// An address without what may be secret in it: object storage signs its addresses.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // They fail for addresses that have none.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}
