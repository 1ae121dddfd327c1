//! One connection of a job: is it made, and how do its bytes go both ways?
//!
//! ```text
//! asked ─► decided ─► connected (20 s) ─► 200, then bytes ─► both ways have ended
//!             └ 403       └ 502, 504          └ a reset of either side is a reset of the other
//! ```
//!
//! In constant memory: of what comes from the guest no more than the stream's window is held, for only what the far side
//! took is released; of what comes from the far side only as much is read as the guest has room for, into memory that all
//! streams share. What a hello asks for is looked at before a byte of it leaves.

use crate::audit::Destination;
use crate::hello::{self, Hello};
use crate::policy::{Mode, Reason, Verdict};
use crate::rate::Waiting;
use crate::serve::Vm;
use bytes::Bytes;
use dayfly_wire::{Asked, Reading, Writing};
use rustix::net::sockopt::{
    set_socket_keepalive, set_socket_linger, set_socket_recv_buffer_size, set_socket_send_buffer_size,
};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

/// For a place, if there is none, and for the far end to answer.
const CONNECT: Duration = Duration::from_secs(20);

/// For the rest of a hello that has begun.
const HELLO: Duration = Duration::from_secs(10);

/// What the kernel may hold for a connection each way, of which it takes twice as much (socket(7)), if there are so many
/// already. It would else hold up to some megabytes for each that stands still, and that memory is the host's; who has
/// few connections gets its speed over long ways.
const KERNEL_BYTES: [(usize, usize); 2] = [(128, 32 * 1024), (16, 256 * 1024)];

/// Bytes that are read at once from a far end at most.
pub(crate) const CHUNK: usize = 32 * 1024;

/// What a guest is answered: see `dayfly_wire::Stream::accepted`.
const REFUSED: u16 = 403;
const UNREACHABLE: u16 = 502;
const LATE: u16 = 504;
const NO_TARGET: u16 = 400;

/// Reads what a stream is for: `a.b.c.d:port` or `[v6]:port`; `None`: it is for nothing that is reached.
#[must_use]
pub fn target(authority: &str) -> Option<SocketAddr> {
    // A scope would choose an interface of the host.
    let address: SocketAddr = authority.parse().ok().filter(|_| !authority.contains('%'))?;
    (address.port() != 0).then(|| SocketAddr::new(crate::policy::canonical(address.ip()), address.port()))
}

/// Serves one stream of the guest that is for a far end.
pub(crate) async fn serve(vm: Rc<Vm>, mut asked: Asked) {
    let Some(to) = target(asked.authority()) else { return asked.refuse(NO_TARGET) };
    let connecting = async { timeout(CONNECT, connect(&vm, to)).await.unwrap_or(Err(Failed::Late)) };
    let connected = tokio::select! {
        // A connection that stands although nobody waits for it any more is closed below.
        biased;
        connected = connecting => connected,
        () = asked.given_up() => return,
    };
    let (tcp, permit) = match connected {
        Ok(connected) => connected,
        Err(failed) => {
            let name = vm.dns.names_of(to.ip()).into_iter().next();
            vm.notes.note(name.as_deref(), to, |destination| match failed {
                Failed::Refused(reason) => destination.refuse(reason),
                Failed::Unreachable | Failed::Late => destination.failed += 1,
            });
            return asked.refuse(match failed {
                Failed::Refused(_) => REFUSED,
                Failed::Unreachable => UNREACHABLE,
                Failed::Late => LATE,
            });
        }
    };
    let Some((reading, writing)) = asked.accept_halves() else { return };
    let mut copy = Copy::new(vm, to, tcp, reading, writing);
    let outcome = poll_fn(|cx| copy.poll(cx)).await;
    copy.close(&outcome);
    drop(permit);
}

/// Why there is no connection.
#[derive(Clone, Copy)]
enum Failed {
    Refused(Reason),
    Unreachable,
    Late,
}

async fn connect(vm: &Vm, to: SocketAddr) -> Result<(TcpStream, OwnedSemaphorePermit), Failed> {
    let names = vm.dns.names_of(to.ip());
    let names: Vec<&str> = names.iter().map(|name| &**name).collect();
    let verdict = if is_own(to) {
        vm.policy.check_own(to.ip(), to.port(), &names)
    } else {
        vm.policy.check(to.ip(), to.port(), &names)
    };
    if let Verdict::Refused(reason) = verdict {
        return Err(Failed::Refused(reason));
    }
    let permit = Arc::clone(&vm.connections).acquire_owned().await.map_err(|_| Failed::Late)?;
    crate::rate::Bucket::take(&vm.connects, 1).await;
    let tcp = TcpStream::connect(to).await.map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => Failed::Late,
        _ => Failed::Unreachable,
    })?;
    // Without them it works as well.
    let _ = tcp.set_nodelay(true);
    let _ = set_socket_keepalive(&tcp, true);
    if let Some((_, bytes)) = KERNEL_BYTES.iter().find(|(from, _)| vm.open.get() >= *from) {
        let _ = set_socket_send_buffer_size(&tcp, *bytes);
        let _ = set_socket_recv_buffer_size(&tcp, *bytes);
    }
    Ok((tcp, permit))
}

/// Whether this address is one of the host's now: what is sent there would come from there.
fn is_own(to: SocketAddr) -> bool {
    let from = crate::dns::resolvers::udp_to(to).and_then(|socket| socket.local_addr());
    from.is_ok_and(|from| from.ip() == to.ip())
}

/// A connection's bytes, both ways.
struct Copy {
    vm: Rc<Vm>,
    to: SocketAddr,
    tcp: TcpStream,
    reading: Reading,
    writing: Option<Writing>,
    /// Came from the guest, and not taken by the far side.
    pending: VecDeque<u8>,
    /// Of them, looked at as a hello; and until when there must be a whole one. `None`: decided.
    hello: Option<HelloWait>,
    guest_ended: bool,
    /// The far side was told so.
    up_ended: bool,
    down_ended: bool,
    up_wait: Waiting,
    down_wait: Waiting,
    /// In the audit.
    place: Option<usize>,
    finished: bool,
}

#[derive(Default)]
struct HelloWait {
    begun: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

impl Copy {
    fn new(vm: Rc<Vm>, to: SocketAddr, tcp: TcpStream, reading: Reading, writing: Writing) -> Self {
        vm.open.set(vm.open.get() + 1);
        Self {
            vm,
            to,
            tcp,
            reading,
            writing: Some(writing),
            pending: VecDeque::new(),
            hello: Some(HelloWait::default()),
            guest_ended: false,
            up_ended: false,
            down_ended: false,
            up_wait: Waiting::default(),
            down_wait: Waiting::default(),
            place: None,
            finished: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let up = self.poll_up(cx)?;
        let down = self.poll_down(cx)?;
        if up.is_ready() && down.is_ready() {
            return Poll::Ready(Ok(()));
        }
        // Where a way waits for the far side, nothing else would tell that the guest has gone.
        if let Some(writing) = &mut self.writing
            && !self.down_ended
            && let Poll::Ready(error) = writing.poll_reset(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Pending
    }

    /// From the guest to the far side.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            // All that has come: in one piece it is less than in many small ones, of which the wire bears few.
            while !self.guest_ended {
                match self.reading.poll_bytes(cx)? {
                    Poll::Ready(bytes) if bytes.is_empty() => self.guest_ended = true,
                    Poll::Ready(bytes) => self.keep(&bytes),
                    Poll::Pending => break,
                }
            }
            if self.up_ended {
                return Poll::Ready(Ok(()));
            }
            std::task::ready!(self.poll_hello(cx))?;
            if self.pending.is_empty() {
                if !self.guest_ended {
                    return Poll::Pending;
                }
                self.up_ended = true;
                // Fails where the far side has gone already, which its own way tells.
                let _ = rustix::net::shutdown(&self.tcp, rustix::net::Shutdown::Write);
                continue;
            }
            let (front, _) = self.pending.as_slices();
            let room = std::task::ready!(self.up_wait.poll(cx, self.vm.bytes.as_ref(), front.len()));
            std::task::ready!(self.tcp.poll_write_ready(cx))?;
            match self.tcp.try_write(&front[..room]) {
                Ok(count) => {
                    self.pending.drain(..count);
                    if self.pending.is_empty() {
                        // Nothing is held for a stream that is at rest.
                        self.pending = VecDeque::new();
                    }
                    self.reading.release(count);
                    self.count(count, |destination, count| destination.up += count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Keeps what came, in a ring that never holds more than the stream's window, and is not larger.
    fn keep(&mut self, bytes: &[u8]) {
        let wanted = self.pending.len() + bytes.len();
        if wanted > self.pending.capacity() {
            let size = self.vm.sizes.iter().copied().find(|size| wanted <= *size).unwrap_or(wanted);
            self.pending.reserve_exact(size - self.pending.len());
        }
        self.pending.extend(bytes);
    }

    /// From the far side to the guest.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let Some(writing) = self.writing.as_mut().filter(|_| !self.down_ended) else { return Poll::Ready(Ok(())) };
            let room = std::task::ready!(writing.poll_room(cx, CHUNK))?;
            let room = std::task::ready!(self.down_wait.poll(cx, self.vm.bytes.as_ref(), room));
            std::task::ready!(self.tcp.poll_read_ready(cx))?;
            let mut scratch = self.vm.scratch.borrow_mut();
            let room = room.min(scratch.len());
            match self.tcp.try_read(&mut scratch[..room]) {
                Ok(0) => {
                    self.down_ended = true;
                    writing.end()?;
                }
                Ok(count) => {
                    writing.send(Bytes::copy_from_slice(&scratch[..count]))?;
                    drop(scratch);
                    self.count(count, |destination, count| destination.down += count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Ready when what has come may leave: it is no hello, or one whose server is allowed.
    fn poll_hello(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(wait) = &mut self.hello else { return Poll::Ready(Ok(())) };
        let enforced = self.vm.policy.mode == Mode::Enforce;
        let mut seen = hello::read(self.pending.make_contiguous());
        if seen == Hello::NotYet {
            if self.pending.is_empty() && !self.guest_ended {
                return Poll::Pending;
            }
            let late = wait.begun.get_or_insert_with(|| Box::pin(tokio::time::sleep(HELLO)));
            if self.guest_ended || late.as_mut().poll(cx).is_ready() {
                seen = if self.pending.is_empty() { Hello::None } else { Hello::Malformed };
            } else {
                return Poll::Pending;
            }
        }
        self.hello = None;
        let (server, verdict) = match seen {
            Hello::Tls(Some(server)) => {
                let verdict = self.vm.policy.server_name(&server, self.to.ip(), self.to.port());
                (Some(server), verdict)
            }
            Hello::Malformed if enforced => (None, Verdict::Refused(Reason::ServerName)),
            _ => (None, Verdict::Allowed),
        };
        let place = self.note(server.as_deref(), |destination| match verdict {
            Verdict::Allowed => destination.connections += 1,
            Verdict::Refused(reason) => destination.refuse(reason),
        });
        self.place = Some(place);
        match verdict {
            Verdict::Allowed => Poll::Ready(Ok(())),
            Verdict::Refused(_) => Poll::Ready(Err(io::ErrorKind::PermissionDenied.into())),
        }
    }

    /// Writes something down, by the name that TLS asks for, or the last one that the VM was told.
    fn note(&self, server: Option<&str>, change: impl FnOnce(&mut Destination)) -> usize {
        let told = self.vm.dns.names_of(self.to.ip()).into_iter().next();
        self.vm.notes.note(server.or(told.as_deref()), self.to, change)
    }

    /// Where it stands in the audit; it may have to be before anything came of the guest.
    fn place(&mut self) -> usize {
        if self.place.is_none() {
            self.place = Some(self.note(None, |_| {}));
        }
        self.place.unwrap_or_default()
    }

    fn count(&mut self, count: usize, add: impl FnOnce(&mut Destination, u64)) {
        if let Some(bytes) = &self.vm.bytes {
            bytes.borrow_mut().charge(count as u64);
        }
        let place = self.place();
        self.vm.notes.count(place, |destination| add(destination, count as u64));
    }

    /// Both ways are over: what was cut on one side is cut on the other.
    fn close(mut self, outcome: &io::Result<()>) {
        if outcome.is_ok() {
            self.finished = true;
        } else if let Some(writing) = self.writing.take() {
            writing.reset();
        }
    }
}

impl Drop for Copy {
    /// Also when the session ends.
    fn drop(&mut self) {
        if !self.finished {
            // An end would tell the far side that it has all.
            let _ = set_socket_linger(&self.tcp, Some(Duration::ZERO));
        }
        let place = self.place();
        if self.hello.is_some() {
            // Nothing came of the guest, or not enough to tell.
            self.vm.notes.count(place, |destination| destination.connections += 1);
        }
        self.vm.notes.mark(place);
        self.vm.open.set(self.vm.open.get() - 1);
    }
}
