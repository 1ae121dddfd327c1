//! A whole door on paused time, with a job and a GitLab that note what reaches them, and guests that speak bytes.

use crate::files::MemoryFiles;
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::clock::Clock;
use dayfly::files::Files as _;
use dayfly::gitlab::transport::{Body, BodyError, Call, TransportError, full};
use dayfly::gitlab::{Dependency, JobClient, JobId, JobStatus, Transport, Verdict};
use dayfly::guest::{Admission, DoorHandle, GuestEvent, GuestView, HandOut, Limits, VerdictAnswer, admit};
use dayfly::metrics::Metrics;
use dayfly::network::DoorListener;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly::spool::Spool;
use dayfly::vm::{Stream, VmId};
use dayfly_guest_config::{Greeting, Pass};
use http_body::Frame;
use http_body_util::BodyExt as _;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, DuplexStream, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{Dispatch, Event, Level, Metadata, Subscriber, span};

/// Made once: a registry costs more than a connection. What is counted does not matter here.
pub(super) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

pub(super) const JOB: u64 = 42;
pub(super) const DEPENDENCY: u64 = 41;
pub(super) const JOB_TOKEN: &str = "glcbt-own";
pub(super) const DEPENDENCY_TOKEN: &str = "glcbt-dep";
pub(super) const GUEST_TOKEN: &str = "glrt-guest";
pub(super) const PAYLOAD: &[u8] = br#"{"id":42,"token":"glcbt-own"}"#;
/// In headers of GitLab's answers that no guest may see.
pub(super) const CANARY: &str = "canary-of-gitlab";

/// In flight on one connection: more than any input has, so that writing to a door never waits.
const PIPE_BYTES: usize = 1024 * 1024;
/// The relay's.
const NONCE: [u8; 16] = [7; 16];
/// Virtual time within which every connection ends.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What GitLab saw of one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// The body came to its end.
    pub(super) whole: bool,
}

/// How GitLab answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mood {
    /// 201 once it has the body.
    #[default]
    Right,
    /// 413 before it has read anything.
    Early,
    /// A redirect.
    Elsewhere,
    /// No answer at all.
    Broken,
    /// An answer that breaks off.
    Torn,
}

/// Notes and answers.
#[derive(Default)]
pub(super) struct Gitlab {
    pub(super) seen: Mutex<Vec<Seen>>,
    pub(super) mood: Mutex<Mood>,
    /// The body of its answers.
    pub(super) says: Mutex<Bytes>,
}

/// The way to it.
struct Way(Arc<Gitlab>);

impl Transport for Way {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let (me, mood) = (Arc::clone(&self.0), *self.0.mood.lock().unwrap());
        let (parts, mut body) = call.request.into_parts();
        let index = {
            let mut seen = self.0.seen.lock().unwrap();
            let headers = parts.headers.iter().map(|(k, v)| (k.to_string(), v.to_str().unwrap().to_owned()));
            seen.push(Seen {
                method: parts.method.to_string(),
                target: parts.uri.to_string(),
                headers: headers.collect(),
                ..Seen::default()
            });
            seen.len() - 1
        };
        Box::pin(async move {
            let says = me.says.lock().unwrap().clone();
            let answer = http::Response::builder()
                .header("set-cookie", CANARY)
                .header("server", CANARY)
                .header("x-gitlab-meta", CANARY)
                .header("content-type", "application/zip");
            match mood {
                Mood::Broken => return Err(TransportError::Broken("no answer".into())),
                Mood::Early => return Ok(answer.status(413).body(full(says)).unwrap()),
                Mood::Elsewhere => {
                    let answer = answer.status(307).header("location", format!("https://{CANARY}/"));
                    return Ok(answer.body(full(says)).unwrap());
                }
                Mood::Right | Mood::Torn => {}
            }
            while let Some(frame) = body.frame().await {
                let data = frame.map_err(TransportError::Broken)?.into_data().expect("trailers are dropped");
                me.seen.lock().unwrap()[index].body.extend_from_slice(&data);
            }
            me.seen.lock().unwrap()[index].whole = true;
            let status = if parts.method == http::Method::POST { 201 } else { 200 };
            let answer = answer.status(status);
            if mood == Mood::Right {
                return Ok(answer.body(full(says)).unwrap());
            }
            Ok(answer.header("content-length", 1 << 30).body(Torn(Some(says)).boxed_unsync()).unwrap())
        })
    }
}

/// A body that breaks off after its one piece.
struct Torn(Option<Bytes>);

impl http_body::Body for Torn {
    type Data = Bytes;
    type Error = BodyError;
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let piece = self.0.take().map(Frame::data);
        Poll::Ready(Some(piece.ok_or_else(|| "torn".into())))
    }
}

/// What the job behind the door was told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) verdicts: Vec<Verdict>,
    pub(super) hand_outs: usize,
}

/// The door, and what stands around it.
pub(super) struct Door {
    entrance: mpsc::Sender<Box<dyn Stream>>,
    pass: Pass,
    handle: Option<DoorHandle>,
    pub(super) view: watch::Sender<GuestView>,
    pub(super) gitlab: Arc<Gitlab>,
    pub(super) told: Arc<Mutex<Told>>,
    files: MemoryFiles,
}

struct Entrance(mpsc::Receiver<Box<dyn Stream>>);

impl DoorListener for Entrance {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            match self.0.recv().await {
                Some(stream) => Ok(stream),
                None => std::future::pending().await,
            }
        })
    }
}

impl Door {
    pub(super) async fn open() -> Self {
        let rng = Rng::seeded(1);
        let files = MemoryFiles::default();
        files.create_dir(Path::new("/spool")).await.unwrap();
        let spool = Spool::open(Arc::new(files.clone()), Path::new("/spool/trace"), 1 << 20, None).await.unwrap();
        spool.begin_guest().await;
        let view = GuestView { status: JobStatus::Running, verdict: None, update_interval: Duration::from_secs(2) };
        let (view, seen) = watch::channel(view);
        let (events, told_events) = mpsc::channel(8);
        let told = Arc::new(Mutex::new(Told::default()));
        #[expect(clippy::disallowed_methods, reason = "ends with the door, which holds its sender")]
        tokio::spawn(job(told_events, Arc::clone(&told), view.clone()));
        let gitlab = Arc::new(Gitlab::default());
        let (entrance, entering) = mpsc::channel(8);
        let pass = Pass::new(rng.bytes());
        let transport: Arc<dyn Transport> = Arc::new(Way(Arc::clone(&gitlab)));
        let handle = admit(Admission {
            vm: VmId::random(&rng),
            entrance: dayfly::network::Entrance::Port(Box::new(Entrance(entering))),
            pass: pass.clone(),
            guest_token: Secret::new(GUEST_TOKEN),
            job: JobId(JOB),
            job_token: Secret::new(JOB_TOKEN),
            dependencies: vec![Dependency { id: JobId(DEPENDENCY), token: Secret::new(DEPENDENCY_TOKEN) }],
            spool: spool.writer(),
            client: JobClient::new(transport, JobId(JOB), Secret::new(JOB_TOKEN), rng.clone()),
            cache: None,
            forwards: Vec::new(),
            direct_download: false,
            events,
            view: seen,
            limits: Limits::default(),
            rng,
            clock: Clock::system(),
            metrics: METRICS.clone(),
        });
        Self { entrance, pass, handle: Some(handle), view, gitlab, told, files }
    }

    /// A connection that has shown the pass, or `wrong`ly not.
    pub(super) async fn connect(&self, wrong: bool) -> Connection {
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        self.entrance.send(Box::new(theirs)).await.expect("the door accepts until its pass is revoked");
        let mut connection = dayfly_test_guest::Connection::new(ours);
        if wrong {
            let opening = Greeting::opening(&NONCE).len() + 2;
            connection.spoil(move |before, bytes| {
                if before == opening {
                    // The proof, but for the end of its line.
                    let digits = bytes.len() - 2;
                    bytes[..digits].fill(b'0');
                }
            });
        }
        connection.greet(&self.pass, NONCE, b"").await.expect("the door holds the pass");
        let (writing, mut reading) = connection.split();
        #[expect(clippy::disallowed_methods, reason = "ends with the connection, and is awaited there")]
        let answers = tokio::spawn(async move { reading.rest().await });
        Connection { writing, answers, sent: Vec::new(), wrong }
    }

    /// Closes the door; what its guest's trace is then.
    pub(super) async fn close(&mut self) -> Vec<u8> {
        let pass = self.handle.take().expect("closed once");
        tokio::time::timeout(LIMIT, pass.revoke()).await.expect("a task of the door does not end");
        self.files.read(Path::new("/spool/trace"), u64::MAX).await.unwrap()
    }
}

/// The job: hands its payload out once, and takes the first verdict.
async fn job(mut events: mpsc::Receiver<GuestEvent>, told: Arc<Mutex<Told>>, view: watch::Sender<GuestView>) {
    while let Some(event) = events.recv().await {
        let mut told = told.lock().unwrap();
        match event {
            GuestEvent::AsksForJob { reply, .. } => {
                let first = told.hand_outs == 0;
                told.hand_outs += 1;
                // A guest that has gone gets nothing.
                let _ = reply.send(first.then(|| HandOut { payload: Bytes::from_static(PAYLOAD), request_id: None }));
            }
            GuestEvent::Verdict { verdict, reply } => {
                let known = view.borrow().verdict.clone();
                let taken = known.as_ref().is_none_or(|known| *known == verdict);
                told.verdicts.push(verdict.clone());
                if known.is_none() {
                    view.send_modify(|view| view.verdict = Some(verdict));
                }
                let _ = reply.send(if taken { VerdictAnswer::Taken } else { VerdictAnswer::Over });
            }
            GuestEvent::Greeted | GuestEvent::Spoke | GuestEvent::DebugTrace | GuestEvent::HandOutLost => {}
        }
    }
}

/// The guest's end.
pub(super) struct Connection {
    writing: WriteHalf<DuplexStream>,
    answers: JoinHandle<Vec<u8>>,
    /// All that was sent behind the greeting.
    pub(super) sent: Vec<u8>,
    /// Its greeting was wrong.
    pub(super) wrong: bool,
}

impl Connection {
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.sent.extend_from_slice(bytes);
        // The door may have ended it.
        let _ = self.writing.write_all(bytes).await;
    }

    /// Ends what is sent, and waits for the end of what is answered. Returns both.
    pub(super) async fn end(mut self) -> Exchange {
        let _ = self.writing.shutdown().await;
        let answers = tokio::time::timeout(LIMIT, self.answers).await.expect("a connection does not end");
        Exchange { sent: self.sent, answered: answers.expect("it only reads"), wrong: self.wrong }
    }
}

/// A connection that has ended.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) sent: Vec<u8>,
    pub(super) answered: Vec<u8>,
    pub(super) wrong: bool,
}

/// Runs one case on a runtime of its own with paused time; an ERROR in the log, a panic's too, breaks it: nothing
/// that a guest can do is one.
pub(super) fn on_paused_time(case: impl Future<Output = ()>) {
    thread_local! {
        static LOG: (Dispatch, Arc<AtomicBool>) = {
            let errors = Arc::new(AtomicBool::new(false));
            (Dispatch::new(Errors(Arc::clone(&errors))), errors)
        };
    }
    LOG.with(|(log, errors)| {
        errors.store(false, Ordering::Relaxed);
        tracing::dispatcher::with_default(log, || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            runtime.unwrap().block_on(case);
        });
        assert!(!errors.load(Ordering::Relaxed), "the door logged an error, perhaps of a panic");
    });
}

/// A log that only notes that there was an error.
struct Errors(Arc<AtomicBool>);

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, _: &Event<'_>) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}
