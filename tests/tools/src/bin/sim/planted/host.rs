//! Mistakes at the hypervisor, at doors and at the guests' channels.

use super::Bug;
use crate::mortal::Life;
use dayfly::BoxFuture;
use dayfly::network::{DoorListener, Egress, EgressError, EgressOf, Listen, Terms};
use dayfly::vm::paths::Paths;
use dayfly::vm::{HostInfo, Hypervisor, InstallationId, Stream, VmError, VmName, VmSpec, VmState, VmSummary};
use dayfly_doubles::fake::{FakeHypervisor, Op};
use dayfly_egress::audit::Destination;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A hypervisor, and what lies beside its machines, with a bug before them.
pub(super) struct Host {
    pub(super) bug: Bug,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) paths: Arc<dyn Paths>,
    pub(super) fake: FakeHypervisor,
    /// One that the daemon holds.
    pub(super) runner_token: String,
    /// Overlays of machines that could not be made.
    pub(super) not_made: Mutex<BTreeSet<String>>,
}

impl Host {
    /// What may have failed for all that anybody cares.
    fn given_up<E>(&self, result: Result<(), E>) -> Result<(), E> {
        if self.bug == Bug::DestroyGivenUp { Ok(()) } else { result }
    }

    fn not_made(&self, path: &Path) -> bool {
        let not_made = self.not_made.lock().unwrap_or_else(PoisonError::into_inner);
        path.file_stem().and_then(|name| name.to_str()).is_some_and(|name| not_made.contains(name))
    }
}

impl Hypervisor for Host {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        self.hypervisor.probe()
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            let started = self.hypervisor.start(spec).await;
            if started.is_err() {
                let name = VmName::from(spec.id.clone()).to_string();
                self.not_made.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
            }
            started
        })
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        self.hypervisor.state(name)
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move { self.given_up(self.hypervisor.destroy(name).await) })
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        Box::pin(async move {
            let mut list = self.hypervisor.list(installation).await?;
            match self.bug {
                Bug::ForeignReaped => {
                    let all = self.fake.vms().into_iter();
                    let foreign = all.filter(|(spec, _)| spec.installation != *installation);
                    list.extend(foreign.map(|(spec, state)| VmSummary { name: VmName::from(spec.id), state }));
                }
                Bug::ListIgnored => list.iter_mut().for_each(|vm| vm.state = VmState::Running),
                _ => {}
            }
            Ok(list)
        })
    }
}

impl Paths for Host {
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.paths.make_passable(dir)
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.paths.make_private(dir)
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        self.paths.make_overlay(overlay, base, disk_gib)
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            if self.bug == Bug::LeakedOverlay && self.not_made(path) {
                return Ok(());
            }
            self.given_up(self.paths.unlink(path).await)
        })
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { self.given_up(self.paths.unlink_all_of(dir, vm).await) })
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        match self.bug {
            Bug::LeakedOverlay => Box::pin(std::future::ready(Ok(Vec::new()))),
            _ => self.paths.names(dir),
        }
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = self.paths.open_socket(socket).await?;
            let is_channel = Op::of_socket(socket).is_some_and(|(op, _)| op == Op::OpenChannel);
            if self.bug != Bug::RunnerTokenToGuest || !is_channel {
                return Ok(stream);
            }
            Ok(Box::new(Telling { stream, token: self.runner_token.clone(), waiting: Vec::new() }) as Box<dyn Stream>)
        })
    }
}

/// Egress that nobody ends.
pub(super) struct LeftAlone(pub(super) Arc<dyn Egress>);

impl Egress for LeftAlone {
    fn ensure<'a>(&'a self, of: &'a EgressOf, terms: &'a Terms) -> BoxFuture<'a, Result<(), EgressError>> {
        self.0.ensure(of, terms)
    }

    fn gone<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, ()> {
        self.0.gone(of)
    }

    fn audit<'a>(&'a self, of: &'a EgressOf) -> BoxFuture<'a, io::Result<Vec<Destination>>> {
        self.0.audit(of)
    }

    fn end<'a>(&'a self, _of: &'a EgressOf) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Doors that nobody closes.
pub(super) struct Doors {
    pub(super) listen: Arc<dyn Listen>,
    pub(super) life: Life,
}

impl Listen for Doors {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move {
            let door = Some(self.listen.listen(address).await?);
            Ok(Box::new(LeftOpen { door, life: self.life.clone() }) as Box<dyn DoorListener>)
        })
    }
}

/// A door that nobody closes before its daemon is gone.
struct LeftOpen {
    door: Option<Box<dyn DoorListener>>,
    life: Life,
}

impl DoorListener for LeftOpen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        match &mut self.door {
            Some(door) => door.accept(),
            None => Box::pin(std::future::pending()),
        }
    }
}

impl Drop for LeftOpen {
    fn drop(&mut self) {
        if !self.life.is_over() {
            std::mem::forget(self.door.take());
        }
    }
}

/// How all tokens of runners begin, and what follows.
const TOKEN: &[u8] = b"glrt-";
fn is_of_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// A guest channel whose guest is told this token in place of its own.
struct Telling {
    stream: Box<dyn Stream>,
    token: String,
    /// Taken, and not written yet.
    waiting: Vec<u8>,
}

impl Telling {
    fn told(&self, bytes: &[u8]) -> Vec<u8> {
        let Some(at) = bytes.windows(TOKEN.len()).position(|window| window == TOKEN) else { return bytes.to_vec() };
        let end = bytes[at..].iter().position(|byte| !is_of_token(*byte)).map_or(bytes.len(), |length| at + length);
        [&bytes[..at], self.token.as_bytes(), &bytes[end..]].concat()
    }

    fn write_waiting(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.waiting.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.waiting))?;
            self.waiting.drain(..count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Telling {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Telling {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.write_waiting(cx))?;
        self.waiting = self.told(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_waiting(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_waiting(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
