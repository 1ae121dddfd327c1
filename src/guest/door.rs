//! Who comes in? The loop of one VM's door, and the life of each connection.
//!
//! ```text
//! wire ─► session ─► stream ────────────────────────────┐
//! port ─► accept ─► lobby (16, oldest out first) ─► greeting ─► HTTP (64) ─► lingering close
//! ```
//!
//! One task per door, one per connection in its `JoinSet`; all end when the pass is dropped. Only
//! writes to the spool outlive their connection: a write that were dropped half-way could meet the
//! next one in the file.

use super::body::Held;
use super::forward::Forwards;
use super::greeting::{self, Failure};
use super::handler::Handler;
use super::sessions::{Came, Sessions};
use super::wire::{Notes, Times, Wire};
use super::{Admission, GuestEvent, answer};
use crate::network::{DoorListener, Entrance};
use crate::repeats::Repeats;
use crate::vm::Stream;
use bytes::BytesMut;
use dayfly_wire::Asked;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// First pause after a failed accept; doubles up to [`ACCEPT_PAUSE_MAX`]. Without it a process out
/// of file descriptors would spin (threats.md E7).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A guest's first poll after the shortage waits no longer than this.
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// After our last answer so much is still read, so that the answer reaches a guest that was sending
/// (closing with unread bytes resets the connection: threats.md F5).
const LINGER_BYTES: usize = 1024 * 1024;
/// And for so long.
const LINGER: Duration = Duration::from_secs(1);
/// hyper's buffer per direction. Heads are bounded before hyper sees them; artifacts go through in
/// pieces of this size, and 64 KiB costs half the CPU of 16.
const HTTP_BUFFER_BYTES: usize = 64 * 1024;
/// Longest wait for writes to the spool when the door closes; they take milliseconds.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// What all connections of a door share.
struct Door {
    handler: Handler,
    /// See [`super::Limits::connections`].
    connections: Arc<Semaphore>,
    lobby: Lobby,
    greeted: AtomicBool,
    not_accepted: Repeats,
    forwards: Forwards,
}

/// Serves until `stop`. Returns when no task is left.
pub(super) async fn serve(admission: Admission, stop: CancellationToken) {
    let (handler, entrance, forwards) = Handler::new(admission);
    let limits = handler.limits();
    let mut way = match entrance {
        Entrance::Wire(wire) => Way::Wire(Box::new(handler.sessions(wire, !forwards.is_empty()))),
        Entrance::Port(listener) => Way::Port(listener),
    };
    let door = Arc::new(Door {
        connections: Arc::new(Semaphore::new(limits.connections)),
        lobby: Lobby::new(limits.greeting_connections),
        greeted: AtomicBool::new(false),
        not_accepted: Repeats::new("failed to accept at a door"),
        forwards,
        handler,
    });
    let mut tasks = JoinSet::new();
    let mut pause = ACCEPT_PAUSE;
    loop {
        tokio::select! {
            // The stop first, then finished tasks (there are no more than were accepted), then new
            // connections. All three are cancel safe.
            biased;
            () = stop.cancelled() => break,
            Some(ended) = tasks.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!(vm = %door.handler.vm(), "a connection's task panicked");
                }
            }
            comer = way.next() => match comer {
                Ok(Comer::Session) => {
                    tokio::select! {
                        biased;
                        // A job that has no room for the news may wait for this door's end.
                        () = stop.cancelled() => break,
                        () = door.greeted() => {}
                    }
                }
                Ok(Comer::Stream(stream)) => {
                    tasks.spawn(proven(Arc::clone(&door), stream, BytesMut::new()));
                }
                Ok(Comer::Forward(asked, port)) => {
                    let door = Arc::clone(&door);
                    tasks.spawn(async move { door.forwards.serve(asked, port).await });
                }
                Ok(Comer::Stranger(stream)) => {
                    pause = ACCEPT_PAUSE;
                    // Entered here and not in the task, so that the lobby is never fuller than its limit.
                    let seat = door.lobby.enter();
                    tasks.spawn(stranger(Arc::clone(&door), stream, seat));
                }
                Err(error) => {
                    door.handler.metrics().accept_errors.inc();
                    door.not_accepted.log(|line| tracing::warn!(vm = %door.handler.vm(), error = %error, "{line}"));
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(ACCEPT_PAUSE_MAX),
                    }
                }
            },
        }
    }
    drop(way);
    tasks.shutdown().await;
    if timeout(LAST_WRITES, door.handler.writes_end()).await.is_err() {
        tracing::warn!(vm = %door.handler.vm(), "a write to the spool outlives its door");
    }
}

/// How guests come to this door.
enum Way {
    Wire(Box<Sessions>),
    Port(Box<dyn DoorListener>),
}

/// Who comes.
enum Comer {
    /// Nobody yet, but whoever comes next has shown the pass.
    Session,
    /// A connection of a guest that has.
    Stream(Box<dyn Stream>),
    /// A wish of a guest that has, for what its machine has at this port.
    Forward(Asked, u16),
    /// A connection of anybody.
    Stranger(Box<dyn Stream>),
}

impl Way {
    /// Who comes next. Cancel safe.
    async fn next(&mut self) -> std::io::Result<Comer> {
        match self {
            Self::Wire(sessions) => Ok(match sessions.next().await {
                Came::Session => Comer::Session,
                Came::Stream(stream) => Comer::Stream(stream),
                Came::Forward(asked, port) => Comer::Forward(asked, port),
            }),
            Self::Port(listener) => listener.accept().await.map(Comer::Stranger),
        }
    }
}

impl Door {
    /// The guest has shown the pass; the job is told the first time.
    async fn greeted(&self) {
        if !self.greeted.swap(true, Ordering::AcqRel) {
            self.handler.tell(GuestEvent::Greeted).await;
        }
    }
}

/// The life of a connection to a port.
async fn stranger(door: Arc<Door>, mut stream: Box<dyn Stream>, seat: Seat) {
    let Some(read) = greet(&door, &mut *stream, seat).await else { return };
    door.handler.metrics().greetings.inc();
    proven(door, stream, read).await;
}

/// The life of a connection of which we know whose it is.
async fn proven(door: Arc<Door>, stream: Box<dyn Stream>, read: BytesMut) {
    let Ok(_permit) = Arc::clone(&door.connections).try_acquire_owned() else {
        door.handler.metrics().connections_closed.inc("too_many");
        return;
    };
    door.greeted().await;
    http(&door, stream, read).await;
}

/// The greeting, within its time and as long as the seat is not given to somebody newer.
async fn greet(door: &Door, stream: &mut dyn Stream, seat: Seat) -> Option<BytesMut> {
    let failure = tokio::select! {
        // Both end the connection or the greeting for good; nothing is lost by dropping the other.
        biased;
        () = seat.lost.cancelled() => "evicted",
        greeted = timeout_at(seat.since + door.handler.limits().greeting, door.handler.greet(stream)) => match greeted {
            Ok(Ok(read)) => return Some(read),
            Ok(Err(failure)) => failure.word(),
            Err(_) => "late",
        },
    };
    door.handler.metrics().greetings_failed.inc(failure);
    tracing::debug!(vm = %door.handler.vm(), reason = failure, "closed a connection without a greeting");
    None
}

/// HTTP until one side ends it.
async fn http(door: &Arc<Door>, stream: Box<dyn Stream>, read: BytesMut) {
    let limits = door.handler.limits();
    let notes = Notes::default();
    let times = Times { head: limits.head, idle: limits.idle, stall: limits.stall };
    let wire = Wire::new(stream, read, notes.clone(), door.handler.metrics().clone(), times);
    let service = {
        let (door, notes) = (Arc::clone(door), notes.clone());
        service_fn(move |request| Box::pin(answer(Arc::clone(&door), notes.clone(), request)))
    };
    let mut http = http1::Builder::new()
        // The wire keeps the time of heads and pauses; hyper's own timer stands behind it (F3).
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head + limits.idle + Duration::from_secs(1))
        .max_headers(super::head::FIELDS_MAX)
        .max_buf_size(HTTP_BUFFER_BYTES)
        .half_close(false)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(wire), service);
    let ended = poll_fn(|cx| http.poll_without_shutdown(cx)).await;
    // An answer that broke off must look broken off: no friendly end then.
    let cut = ended.is_err_and(|error| error.is_user() || error.is_body_write_aborted());
    let stream = http.into_parts().io.into_inner().into_stream();
    if notes.hand_out_lost() {
        door.handler.tell(GuestEvent::HandOutLost).await;
    }
    if let Some(stream) = stream.filter(|_| !cut) {
        linger(stream).await;
    }
}

/// One request: refused by its head, or handled.
async fn answer(
    door: Arc<Door>,
    notes: Notes,
    request: Request<Incoming>,
) -> Result<Response<impl http_body::Body<Data = bytes::Bytes, Error = crate::gitlab::transport::BodyError>>, Infallible>
{
    let (refusal, active) = notes.begin();
    let answer = match refusal {
        Some(refusal) => answer::closing(door.handler.refuse_head(refusal)),
        None => door.handler.handle(request, &notes).await,
    };
    Ok(answer.map(|body| Held::new(body, active).boxed_unsync()))
}

/// Ends our side, then reads what is still under way, within bounds, so that the guest reads our
/// last answer before it meets a reset.
async fn linger(mut stream: Box<dyn Stream>) {
    let reading = async {
        stream.shutdown().await?;
        let mut piece = vec![0; 16 * 1024];
        let mut left = LINGER_BYTES;
        while left > 0 {
            match stream.read(&mut piece).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        std::io::Result::Ok(())
    };
    // A guest that does not close by then, or resets, has had its chance; nobody else waits.
    let _ = timeout(LINGER, reading).await;
}

/// Connections to a port that have not shown the pass. They may be a neighbour's, so they get
/// few seats, and the oldest loses its seat to the newest.
struct Lobby {
    seats: Arc<Mutex<Seats>>,
    limit: usize,
}

#[derive(Default)]
struct Seats {
    next: u64,
    /// By order of arrival.
    taken: BTreeMap<u64, CancellationToken>,
}

/// A place in the lobby; given back when dropped.
struct Seat {
    number: u64,
    since: Instant,
    lost: CancellationToken,
    seats: Arc<Mutex<Seats>>,
}

impl Lobby {
    fn new(limit: usize) -> Self {
        Self { seats: Arc::default(), limit: limit.max(1) }
    }

    fn enter(&self) -> Seat {
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        while seats.taken.len() >= self.limit {
            if let Some((_, oldest)) = seats.taken.pop_first() {
                oldest.cancel();
            }
        }
        let (number, lost) = (seats.next, CancellationToken::new());
        seats.next += 1;
        seats.taken.insert(number, lost.clone());
        Seat { number, since: Instant::now(), lost, seats: Arc::clone(&self.seats) }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(&self.number);
    }
}

impl Handler {
    /// Greets one connection with a nonce of its own.
    async fn greet(&self, stream: &mut dyn Stream) -> Result<BytesMut, Failure> {
        greeting::greet(stream, self.pass(), self.nonce()).await
    }
}
