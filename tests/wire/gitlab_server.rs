//! A GitLab made by hand: a TCP server whose every byte a test decides, and that keeps what it was sent.
//!
//! It shares no code with the client under test: requests are cut out of the stream here.

use dayfly::gitlab::{
    Endpoint, JobClient, JobId, OpenTransport as _, ProxyEnvironment, RealLimits, RealOpenTransport, RunnerApi,
    RunnerToken, Transport,
};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use url::Url;

/// The runner token of all wire tests: its tail must be in no text.
pub(crate) const RUNNER_TOKEN: &str = "glrt-t1_PUBLICCHRRuNnErCaNaRysecrettail";
/// The job token of all wire tests.
pub(crate) const JOB_TOKEN: &str = "glcbt-64_secretjobtoken";

/// How long anything in these tests may take before it counts as hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// Method, target and version.
    pub(crate) line: String,
    /// Names in lower case, in order.
    pub(crate) headers: Vec<(String, String)>,
    /// The body, taken out of its framing.
    pub(crate) body: Vec<u8>,
    /// Whether the body came to its proper end.
    pub(crate) whole: bool,
}

impl Request {
    /// Values of a header.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect()
    }

    /// The body as text.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// Sends these bytes and goes on with the connection.
    Keep(Vec<u8>),
    /// Sends these bytes, then closes in good order.
    Close(Vec<u8>),
    /// Sends these bytes, then resets.
    Reset(Vec<u8>),
    /// Sends these bytes, then nothing, and never closes.
    Hang(Vec<u8>),
}

/// A whole answer with a length.
pub(crate) fn answer(status: u16, headers: &str, body: impl AsRef<[u8]>) -> Reply {
    let body = body.as_ref();
    let mut bytes = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n", body.len()).into_bytes();
    if status == 204 || status == 304 {
        bytes = format!("HTTP/1.1 {status} X\r\n{headers}\r\n").into_bytes();
    }
    bytes.extend_from_slice(body);
    Reply::Keep(bytes)
}

/// Bytes of a connection, with what was read beyond the last request.
pub(crate) struct Wire<S> {
    pub(crate) stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + Unpin> Wire<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    async fn more(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.buffer).await, Ok(n) if n > 0)
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Some(String::from_utf8(line[..end].to_vec()).unwrap());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    async fn exact(&mut self, bytes: usize, into: &mut Vec<u8>) -> bool {
        let mut left = bytes;
        while left > 0 {
            if self.buffer.is_empty() && !self.more().await {
                return false;
            }
            let take = left.min(self.buffer.len());
            into.extend(self.buffer.drain(..take));
            left -= take;
        }
        true
    }

    /// Line and headers of the next request; `None` at the end of the connection.
    pub(crate) async fn head(&mut self) -> Option<Request> {
        let mut request = Request { line: self.line().await?, ..Request::default() };
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { return Some(request) };
            request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// The body that the head announces.
    pub(crate) async fn body(&mut self, request: &mut Request) {
        request.whole = if request.all("transfer-encoding") == ["chunked"] {
            loop {
                let Some(size) = self.line().await else { break false };
                let size = usize::from_str_radix(&size, 16).unwrap();
                let mut end = Vec::new();
                if !self.exact(size, &mut request.body).await || !self.exact(2, &mut end).await {
                    break false;
                }
                if size == 0 {
                    break true;
                }
            }
        } else {
            let length = request.all("content-length").first().map_or(0, |length| length.parse().unwrap());
            self.exact(length, &mut request.body).await
        };
    }
}

/// What a server has seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Connections, counted when they are accepted.
    pub(crate) connections: usize,
    /// Requests, each when its body has ended.
    pub(crate) requests: Vec<Request>,
}

/// A server on a port of its own; dropping it closes everything.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    _tasks: JoinSet<()>,
}

type Handled = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Server {
    /// Hands each connection, with its number from 1, to `handle`.
    pub(crate) async fn raw(handle: impl Fn(TcpStream, usize, Arc<Mutex<Seen>>) -> Handled + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut tasks = JoinSet::new();
        let counted = Arc::clone(&seen);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = {
                    let mut seen = counted.lock().unwrap();
                    seen.connections += 1;
                    seen.connections
                };
                connections.spawn(handle(stream, number, Arc::clone(&counted)));
            }
        });
        Self { address, seen, _tasks: tasks }
    }

    /// Reads each request whole and does what `reply` says.
    pub(crate) async fn answering(reply: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let reply = Arc::new(reply);
        Self::raw(move |stream, _, seen| {
            let reply = Arc::clone(&reply);
            Box::pin(async move {
                let mut wire = Wire::new(stream);
                while let Some(mut request) = wire.head().await {
                    wire.body(&mut request).await;
                    let reply = reply(&request);
                    seen.lock().unwrap().requests.push(request);
                    let (Reply::Keep(bytes) | Reply::Close(bytes) | Reply::Reset(bytes) | Reply::Hang(bytes)) = &reply;
                    let _ = wire.stream.write_all(bytes).await;
                    match reply {
                        Reply::Keep(_) => {}
                        Reply::Close(_) => return,
                        Reply::Reset(_) => return wire.stream.set_zero_linger().unwrap(),
                        Reply::Hang(_) => std::future::pending().await,
                    }
                }
            })
        })
        .await
    }

    /// Reads each head and then nothing: the body stays in the sockets.
    pub(crate) async fn answering_heads_only() -> Self {
        Self::raw(|stream, _, seen| {
            Box::pin(async move {
                let mut wire = Wire::new(stream);
                let request = wire.head().await.unwrap();
                seen.lock().unwrap().requests.push(request);
                std::future::pending().await
            })
        })
        .await
    }

    pub(crate) fn url(&self) -> Url {
        Url::parse(&format!("http://{}", self.address)).unwrap()
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().requests.clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.lock().unwrap().connections
    }

    /// The only request so far.
    pub(crate) fn request(&self) -> Request {
        let requests = self.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        requests.into_iter().next().unwrap()
    }
}

/// A transport to `url` over plain HTTP.
pub(crate) fn plain(url: &Url) -> Arc<dyn Transport> {
    let endpoint = Endpoint { url: url.clone(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    open(RealLimits::default(), &endpoint)
}

pub(crate) fn open(limits: RealLimits, endpoint: &Endpoint) -> Arc<dyn Transport> {
    RealOpenTransport::new(limits, ProxyEnvironment::default()).open(endpoint).unwrap()
}

pub(crate) fn runner(transport: Arc<dyn Transport>) -> RunnerApi {
    RunnerApi::new(transport, RunnerToken::new(Secret::new(RUNNER_TOKEN)), "s_0123456789ab".to_owned(), Rng::system())
}

pub(crate) fn job(transport: Arc<dyn Transport>) -> JobClient {
    JobClient::new(transport, JobId(42), Secret::new(JOB_TOKEN), Rng::system())
}

/// Awaits, but not for ever.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it hangs")
}

/// Waits until `holds` does.
pub(crate) async fn until(mut holds: impl FnMut() -> bool) {
    soon(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// An error and its causes, as a log line shows them, and its `Debug`.
pub(crate) fn every_text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = format!("{error:?} {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Sockets that this process still holds towards `port`.
pub(crate) fn sockets_to(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let remote = format!(":{port:04X}");
    // Fields: number, local, remote, state, queues, timer, retransmits, uid, timeout, inode. An
    // inode of 0 is a connection that the kernel ends by itself.
    let held = |line: &&str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        fields[2].ends_with(&remote) && fields[9] != "0"
    };
    table.lines().skip(1).filter(held).count()
}
