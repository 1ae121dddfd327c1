//! The runner that sends: the same code whether it speaks TLS to GitLab or, behind the greeting, plain
//! HTTP to dayfly's door.
//!
//! As the official one it uploads chunked multipart in pieces of 32 KiB on a connection of its own, and
//! sends its trace piece by piece, each after the answer to the one before.

use super::content::{Content, Digest, Digester, Stretch};
use super::gitlab::broken;
use crate::guest;
use bytes::Bytes;
use dayfly::gitlab::transport::{Body, full};
use dayfly::rng::Rng;
use dayfly::vm::Stream;
use dayfly_guest_config::GuestConfig;
use dayfly_test_guest::boot::guest_token;
use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

/// What the official runner's `io.Copy` moves at once.
const UPLOAD_PIECE_BYTES: usize = 32 << 10;
/// Its largest piece of trace.
const TRACE_PIECE_BYTES: u64 = 1 << 20;

const BOUNDARY: &str = "multipart/form-data; boundary=B";
const HEAD: &str = "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n";
const TAIL: &str = "\r\n--B--\r\n";

/// How it reaches GitLab.
#[derive(Clone)]
pub(crate) enum Way {
    /// By itself.
    Direct { address: SocketAddr, tls: Arc<ClientConfig>, token: String },
    /// Through the door that this config names.
    Door(Box<GuestConfig>),
}

/// A runner with a job.
pub(crate) struct Runner {
    way: Way,
    rng: Rng,
    job: u64,
    job_token: String,
    /// The connection for everything but artifacts.
    connection: Connection,
}

/// One HTTP connection; dropping it closes it.
struct Connection {
    sender: SendRequest<Body>,
    _driver: JoinSet<()>,
}

impl Way {
    async fn connect(&self, rng: &Rng) -> io::Result<Connection> {
        let stream: Box<dyn Stream> = match self {
            Self::Direct { address, tls, .. } => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::from(address.ip());
                Box::new(TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?)
            }
            Self::Door(config) => Box::new(guest::connect(config, rng).await?.into_stream()),
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its error is the pending call's, too.
            let _ = connection.await;
        });
        Ok(Connection { sender, _driver: driver })
    }

    fn token(&self) -> io::Result<String> {
        match self {
            Self::Direct { token, .. } => Ok(token.clone()),
            Self::Door(config) => guest_token(config).ok_or_else(|| broken("no guest token")),
        }
    }
}

impl Connection {
    async fn call(&mut self, request: Request<Body>, wanted: u16) -> io::Result<Response<Incoming>> {
        let what = format!("{} {}", request.method(), request.uri().path());
        self.sender.ready().await.map_err(broken)?;
        let answer = self.sender.send_request(request).await.map_err(broken)?;
        if answer.status().as_u16() == wanted {
            Ok(answer)
        } else {
            Err(broken(format!("{what} was answered {}", answer.status())))
        }
    }
}

impl Runner {
    /// Takes the job that waits there, and begins it.
    pub(crate) async fn begin(way: Way, rng: Rng) -> io::Result<Self> {
        let mut connection = way.connect(&rng).await?;
        let token = way.token()?;
        let info = json!({"name": "gitlab-runner", "version": "19.3.0", "features": {"cancel_gracefully": true}});
        let ask = json!({"info": info, "token": token, "system_id": "s_0123456789ab"}).to_string();
        let request = request(Method::POST, "/api/v4/jobs/request", ("runner-token", &token), "application/json");
        let answer = connection.call(whole(request, ask.into())?, 201).await?;
        let payload: Value = serde_json::from_slice(&answer.into_body().collect().await.map_err(broken)?.to_bytes())?;
        let job = payload["id"].as_u64().ok_or_else(|| broken("no job id"))?;
        let job_token = payload["token"].as_str().ok_or_else(|| broken("no job token"))?.to_owned();
        let mut runner = Self { way, rng, job, job_token, connection };
        runner.update(json!({"token": runner.job_token, "state": "running", "output": {}})).await?;
        Ok(runner)
    }

    pub(crate) fn job(&self) -> u64 {
        self.job
    }

    /// Uploads so many bytes; how long it took, and what GitLab must have received.
    pub(crate) async fn upload(&self, content: &Content, bytes: u64) -> io::Result<Duration> {
        let begun = Instant::now();
        let path = self.path("/artifacts?artifact_format=zip&artifact_type=archive");
        let body = upload_body(content, bytes).map_err(|never| match never {}).boxed_unsync();
        let request = request(Method::POST, &path, ("job-token", &self.job_token), BOUNDARY);
        let mut connection = self.way.connect(&self.rng).await?;
        let answer = connection.call(request.body(body).map_err(broken)?, 201).await?;
        answer.into_body().collect().await.map_err(broken)?;
        Ok(begun.elapsed())
    }

    /// Downloads the artifacts; how long it took, and what came.
    pub(crate) async fn download(&self) -> io::Result<(Duration, Digest)> {
        let begun = Instant::now();
        let request = request(Method::GET, &self.path("/artifacts?"), ("job-token", &self.job_token), "text/plain");
        let mut connection = self.way.connect(&self.rng).await?;
        let mut body = connection.call(whole(request, Bytes::new())?, 200).await?.into_body();
        let mut digester = Digester::default();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(broken)?.into_data() {
                digester.update(&data);
            }
        }
        Ok((begun.elapsed(), digester.finish()))
    }

    /// Sends so many bytes of trace, then says that the job has succeeded.
    pub(crate) async fn trace(&mut self, content: &Content, bytes: u64) -> io::Result<()> {
        let (mut sent, mut crc) = (0, crc32fast::Hasher::new());
        while sent < bytes {
            let piece = content.copy(sent, usize::try_from(TRACE_PIECE_BYTES.min(bytes - sent)).map_err(broken)?);
            crc.update(&piece);
            let range = format!("{sent}-{}", sent + piece.len() as u64 - 1);
            sent += piece.len() as u64;
            let path = self.path("/trace?debug_trace=false");
            let request = request(Method::PATCH, &path, ("job-token", &self.job_token), "text/plain");
            let request = whole(request.header("content-range", range), piece)?;
            let answer = self.connection.call(request, 202).await?;
            answer.into_body().collect().await.map_err(broken)?;
        }
        let crc = format!("crc32:{:08x}", crc.finalize());
        let output = json!({"checksum": crc, "bytesize": bytes});
        self.update(json!({"token": self.job_token, "state": "success", "checksum": crc, "output": output})).await
    }

    async fn update(&mut self, update: Value) -> io::Result<()> {
        let request = request(Method::PUT, &self.path(""), ("job-token", &self.job_token), "application/json");
        let answer = self.connection.call(whole(request, update.to_string().into())?, 200).await?;
        answer.into_body().collect().await.map_err(broken)?;
        Ok(())
    }

    fn path(&self, below: &str) -> String {
        format!("/api/v4/jobs/{}{below}", self.job)
    }
}

/// What an upload sends.
pub(crate) fn upload_body(content: &Content, bytes: u64) -> Stretch {
    content.body(HEAD, bytes, TAIL, UPLOAD_PIECE_BYTES)
}

fn request(method: Method, path: &str, (name, token): (&str, &str), kind: &str) -> http::request::Builder {
    let request = Request::builder().method(method).uri(path).header("host", "192.0.2.1");
    request.header("user-agent", "gitlab-runner 19.3.0").header(name, token).header("content-type", kind)
}

fn whole(request: http::request::Builder, body: Bytes) -> io::Result<Request<Body>> {
    request.body(full(body)).map_err(broken)
}
