//! The hypervisor: each call is told, fails where a fault strikes, and is where some lives end.

use crate::event::Event;
use crate::kinds::Kind as K;
use crate::story::Story;
use dayfly::BoxFuture;
use dayfly::network::{DoorListener, Egress, EgressError, EgressOf, Listen, Terms};
use dayfly::vm::paths::Paths;
use dayfly::vm::{HostInfo, Hypervisor, InstallationId, Stream, VmError, VmName, VmSpec, VmState, VmSummary};
use dayfly_doubles::fake::{FakeHypervisor, Fault, Op};
use dayfly_egress::audit::Destination;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::sleep;

/// The fake hypervisor and what lies beside its machines, seen by the story.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) fake: FakeHypervisor,
    pub(crate) story: Story,
}

/// What puts faults on calls, inside the fake.
pub(crate) fn judge(story: &Story) -> impl FnMut(Op, &str) -> Option<Fault> + Send + 'static {
    let story = story.clone();
    move |op, _| {
        let mut inner = story.inner();
        let refused = |why| Some(Fault::Refused(why));
        match op {
            Op::CreateOverlay if inner.strikes(K::OverlayRefused) => refused("no space left on device"),
            Op::CreateOverlay if inner.strikes(K::OverlayHangs) => Some(Fault::Hangs),
            Op::Start if inner.strikes(K::CreateRefused) => refused("cannot allocate memory"),
            Op::Start if inner.strikes(K::CreateHangs) => {
                Some(if inner.dice().chance(500) { Fault::Hangs } else { Fault::HangsAfterEffect })
            }
            Op::Start if inner.strikes(K::CreateAnswerLost) => Some(Fault::AnswerLost),
            Op::Destroy if inner.strikes(K::DestroyFails) => refused("device or resource busy"),
            Op::Destroy if inner.strikes(K::DestroyHangs) => {
                Some(if inner.dice().chance(500) { Fault::Hangs } else { Fault::HangsAfterEffect })
            }
            Op::BeginEgress if inner.strikes(K::EgressRefused) => refused("resource temporarily unavailable"),
            Op::BeginEgress if inner.strikes(K::EgressHangs) => Some(Fault::Hangs),
            Op::List if inner.strikes(K::ListHangs) => Some(Fault::Hangs),
            Op::Listen if inner.strikes(K::FdShort) => Some(Fault::Unreachable),
            Op::State | Op::List | Op::ListOverlays | Op::OpenChannel | Op::OpenConsole | Op::RemoveSockets
                if inner.strikes(K::LibvirtBlips) =>
            {
                Some(if inner.dice().chance(500) { Fault::Unreachable } else { Fault::Refused("injected") })
            }
            _ => None,
        }
    }
}

impl Host {
    async fn call<T, E>(
        &self,
        op: Op,
        subject: String,
        spec: Option<&VmSpec>,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.story.tell(&Event::Calls { op, subject: &subject, spec });
        let result = if op == Op::Start && self.story.armed() == Some(K::KillK8) {
            tokio::select! {
                biased;
                // The call is begun, so it takes effect, and the life ends before its answer.
                result = call => result,
                () = async { tokio::time::sleep(Duration::from_millis(1)).await; self.story.point(K::KillK8).await } => {
                    std::future::pending().await
                }
            }
        } else {
            call.await
        };
        self.story.tell(&Event::Called { op, subject: &subject, ok: result.is_ok() });
        let point = match op {
            Op::CreateOverlay => Some(K::KillK5),
            Op::Listen => Some(K::KillK7),
            Op::Start => Some(K::KillK9),
            Op::Destroy => Some(K::KillK16),
            Op::RemoveOverlay => Some(K::KillK17),
            _ => None,
        };
        if let Some(point) = point.filter(|point| result.is_ok() && self.story.armed() == Some(*point)) {
            self.story.point(point).await;
        }
        result
    }
}

impl Host {
    /// Connects to a door's port, which is looked for from before its VM is there. Some of what is opened breaks off.
    async fn open_door(&self, socket: &Path) -> io::Result<Box<dyn Stream>> {
        let stream = self.fake.open_socket(socket).await?;
        if self.story.strikes(K::FdShort) {
            return Err(io::Error::other("too many open files"));
        }
        if !self.story.strikes(K::WireCut) {
            return Ok(stream);
        }
        let bytes = {
            let mut inner = self.story.inner();
            // In the handshake, in the first requests, in what follows.
            let most = *inner.dice().pick(&[100, 20_000, 200_000]);
            inner.dice().range(0, most)
        };
        Ok(Box::new(Cut { stream: Some(stream), left: usize::try_from(bytes).unwrap_or(0) }))
    }
}

/// A connection that breaks off after so many bytes, whichever way they went.
struct Cut {
    stream: Option<Box<dyn Stream>>,
    left: usize,
}

impl Cut {
    /// The stream, while it holds.
    fn stream(&mut self) -> io::Result<Pin<&mut Box<dyn Stream>>> {
        if self.left == 0 {
            self.stream = None;
        }
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncRead for Cut {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(self.stream()?.poll_read(cx, into))?;
        self.left = self.left.saturating_sub(into.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Cut {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let most = bytes.len().min(self.left.max(1));
        let written = ready!(self.stream()?.poll_write(cx, &bytes[..most]))?;
        self.left = self.left.saturating_sub(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

impl Hypervisor for Host {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(self.call(Op::Probe, String::new(), None, async move { self.fake.probe().await }))
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        let subject = VmName::from(spec.id.clone()).to_string();
        Box::pin(self.call(Op::Start, subject, Some(spec), async move { self.fake.start(spec).await }))
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        Box::pin(self.call(Op::State, name.to_string(), None, async move { self.fake.state(name).await }))
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(self.call(Op::Destroy, name.to_string(), None, async move { self.fake.destroy(name).await }))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        Box::pin(self.call(Op::List, String::new(), None, async move { self.fake.list(installation).await }))
    }
}

impl Egress for Host {
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>> {
        let subject = VmName::from(of.vm.clone()).to_string();
        Box::pin(self.call(Op::BeginEgress, subject, None, async move {
            Egress::ensure(&self.fake, of, terms).await?;
            if self.story.strikes(K::EgressStays) {
                self.fake.hang_egress(&of.vm, false);
            }
            Ok(())
        }))
    }

    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if self.story.strikes(K::EgressDies) {
                let after = self.story.inner().dice().range(0, 60_000);
                tokio::select! {
                    biased;
                    () = self.fake.gone(of) => return,
                    () = sleep(Duration::from_millis(after)) => self.fake.kill_egress(&of.vm),
                }
            }
            self.fake.gone(of).await;
        })
    }

    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>> {
        Box::pin(async move {
            if self.story.strikes(K::AuditFails) {
                // Or it takes so long that nobody waits for it.
                let after = self.story.inner().dice().range(0, 1000);
                sleep(Duration::from_millis(after)).await;
                return Err(io::Error::other("injected"));
            }
            self.fake.audit(of).await
        })
    }

    fn end<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>> {
        let subject = VmName::from(of.vm.clone()).to_string();
        Box::pin(self.call(Op::EndEgress, subject, None, async move { self.fake.end(of).await }))
    }
}

impl Listen for Host {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(self.call(Op::Listen, address.to_string(), None, async move {
            if self.story.strikes(K::PortTaken) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            let door = self.fake.listen(address).await?;
            Ok(Box::new(Door { door, story: self.story.clone() }) as Box<dyn DoorListener>)
        }))
    }
}

impl Paths for Host {
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.fake.make_passable(dir)
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.fake.make_private(dir)
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        let subject = overlay.display().to_string();
        Box::pin(self.call(Op::CreateOverlay, subject, None, async move {
            self.fake.make_overlay(overlay, base, disk_gib).await
        }))
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let subject = path.display().to_string();
        Box::pin(self.call(Op::RemoveOverlay, subject, None, async move { self.fake.unlink(path).await }))
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        let call = async move { self.fake.unlink_all_of(dir, vm).await };
        Box::pin(self.call(Op::RemoveSockets, vm.to_string(), None, call))
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        Box::pin(self.call(Op::ListOverlays, String::new(), None, async move { self.fake.names(dir).await }))
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let (op, vm) = Op::of_socket(socket).ok_or(io::ErrorKind::NotFound)?;
            if op == Op::OpenDoor {
                return self.open_door(socket).await;
            }
            self.call(op, vm.to_string(), None, async move { self.fake.open_socket(socket).await }).await
        })
    }
}

/// A listener that runs out of file descriptors now and then.
struct Door {
    door: Box<dyn DoorListener>,
    story: Story,
}

impl DoorListener for Door {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let stream = self.door.accept().await?;
            if self.story.strikes(K::FdShort) {
                // The connection is lost with it here; its guest tries again.
                return Err(io::Error::other("too many open files"));
            }
            Ok(stream)
        })
    }
}
