//! The daemon's seams with a stop-watch in each: what happens when, between GitLab's job and the guest's
//! first request. Nothing is changed on the way.

use dayfly::BoxFuture;
use dayfly::gitlab::transport::{Body, OpenError};
use dayfly::gitlab::{Call, Endpoint, OpenTransport, Transport, TransportError};
use dayfly::network::{DoorListener, Listen, Tcp};
use dayfly::vm::paths::{Paths, RealPaths};
use dayfly::vm::{Host, HostInfo, Hypervisor, InstallationId, Stream, VmError, VmName, VmSpec, VmState, VmSummary};
use dayfly_guest_config::Report;
use jiff::Timestamp;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

/// Bytes of one line that are looked at.
const LINE_BYTES_MAX: usize = 8192;

/// The guest's first request, as its line begins.
pub(crate) const FIRST_REQUEST: &str = "POST /api/v4/jobs/request ";

/// A guest's update of its job's state, in the line of the request.
const UPDATE: &str = "PUT /api/v4/jobs/";

/// What happens on the way, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mark {
    /// GitLab's 201 came.
    PickedUp,
    /// The overlay is asked for: the job is in the journal.
    DiskAsked,
    DiskReady,
    /// The hypervisor has started the VM.
    Started,
    /// The guest program waits for its config: kernel and boot are over.
    Ready,
    /// It has applied it.
    Applied,
    RunnerStarted,
    /// The guest runner asks for its job, at the door.
    Asked,
}

/// The stop-watch; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopWatch(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    marks: Vec<(Mark, Instant)>,
    spec: Option<VmSpec>,
    asked: watch::Sender<bool>,
    /// When a guest began its last update of a job's state.
    updated: Option<Timestamp>,
}

impl StopWatch {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, mark: Mark) {
        let now = Instant::now();
        let mut seen = self.seen();
        // The first of each counts: guests repeat themselves.
        if !seen.marks.iter().any(|(known, _)| *known == mark) {
            seen.marks.push((mark, now));
        }
        if mark == Mark::Asked {
            seen.asked.send_replace(true);
        }
    }

    /// Forgets all marks: the next job is the one to watch.
    pub(crate) fn reset(&self) {
        let mut seen = self.seen();
        seen.marks.clear();
        seen.asked.send_replace(false);
    }

    /// Waits for the guest's first request.
    pub(crate) async fn asked(&self) {
        let mut asked = self.seen().asked.subscribe();
        // The sender lives as long as this.
        let _ = asked.wait_for(|asked| *asked).await;
    }

    /// The marks so far, in the order of [`Mark`].
    pub(crate) fn marks(&self) -> Vec<(Mark, Instant)> {
        let mut marks = self.seen().marks.clone();
        marks.sort();
        marks
    }

    /// When a guest's last update of its job's state came to its door; wall time, as GitLab's.
    pub(crate) fn updated(&self) -> Option<Timestamp> {
        self.seen().updated
    }

    /// What the last VM was started from.
    pub(crate) fn spec(&self) -> Option<VmSpec> {
        self.seen().spec.clone()
    }
}

/// A GitLab whose hand-outs are noted.
pub(crate) struct WatchedGitlab(pub(crate) Arc<dyn OpenTransport>, pub(crate) StopWatch);

impl OpenTransport for WatchedGitlab {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(WatchedTransport(self.0.open(endpoint)?, self.1.clone())))
    }
}

struct WatchedTransport(Arc<dyn Transport>, StopWatch);

impl Transport for WatchedTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let asks = call.request.uri().path().ends_with("/jobs/request");
        let (answer, watch) = (self.0.call(call), self.1.clone());
        Box::pin(async move {
            let answer = answer.await?;
            if asks && answer.status() == http::StatusCode::CREATED {
                watch.mark(Mark::PickedUp);
            }
            Ok(answer)
        })
    }
}

/// A stream whose lines, as they come, are looked at.
struct Lines<F> {
    stream: Box<dyn Stream>,
    line: Vec<u8>,
    look: F,
}

impl<F: FnMut(&str)> Lines<F> {
    fn new(stream: Box<dyn Stream>, look: F) -> Self {
        Self { stream, line: Vec::new(), look }
    }
}

impl<F: FnMut(&str) + Unpin> AsyncRead for Lines<F> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let lines = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut lines.stream).poll_read(cx, buffer))?;
        for byte in &buffer.filled()[before..] {
            if *byte == b'\n' {
                (lines.look)(String::from_utf8_lossy(&lines.line).trim_end());
                lines.line.clear();
            } else if lines.line.len() < LINE_BYTES_MAX {
                lines.line.push(*byte);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<F: Unpin> AsyncWrite for Lines<F> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

struct WatchedDoor(Box<dyn DoorListener>, StopWatch);

impl DoorListener for WatchedDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let stream = self.0.accept().await?;
            let watch = self.1.clone();
            let look = move |line: &str| {
                if line.starts_with(FIRST_REQUEST) {
                    watch.mark(Mark::Asked);
                } else if line.contains(UPDATE) && line.ends_with(" HTTP/1.1") {
                    // It may follow a body that ended without a line's end.
                    watch.seen().updated = Some(Timestamp::now());
                }
            };
            Ok(Box::new(Lines::new(stream, look)) as Box<dyn Stream>)
        })
    }
}

/// The host's doors, and what comes through them.
pub(crate) struct WatchedDoors(pub(crate) StopWatch);

impl Listen for WatchedDoors {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move {
            let listener = Tcp.listen(address).await?;
            Ok(Box::new(WatchedDoor(listener, self.0.clone())) as Box<dyn DoorListener>)
        })
    }
}

/// A hypervisor whose calls are noted, and what its guests report.
struct WatchedHypervisor(Arc<dyn Hypervisor>, StopWatch);

/// This host, watched.
pub(crate) fn watched(host: &Host, watch: &StopWatch) -> Host {
    let paths = Arc::new(WatchedPaths(RealPaths::default(), watch.clone()));
    let sockets = host.sockets.by(paths.clone());
    Host { sockets, ..Host::new(Arc::new(WatchedHypervisor(host.hypervisor.clone(), watch.clone())), paths) }
}

impl Hypervisor for WatchedHypervisor {
    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            self.1.seen().spec = Some(spec.clone());
            self.0.start(spec).await?;
            self.1.mark(Mark::Started);
            Ok(())
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        self.0.probe()
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        self.0.state(name)
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.destroy(name)
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        self.0.list(installation)
    }
}

/// Disks and sockets, likewise.
struct WatchedPaths(RealPaths, StopWatch);

impl Paths for WatchedPaths {
    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            self.1.mark(Mark::DiskAsked);
            self.0.make_overlay(overlay, base, disk_gib).await?;
            self.1.mark(Mark::DiskReady);
            Ok(())
        })
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = self.0.open_socket(socket).await?;
            let watch = self.1.clone();
            let look = move |line: &str| match Report::parse(line) {
                Some(Report::Ready) => watch.mark(Mark::Ready),
                Some(Report::Applied) => watch.mark(Mark::Applied),
                Some(Report::RunnerStarted) => watch.mark(Mark::RunnerStarted),
                _ => {}
            };
            Ok(Box::new(Lines::new(stream, look)) as Box<dyn Stream>)
        })
    }

    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.0.make_passable(dir)
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.0.make_private(dir)
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink(path)
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink_all_of(dir, vm)
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.0.names(dir)
    }
}
