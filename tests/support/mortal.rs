//! One life of a daemon, and its sudden end: the seams as a process sees them that may be killed.
//!
//! Tasks on one runtime cannot be killed, but a process that can do nothing any more is as good as
//! dead: once a [`Life`] has ended, every call through its seams waits for ever, and what it held
//! of the world (doors, connections, calls to GitLab) is dropped, as the kernel does for a process.
//! The world behind (files, VMs, GitLab) lives on for the next life.

use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::files::{Entry, Files};
use dayfly::gitlab::transport::{Body, OpenError};
use dayfly::gitlab::{Call, Endpoint, OpenTransport, Transport, TransportError};
use dayfly::network::{DoorListener, Egress, EgressError, EgressOf, Listen, Terms};
use dayfly::vm::paths::Paths;
use dayfly::vm::{
    Host, HostInfo, Hypervisor, InstallationId, Stream, Usage, VmError, VmName, VmSpec, VmState, VmSummary,
};
use dayfly_egress::audit::Destination;
use std::future::{pending, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

/// A seam whose calls are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seam {
    Files,
    Hypervisor,
    GitLab,
}

/// On which side of the call's effect the end comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// The call at which a life ends; counted from 1.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub seam: Seam,
    pub call: u64,
    pub when: When,
}

/// What is looked at before a call of [`Files`], and before a door accepts: the call's name and its path. It may panic.
pub type Look = Arc<dyn Fn(&str, &Path) + Send + Sync>;

/// What looks at all that leaves a life: where it goes, and the bytes.
pub type Spy = Arc<dyn Fn(&str, &[u8]) + Send + Sync>;

/// Bytes of a stream that are looked at once more, with those that follow.
const OVERLAP_BYTES: usize = 256;

/// One life. Clones are the same one.
#[derive(Clone)]
pub struct Life(Arc<Inner>);

struct Inner {
    dead: CancellationToken,
    end: Option<End>,
    look: Option<Look>,
    spy: Option<Spy>,
    calls: Mutex<[u64; 3]>,
    held: Mutex<Vec<Held>>,
}

/// Something of the world that a process holds.
enum Held {
    Stream(Weak<Mutex<Option<Box<dyn Stream>>>>),
    Door(Weak<Mutex<Option<Box<dyn DoorListener>>>>),
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Life {
    /// A life that ends at this call, or when somebody ends it.
    pub fn new(end: Option<End>, look: Option<Look>) -> Self {
        Self(Arc::new(Inner {
            dead: CancellationToken::new(),
            end,
            look,
            spy: None,
            calls: Mutex::default(),
            held: Mutex::default(),
        }))
    }

    /// The same life, looked at by `spy` from its begin.
    pub fn spied_on(mut self, spy: Spy) -> Self {
        Arc::get_mut(&mut self.0).expect("nobody else has it yet").spy = Some(spy);
        self
    }

    fn spy(&self, place: &str, bytes: &[u8]) {
        if let Some(spy) = &self.0.spy {
            spy(place, bytes);
        }
    }

    /// The end, at once.
    pub fn kill(&self) {
        self.0.dead.cancel();
        for held in std::mem::take(&mut *lock(&self.0.held)) {
            match held {
                Held::Stream(slot) => drop(slot.upgrade().and_then(|slot| lock(&slot).take())),
                Held::Door(slot) => drop(slot.upgrade().and_then(|slot| lock(&slot).take())),
            }
        }
    }

    pub fn is_over(&self) -> bool {
        self.0.dead.is_cancelled()
    }

    /// Waits for the end.
    pub async fn over(&self) {
        self.0.dead.cancelled().await;
    }

    /// Calls of this seam so far.
    pub fn calls(&self, seam: Seam) -> u64 {
        lock(&self.0.calls)[seam as usize]
    }

    /// One call of this life: it happens, or the end comes before or after it.
    async fn call<T>(&self, seam: Seam, call: impl Future<Output = T>) -> T {
        let number = {
            let mut calls = lock(&self.0.calls);
            calls[seam as usize] += 1;
            calls[seam as usize]
        };
        let end = self.0.end.filter(|end| end.seam == seam && end.call == number).map(|end| end.when);
        if end == Some(When::Before) {
            self.kill();
        }
        let result = tokio::select! {
            biased;
            // The dead do nothing. Dropping the call closes what it had open.
            () = self.over() => pending().await,
            result = call => result,
        };
        if end == Some(When::After) {
            self.kill();
            pending().await
        }
        result
    }

    fn stream(&self, stream: Box<dyn Stream>) -> Box<dyn Stream> {
        let slot = Arc::new(Mutex::new(Some(stream)));
        self.hold(Held::Stream(Arc::downgrade(&slot)));
        Box::new(MortalStream { life: self.clone(), slot, written: Vec::new() })
    }

    fn hold(&self, held: Held) {
        let mut all = lock(&self.0.held);
        all.retain(|held| match held {
            Held::Stream(slot) => slot.strong_count() > 0,
            Held::Door(slot) => slot.strong_count() > 0,
        });
        all.push(held);
    }

    /// The seams as this life sees them.
    pub fn files(&self, files: Arc<dyn Files>) -> Arc<dyn Files> {
        Arc::new(MortalFiles { life: self.clone(), files })
    }

    pub fn host(&self, hypervisor: Arc<dyn Hypervisor>, paths: Arc<dyn Paths>) -> Host {
        let hypervisor = MortalHypervisor { life: self.clone(), hypervisor };
        Host::new(Arc::new(hypervisor), Arc::new(MortalPaths { life: self.clone(), paths }))
    }

    pub fn listen(&self, listen: Arc<dyn Listen>) -> Arc<dyn Listen> {
        Arc::new(MortalListen { life: self.clone(), listen })
    }

    pub fn egress(&self, egress: Arc<dyn Egress>) -> Arc<dyn Egress> {
        Arc::new(MortalEgress { life: self.clone(), egress })
    }

    pub fn transport(&self, opener: Arc<dyn OpenTransport>) -> Arc<dyn OpenTransport> {
        Arc::new(MortalOpener { life: self.clone(), opener })
    }
}

struct MortalStream {
    life: Life,
    slot: Arc<Mutex<Option<Box<dyn Stream>>>>,
    /// The last bytes that went out.
    written: Vec<u8>,
}

impl AsyncRead for MortalStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        lock(&self.slot).as_mut().map_or(Poll::Pending, |stream| Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for MortalStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = lock(&self.slot).as_mut().map_or(Poll::Pending, |stream| Pin::new(stream).poll_write(cx, bytes));
        if let (Poll::Ready(Ok(count)), true) = (&polled, self.life.0.spy.is_some()) {
            self.written.extend_from_slice(&bytes[..*count]);
            self.life.spy("a byte to a machine", &self.written);
            let done = self.written.len().saturating_sub(OVERLAP_BYTES);
            self.written.drain(..done);
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.slot).as_mut().map_or(Poll::Pending, |stream| Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.slot).as_mut().map_or(Poll::Pending, |stream| Pin::new(stream).poll_shutdown(cx))
    }
}

struct MortalDoor {
    life: Life,
    slot: Arc<Mutex<Option<Box<dyn DoorListener>>>>,
}

impl DoorListener for MortalDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            if let Some(look) = self.life.0.look.as_ref().filter(|_| !self.life.is_over()) {
                look("accept", Path::new(""));
            }
            // Accepting is cancel safe, so each poll may begin anew.
            let accepted = poll_fn(|cx| match lock(&self.slot).as_mut() {
                Some(door) => door.accept().as_mut().poll(cx),
                None => Poll::Pending,
            });
            Ok(self.life.stream(accepted.await?))
        })
    }
}

struct MortalFiles {
    life: Life,
    files: Arc<dyn Files>,
}

impl MortalFiles {
    fn call<'a, T: Send + 'a>(
        &'a self,
        what: &'static str,
        path: &'a Path,
        call: impl Future<Output = T> + Send + 'a,
    ) -> BoxFuture<'a, T> {
        Box::pin(async move {
            if let Some(look) = self.life.0.look.as_ref().filter(|_| !self.life.is_over()) {
                look(what, path);
            }
            self.life.call(Seam::Files, call).await
        })
    }
}

// Each call is made inside `async move`, so that nothing of it happens before the end may come.
impl Files for MortalFiles {
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.call("read", path, async move { self.files.read(path, bytes_max).await })
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.call("read_at", path, async move { self.files.read_at(path, offset, bytes).await })
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        self.life.spy(&format!("a file, {}", path.display()), &bytes);
        self.call("replace", path, async move { self.files.replace(path, bytes).await })
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: Bytes) -> BoxFuture<'a, io::Result<()>> {
        self.life.spy(&format!("a file, {}", path.display()), &bytes);
        self.call("write_at", path, async move { self.files.write_at(path, offset, bytes).await })
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("sync", path, async move { self.files.sync(path).await })
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        self.call("length", path, async move { self.files.length(path).await })
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("create_dir", path, async move { self.files.create_dir(path).await })
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("remove", path, async move { self.files.remove(path).await })
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call("rename", from, async move { self.files.rename(from, to).await })
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        self.call("list", path, async move { self.files.list(path).await })
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        self.call("free_bytes", path, async move { self.files.free_bytes(path).await })
    }
}

struct MortalHypervisor {
    life: Life,
    hypervisor: Arc<dyn Hypervisor>,
}

impl MortalHypervisor {
    fn call<'a, T: Send + 'a>(&'a self, call: impl Future<Output = T> + Send + 'a) -> BoxFuture<'a, T> {
        Box::pin(self.life.call(Seam::Hypervisor, call))
    }
}

impl Hypervisor for MortalHypervisor {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        self.call(async move { self.hypervisor.probe().await })
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        self.life.spy("what a machine is started from", format!("{spec:?}").as_bytes());
        if let Ok(xml) = dayfly::vm::domain_xml::write(spec, None) {
            self.life.spy("a machine's XML", xml.as_bytes());
        }
        self.call(async move { self.hypervisor.start(spec).await })
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        self.call(async move { self.hypervisor.state(name).await })
    }

    fn usage<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Usage> {
        self.call(async move { self.hypervisor.usage(name).await })
    }

    fn can_freeze(&self) -> bool {
        self.hypervisor.can_freeze()
    }

    fn freeze<'a>(&'a self, name: &'a VmName, state: &'a Path) -> BoxFuture<'a, Result<[u8; 32], VmError>> {
        self.call(async move { self.hypervisor.freeze(name, state).await })
    }

    fn go_on<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        self.call(async move { self.hypervisor.go_on(name).await })
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        self.call(async move { self.hypervisor.destroy(name).await })
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        self.call(async move { self.hypervisor.list(installation).await })
    }
}

struct MortalPaths {
    life: Life,
    paths: Arc<dyn Paths>,
}

impl MortalPaths {
    fn call<'a, T: Send + 'a>(&'a self, call: impl Future<Output = T> + Send + 'a) -> BoxFuture<'a, T> {
        Box::pin(self.life.call(Seam::Hypervisor, call))
    }
}

impl Paths for MortalPaths {
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call(async move { self.paths.make_passable(dir).await })
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call(async move { self.paths.make_private(dir).await })
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        self.call(async move { self.paths.make_overlay(overlay, base, disk_gib).await })
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.call(async move { self.paths.unlink(path).await })
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        self.call(async move { self.paths.unlink_all_of(dir, vm).await })
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.call(async move { self.paths.names(dir).await })
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.call(async move { Ok(self.life.stream(self.paths.open_socket(socket).await?)) })
    }
}

struct MortalListen {
    life: Life,
    listen: Arc<dyn Listen>,
}

// Counted with the hypervisor's calls: a life may end at each of both.
impl Listen for MortalListen {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(self.life.call(Seam::Hypervisor, async move {
            let slot = Arc::new(Mutex::new(Some(self.listen.listen(address).await?)));
            self.life.hold(Held::Door(Arc::downgrade(&slot)));
            Ok(Box::new(MortalDoor { life: self.life.clone(), slot }) as Box<dyn DoorListener>)
        }))
    }
}

struct MortalEgress {
    life: Life,
    egress: Arc<dyn Egress>,
}

// Counted with the hypervisor's calls, too, but for the wait, which has no effect.
impl Egress for MortalEgress {
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>> {
        Box::pin(self.life.call(Seam::Hypervisor, async move { self.egress.ensure(of, terms).await }))
    }

    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            tokio::select! {
                biased;
                () = self.life.over() => pending().await,
                () = self.egress.gone(of) => {}
            }
        })
    }

    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>> {
        Box::pin(self.life.call(Seam::Hypervisor, async move { self.egress.audit(of).await }))
    }

    fn end<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.life.call(Seam::Hypervisor, async move { self.egress.end(of).await }))
    }
}

struct MortalOpener {
    life: Life,
    opener: Arc<dyn OpenTransport>,
}

impl OpenTransport for MortalOpener {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        let transport = self.opener.open(endpoint)?;
        Ok(Arc::new(MortalTransport { life: self.life.clone(), transport }))
    }
}

struct MortalTransport {
    life: Life,
    transport: Arc<dyn Transport>,
}

impl Transport for MortalTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let (life, transport) = (self.life.clone(), self.transport.clone());
        Box::pin(async move { life.call(Seam::GitLab, async move { transport.call(call).await }).await })
    }
}
