//! One door with fakes around it: a listener, a job that answers its events, a GitLab.

pub(crate) use super::client::{Guest, Reply, patch, poll, put, request};
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::cache::JobCache;
use dayfly::clock::Clock;
use dayfly::files::Files as _;
use dayfly::gitlab::transport::{Body, BodyError, Call, TransportError, full};
use dayfly::gitlab::{Dependency, JobClient, JobId, JobStatus, Transport, Verdict};
use dayfly::guest::{Admission, DoorHandle, GuestEvent, GuestView, HandOut, Limits, VerdictAnswer, admit};
use dayfly::metrics::Metrics;
use dayfly::network::{self, DoorListener, Forward};
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::spool::Spool;
use dayfly::vm::sockets::DoorSocket;
use dayfly::vm::{Stream, VmId};
use dayfly_doubles::files::MemoryFiles;
use dayfly_doubles::frozen::FreezableFiles;
use dayfly_guest_config::Pass;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

pub(crate) const JOB: u64 = 42;
pub(crate) const DEPENDENCY: u64 = 41;
pub(crate) const JOB_TOKEN: &str = "glcbt-job-token";
pub(crate) const DEPENDENCY_TOKEN: &str = "glcbt-dependency-token";
pub(crate) const GUEST_TOKEN: &str = "glrt-guest-token";
pub(crate) const PAYLOAD: &[u8] = br#"{"id":42,"token":"glcbt-job-token","unknown":[1]}"#;

/// Nothing in these tests takes this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A door, and all that its test may look at or change.
pub(crate) struct Door {
    pub(crate) entrance: Entrance,
    pub(crate) pass: Pass,
    pub(crate) handle: Option<DoorHandle>,
    pub(crate) job: Arc<Mutex<FakeJob>>,
    pub(crate) view: watch::Sender<GuestView>,
    pub(crate) gitlab: Arc<FakeGitlab>,
    /// The daemon's own calls for this job.
    pub(crate) client: JobClient,
    pub(crate) spool: Spool,
    pub(crate) files: Arc<MemoryFiles>,
    /// The spool's way to `files`.
    pub(crate) disk: FreezableFiles,
    pub(crate) metrics: Metrics,
}

/// How a test reaches the door.
#[derive(Clone)]
pub(crate) enum Entrance {
    Memory(mpsc::Sender<io::Result<Box<dyn Stream>>>),
    Tcp(SocketAddr),
    /// By its relay, which the test has.
    Wire,
}

struct MemoryListener(mpsc::Receiver<io::Result<Box<dyn Stream>>>);

impl DoorListener for MemoryListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            match self.0.recv().await {
                Some(accepted) => accepted,
                None => std::future::pending().await,
            }
        })
    }
}

struct LoopbackListener(TcpListener);

impl DoorListener for LoopbackListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            // As the product's own.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

/// The job behind the door.
#[derive(Default)]
pub(crate) struct FakeJob {
    /// What it was told, in short: `ask`, `spoke`, …
    pub(crate) told: Vec<String>,
    pub(crate) verdicts: Vec<Verdict>,
    /// Whether the payload is there to be handed out; once.
    pub(crate) payload: bool,
    /// Holds polls instead of answering 204.
    pub(crate) hold_polls: bool,
    pub(crate) verdict_answer: Option<VerdictAnswer>,
    held: Vec<tokio::sync::oneshot::Sender<Option<HandOut>>>,
}

impl FakeJob {
    fn on(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Greeted => self.told.push("greeted".into()),
            GuestEvent::Spoke => self.told.push("spoke".into()),
            GuestEvent::DebugTrace => self.told.push("debug_trace".into()),
            GuestEvent::HandOutLost => self.told.push("hand_out_lost".into()),
            GuestEvent::AsksForJob { info, reply } => {
                let info = info.map_or("none", |info| if info.0.get().starts_with('{') { "object" } else { "odd" });
                self.told.push(format!("ask {info}"));
                if self.hold_polls {
                    self.held.push(reply);
                } else {
                    let hand_out = self.payload.then(hand_out);
                    if reply.send(hand_out).is_ok() {
                        self.payload = false;
                    }
                }
            }
            GuestEvent::Verdict { verdict, reply } => {
                self.verdicts.push(verdict);
                if let Some(answer) = self.verdict_answer {
                    let _ = reply.send(answer);
                }
            }
        }
    }

    /// Answers the oldest held poll.
    pub(crate) fn answer_held(&mut self) -> bool {
        self.held.remove(0).send(Some(hand_out())).is_ok()
    }

    pub(crate) fn count(&self, what: &str) -> usize {
        self.told.iter().filter(|told| told.starts_with(what)).count()
    }
}

fn hand_out() -> HandOut {
    HandOut { payload: Bytes::from_static(PAYLOAD), request_id: Some("gitlab-request-1".into()) }
}

/// What GitLab saw: method, path with query, headers, and the body with how it ended.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// `None`: not read to its end. `Some(false)`: it ended in an error.
    pub(crate) ended: Option<bool>,
}

type AnswerWith =
    dyn Fn(http::Request<Body>) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> + Send + Sync;

/// A GitLab that answers artifacts.
pub(crate) struct FakeGitlab {
    pub(crate) seen: Mutex<Vec<Seen>>,
    answer: Mutex<Arc<AnswerWith>>,
}

impl FakeGitlab {
    fn new() -> Arc<Self> {
        Arc::new(Self { seen: Mutex::default(), answer: Mutex::new(Arc::new(|_| unreachable!("no answer was set"))) })
    }

    /// Answers whatever comes by `answer`, which may read the body or not.
    pub(crate) fn answer_with(
        &self,
        answer: impl Fn(http::Request<Body>) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>>
        + Send
        + Sync
        + 'static,
    ) {
        *self.answer.lock().unwrap() = Arc::new(answer);
    }

    /// Reads the whole body (recorded), then answers.
    pub(crate) fn answer_after_body(
        self: &Arc<Self>,
        status: u16,
        headers: &'static [(&'static str, &'static str)],
        body: &'static str,
    ) {
        let me = Arc::downgrade(self);
        self.answer_with(move |request| {
            let me = me.upgrade().unwrap();
            Box::pin(async move {
                let mut body_in = request.into_body();
                let index = me.seen.lock().unwrap().len() - 1;
                while let Some(frame) = http_body_util::BodyExt::frame(&mut body_in).await {
                    match frame {
                        Ok(frame) => me.seen.lock().unwrap()[index].body.extend(frame.into_data().unwrap()),
                        Err(error) => {
                            me.seen.lock().unwrap()[index].ended = Some(false);
                            return Err(TransportError::Broken(error));
                        }
                    }
                }
                me.seen.lock().unwrap()[index].ended = Some(true);
                let mut response = http::Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(*name, *value);
                }
                Ok(response.body(full(body)).unwrap())
            })
        });
    }

    pub(crate) fn contacts(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

impl Transport for FakeGitlab {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let headers = call.request.headers().iter();
        let headers = headers.map(|(k, v)| (k.to_string(), v.to_str().unwrap().to_owned())).collect();
        let line = format!("{} {}", call.request.method(), call.request.uri());
        self.seen.lock().unwrap().push(Seen { line, headers, body: Vec::new(), ended: None });
        (self.answer.lock().unwrap())(call.request)
    }
}

/// A body that a test feeds piece by piece; it ends with its sender.
pub(crate) struct Feed(mpsc::Receiver<Result<Bytes, BodyError>>);

impl Feed {
    pub(crate) fn new() -> (mpsc::Sender<Result<Bytes, BodyError>>, Self) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, Self(receiver))
    }
}

impl http_body::Body for Feed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, BodyError>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(http_body::Frame::data)))
    }
}

/// How to open the door.
pub(crate) struct Setup {
    pub(crate) limits: Limits,
    pub(crate) tcp: bool,
    /// In place of a listener.
    pub(crate) wire: Option<DoorSocket>,
    pub(crate) direct_download: bool,
    pub(crate) cache: Option<JobCache>,
    pub(crate) forwards: Vec<Forward>,
    pub(crate) seed: u64,
    /// Instead of [`FakeGitlab`].
    pub(crate) transport: Option<Arc<dyn Transport>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            tcp: false,
            wire: None,
            direct_download: false,
            cache: None,
            forwards: Vec::new(),
            seed: 1,
            transport: None,
        }
    }
}

impl Setup {
    pub(crate) async fn open(self) -> Door {
        let rng = Rng::seeded(self.seed);
        let files = Arc::new(MemoryFiles::default());
        files.create_dir(Path::new("/spool")).await.unwrap();
        let disk = FreezableFiles::new(files.clone());
        let spool =
            Spool::open(Arc::new(disk.clone()), Path::new("/spool/trace"), 8 * 1024 * 1024, None).await.unwrap();
        spool.append_own("ours\n").await.unwrap();
        spool.begin_guest().await;
        let view = GuestView { status: JobStatus::Running, verdict: None, update_interval: Duration::from_secs(2) };
        let (view, view_receiver) = watch::channel(view);
        let (events, mut told) = mpsc::channel(64);
        let job = Arc::new(Mutex::new(FakeJob { verdict_answer: Some(VerdictAnswer::Taken), ..FakeJob::default() }));
        let listening = Arc::clone(&job);
        #[expect(clippy::disallowed_methods, reason = "ends with the door, which holds its sender")]
        tokio::spawn(async move {
            while let Some(event) = told.recv().await {
                listening.lock().unwrap().on(event);
            }
        });
        let port = |listener: Box<dyn DoorListener>| network::Entrance::Port(listener);
        let (ours, entrance) = if let Some(socket) = self.wire {
            (network::Entrance::Wire(socket), Entrance::Wire)
        } else if self.tcp {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            (port(Box::new(LoopbackListener(listener))), Entrance::Tcp(address))
        } else {
            let (sender, receiver) = mpsc::channel(8);
            (port(Box::new(MemoryListener(receiver))), Entrance::Memory(sender))
        };
        let gitlab = FakeGitlab::new();
        let pass = Pass::new(rng.bytes());
        let metrics = Metrics::new();
        let job_token = Secret::new(JOB_TOKEN);
        let transport = self.transport.unwrap_or_else(|| gitlab.clone());
        let client = JobClient::new(transport, JobId(JOB), job_token.clone(), rng.clone());
        let handle = admit(Admission {
            vm: VmId::random(&rng),
            entrance: ours,
            pass: pass.clone(),
            guest_token: Secret::new(GUEST_TOKEN),
            job: JobId(JOB),
            job_token,
            dependencies: vec![Dependency { id: JobId(DEPENDENCY), token: Secret::new(DEPENDENCY_TOKEN) }],
            spool: spool.writer(),
            client: client.clone(),
            cache: self.cache,
            forwards: self.forwards,
            direct_download: self.direct_download,
            events,
            view: view_receiver,
            limits: self.limits,
            rng: rng.clone(),
            clock: Clock::system(),
            metrics: metrics.clone(),
        });
        Door { entrance, pass, handle: Some(handle), job, view, gitlab, client, spool, files, disk, metrics }
    }
}

impl Door {
    pub(crate) async fn new() -> Self {
        Setup::default().open().await
    }

    /// An accepted connection, not greeted.
    pub(crate) async fn connect(&self) -> Guest {
        Guest::new(self.entrance.connect().await)
    }

    /// A greeted connection.
    pub(crate) async fn guest(&self) -> Guest {
        let mut guest = self.connect().await;
        guest.greet(&self.pass, b"").await;
        guest
    }

    /// One request on a connection of its own.
    pub(crate) async fn ask(&self, request: impl AsRef<[u8]>) -> Reply {
        let mut guest = self.guest().await;
        guest.send(request).await;
        guest.reply().await
    }

    pub(crate) fn told(&self) -> Vec<String> {
        self.job.lock().unwrap().told.clone()
    }

    /// Waits until the job was told `count` times of `what`.
    pub(crate) async fn wait_told(&self, what: &str, count: usize) {
        let told = async {
            while self.job.lock().unwrap().count(what) < count {
                tokio::task::yield_now().await;
            }
        };
        timeout(LIMIT, told).await.unwrap_or_else(|_| panic!("not told {count} × {what}: {:?}", self.told()));
    }

    pub(crate) fn set_status(&self, status: JobStatus) {
        self.view.send_modify(|view| view.status = status);
    }

    pub(crate) fn set_verdict(&self, verdict: Option<Verdict>) {
        self.view.send_modify(|view| view.verdict = verdict);
    }

    /// What stands in the spool behind our own first line.
    pub(crate) async fn guest_bytes(&self) -> Vec<u8> {
        let whole = self.files.read(Path::new("/spool/trace"), u64::MAX).await.unwrap();
        whole.strip_prefix(b"ours\n").unwrap().to_vec()
    }
}

impl Entrance {
    /// Lets an accept of the door's fail.
    pub(crate) async fn fail(&self) {
        let Self::Memory(sender) = self else { unreachable!("a socket's accept fails for nobody") };
        sender.send(Err(io::ErrorKind::ConnectionAborted.into())).await.expect("the door accepts");
    }

    pub(crate) async fn connect(&self) -> Box<dyn Stream> {
        match self {
            Self::Memory(sender) => {
                let (ours, theirs) = tokio::io::duplex(256 * 1024);
                sender.send(Ok(Box::new(theirs))).await.expect("the door accepts");
                Box::new(ours)
            }
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await.unwrap();
                // As the relay does.
                stream.set_nodelay(true).unwrap();
                Box::new(stream)
            }
            Self::Wire => unreachable!("the test's relay opens streams"),
        }
    }
}
