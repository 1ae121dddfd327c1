//! GitLab behind TLS and a link of a given speed: the strict stand-in, but for the bytes of artifacts.
//!
//! Job requests, updates and traces are the stand-in's. Artifacts of any size are counted and summed up
//! instead of kept, and made up when they are asked for, so that the disk is no part of the measurement.

use super::content::{Content, Digest, Digester};
use super::link::{Limited, Link};
use bytes::Bytes;
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::gitlab::transport::{Body, full};
use dayfly::rng::Rng;
use dayfly_exec::standin::Standin;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Bytes of a download that are handed to the server at once.
const PIECE_BYTES: usize = 64 << 10;

/// A GitLab that runs until it is dropped.
pub(crate) struct Gitlab {
    pub(crate) standin: Standin,
    pub(crate) link: Link,
    pub(crate) address: SocketAddr,
    /// The CA of its certificate, PEM.
    pub(crate) ca: String,
    ca_der: CertificateDer<'static>,
    artifacts: Arc<Artifacts>,
    _serving: JoinSet<()>,
}

/// What the two artifact routes work with.
#[derive(Debug)]
struct Artifacts {
    standin: Standin,
    content: Content,
    /// Bytes of each download.
    bytes: u64,
    /// The last upload that came whole.
    received: Mutex<Option<Digest>>,
}

impl Gitlab {
    /// Serves; each download is `bytes` of `content`.
    pub(crate) async fn start(content: Content, bytes: u64) -> Result<Self, Box<dyn Error>> {
        let standin = Standin::new(Clock::system(), Rng::system());
        let link = Link::unlimited();
        let (ca, ca_der, config) = certified()?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let artifacts = Arc::new(Artifacts { standin: standin.clone(), content, bytes, received: Mutex::new(None) });
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, acceptor, link.clone(), Arc::clone(&artifacts)));
        Ok(Self { standin, link, address, ca, ca_der, artifacts, _serving: serving })
    }

    pub(crate) fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// What a client needs that trusts it.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca_der.clone())?;
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// The last upload, once.
    pub(crate) fn received(&self) -> Option<Digest> {
        self.artifacts.received().take()
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A CA and a server with a certificate of it for 127.0.0.1.
fn certified() -> Result<(String, CertificateDer<'static>, ServerConfig), Box<dyn Error>> {
    let ca_params = || {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(rcgen::DnType::CommonName, "dayfly bench");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok::<_, rcgen::Error>(params)
    };
    let ca_key = KeyPair::generate()?;
    let ca = ca_params()?.self_signed(&ca_key)?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let cert = params.signed_by(&key, &Issuer::new(ca_params()?, ca_key))?;
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())?;
    let mut config = builder.with_no_client_auth().with_single_cert(vec![cert.der().clone()], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((ca.pem(), ca.der().clone(), config))
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, link: Link, artifacts: Arc<Artifacts>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Small answers must not wait for acknowledgements; a client that has gone needs none.
        let _ = stream.set_nodelay(true);
        connections.spawn(connection(link.over(stream), tls.clone(), Arc::clone(&artifacts)));
    }
}

async fn connection(stream: Limited, tls: TlsAcceptor, artifacts: Arc<Artifacts>) {
    // A client that breaks off is one that says so itself.
    let Ok(stream) = tls.accept(stream).await else { return };
    let service = service_fn(move |request| {
        let artifacts = Arc::clone(&artifacts);
        async move { Ok::<_, Infallible>(artifacts.answer(request).await) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

impl Artifacts {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let Some(id) = artifact_route(request.uri().path()) else {
            return self.standin.call(request.map(|body| body.map_err(Into::into).boxed_unsync())).await;
        };
        if !self.may(id, request.headers()) {
            return plain(StatusCode::FORBIDDEN, "403");
        }
        match *request.method() {
            Method::POST => match self.receive(request.into_body()).await {
                Ok(()) => plain(StatusCode::CREATED, "201"),
                Err(_) => plain(StatusCode::BAD_REQUEST, "400"),
            },
            Method::GET => {
                let body = self.content.body("", self.bytes, "", PIECE_BYTES).map_err(|never| match never {});
                let mut answer = Response::new(body.boxed_unsync());
                let kind = header::HeaderValue::from_static("application/zip");
                answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                answer
            }
            _ => plain(StatusCode::METHOD_NOT_ALLOWED, "405"),
        }
    }

    /// Whether the job runs and this is its token.
    fn may(&self, id: JobId, headers: &header::HeaderMap) -> bool {
        let shown = headers.get("job-token").and_then(|token| token.to_str().ok());
        self.standin.read(|model| {
            let job = model.jobs.get(&id).filter(|job| job.state.is_executing());
            job.zip(shown).is_some_and(|(job, shown)| job.token.expose() == shown)
        })
    }

    async fn receive(&self, mut body: Incoming) -> Result<(), hyper::Error> {
        let mut digester = Digester::default();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                digester.update(&data);
            }
        }
        *self.received() = Some(digester.finish());
        Ok(())
    }

    fn received(&self) -> std::sync::MutexGuard<'_, Option<Digest>> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn artifact_route(path: &str) -> Option<JobId> {
    path.strip_prefix("/api/v4/jobs/")?.strip_suffix("/artifacts")?.parse().ok().map(JobId)
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut answer = Response::new(full(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    answer
}

/// An error of the connection's, for those who want one.
pub(crate) fn broken(error: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
    io::Error::other(error)
}
