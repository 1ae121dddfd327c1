//! The bytes between a greeted connection and hyper: strict heads, time limits, where it all ended.
//!
//! hyper never sees a head before [`super::head`] has passed it whole. To find the heads, this
//! stream follows the framing of each body. A head that is refused is replaced by a harmless one,
//! and the refusal noted; the service answers it. Notes and requests go one by one, in order, so
//! pipelined requests keep their own. Timers run only while we wait for the guest.

use super::chunks::Chunks;
use super::head::{self, Framing, Refusal, Scan};
use crate::metrics::GuestMetrics;
use crate::vm::Stream;
use bytes::{Buf as _, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Stands for a head that was refused. It closes the connection after its answer.
const STAND_IN_HEAD: &[u8] = b"GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n";

/// What the two sides of a connection, stream and service, tell each other. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    /// One per head that went to hyper and whose service call has not begun.
    heads: VecDeque<Option<Refusal>>,
    /// Requests whose answer is not yet with hyper, whole.
    active: usize,
    /// The connection ended otherwise than by a clean end of its input.
    broken: bool,
    hand_out: HandOutState,
}

/// How far the answer that carries the job has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HandOutState {
    #[default]
    None,
    Begun,
    /// All of it is in hyper's buffer.
    Buffered,
    /// All of it is in the kernel's hands.
    Written,
    /// The guest sent another request on this connection: it has read the answer.
    Followed,
}

/// A request that is being served; ends when its answer is with hyper, or was given up.
#[derive(Debug)]
pub struct Active(Notes);

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        // Held for a few lines, never across an await.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request's service call begins: its refusal, if it was refused.
    pub fn begin(&self) -> (Option<Refusal>, Active) {
        // hyper calls the service once for each head that we gave it, or not at all.
        let refusal = self.lock().heads.pop_front().unwrap_or(Some(Refusal::Malformed));
        (refusal, Active(self.clone()))
    }

    /// The answer to the running request carries the job.
    pub(super) fn hand_out_begun(&self) {
        self.lock().hand_out = HandOutState::Begun;
    }

    /// Whether an answer with the job went out on this connection, which has ended, and may never
    /// have been read.
    pub(super) fn hand_out_lost(&self) -> bool {
        let noted = self.lock();
        match noted.hand_out {
            HandOutState::None | HandOutState::Followed => false,
            HandOutState::Begun | HandOutState::Buffered => true,
            HandOutState::Written => noted.broken,
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut noted = self.0.lock();
        noted.active = noted.active.saturating_sub(1);
        if noted.hand_out == HandOutState::Begun {
            noted.hand_out = HandOutState::Buffered;
        }
    }
}

/// Time limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A head, from its first byte.
    pub head: Duration,
    /// From the end of an answer to the next head's first byte.
    pub idle: Duration,
    /// A write that does not go on.
    pub stall: Duration,
}

enum State {
    Head,
    Length(u64),
    Chunked(Chunks),
    /// A head was refused: nothing more is read.
    Refused,
}

/// A greeted connection as hyper sees it.
pub struct Wire {
    stream: Box<dyn Stream>,
    notes: Notes,
    metrics: GuestMetrics,
    times: Times,
    state: State,
    /// Read from the guest, not yet scanned or handed on. Below `HEAD_BYTES_MAX` + one read.
    raw: BytesMut,
    scanned: usize,
    /// A checked head on its way to hyper.
    out: Bytes,
    /// When the first byte of the present head came.
    head_since: Option<Instant>,
    idle_since: Option<Instant>,
    read_timer: Timer,
    write_timer: Timer,
    ended: bool,
}

impl Wire {
    /// `read` are bytes that came behind the greeting.
    pub fn new(stream: Box<dyn Stream>, read: BytesMut, notes: Notes, metrics: GuestMetrics, times: Times) -> Self {
        Self {
            stream,
            notes,
            metrics,
            times,
            state: State::Head,
            raw: read,
            scanned: 0,
            out: Bytes::new(),
            head_since: None,
            idle_since: None,
            read_timer: Timer::default(),
            write_timer: Timer::default(),
            ended: false,
        }
    }

    /// The stream, if the guest may still be there to read what was written.
    pub fn into_stream(self) -> Option<Box<dyn Stream>> {
        if self.ended { None } else { Some(self.stream) }
    }

    /// The guest's end of input (clean), or the end of all (not).
    fn end(&mut self, clean: bool) {
        self.ended = true;
        if !clean {
            self.notes.lock().broken = true;
        }
    }

    /// Reads from the guest into `into`; 0 is its end of input.
    fn poll_guest(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let before = into.filled().len();
        match ready!(Pin::new(&mut self.stream).poll_read(cx, into)) {
            Ok(()) => {
                let count = into.filled().len() - before;
                if count == 0 {
                    self.end(true);
                }
                Poll::Ready(Ok(count))
            }
            Err(error) => {
                self.end(false);
                Poll::Ready(Err(error))
            }
        }
    }

    /// Waits for a head to be whole and checked; then it is in `out`. `false`: the guest has ended.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            if !self.raw.is_empty() {
                self.idle_since = None;
                self.head_since.get_or_insert_with(Instant::now);
            }
            match head::scan(&self.raw, &mut self.scanned) {
                Ok(Scan::Partial) => {}
                Ok(Scan::Whole(length)) => {
                    let head = self.raw.split_to(length).freeze();
                    match head::check(&head) {
                        Ok(framing) => {
                            self.state = match framing {
                                Framing::Length(length) => State::Length(length),
                                Framing::Chunked => State::Chunked(Chunks::new()),
                            };
                            self.pass_on(head, None);
                        }
                        Err(refusal) => self.refuse(refusal),
                    }
                    return Poll::Ready(Ok(true));
                }
                Err(refusal) => {
                    self.refuse(refusal);
                    return Poll::Ready(Ok(true));
                }
            }
            let mut piece = [0; 4096];
            let mut piece = ReadBuf::new(&mut piece);
            match self.poll_guest(cx, &mut piece) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(false)),
                Poll::Ready(Ok(_)) => self.raw.extend_from_slice(piece.filled()),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.poll_patience(cx).map(Err),
            }
        }
    }

    /// Nothing came: is it too long since?
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let (deadline, word) = if let Some(since) = self.head_since {
            (since + self.times.head, "head_timeout")
        } else if self.notes.lock().active == 0 {
            (*self.idle_since.get_or_insert_with(Instant::now) + self.times.idle, "idle")
        } else {
            // An answer is under way, a held poll or a download: it has limits of its own.
            self.idle_since = None;
            return Poll::Pending;
        };
        ready!(self.read_timer.poll(cx, deadline));
        self.metrics.connections_closed.inc(word);
        self.end(true);
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }

    fn pass_on(&mut self, head: Bytes, refusal: Option<Refusal>) {
        self.out = head;
        self.head_since = None;
        self.scanned = 0;
        let mut noted = self.notes.lock();
        noted.heads.push_back(refusal);
        noted.active += 1;
        if noted.hand_out == HandOutState::Written {
            noted.hand_out = HandOutState::Followed;
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.state = State::Refused;
        self.raw.clear();
        self.pass_on(Bytes::from_static(STAND_IN_HEAD), Some(refusal));
    }

    /// Hands body bytes on, up to the end of this body.
    fn poll_body(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = match self.state {
            State::Length(left) => usize::try_from(left).map_or(buf.remaining(), |left| left.min(buf.remaining())),
            _ => buf.remaining(),
        };
        if self.raw.is_empty() {
            let mut piece = ReadBuf::new(buf.initialize_unfilled_to(room));
            let count = ready!(self.poll_guest(cx, &mut piece))?;
            let ours = self.follow(piece.filled())?;
            let beyond = &piece.filled()[ours..];
            self.raw.extend_from_slice(beyond);
            debug_assert!(ours <= count);
            buf.advance(ours);
        } else {
            let room = room.min(self.raw.len());
            let piece = self.raw.split_to(room);
            let ours = self.follow(&piece)?;
            buf.put_slice(&piece[..ours]);
            let mut beyond = BytesMut::from(&piece[ours..]);
            beyond.extend_from_slice(&self.raw);
            self.raw = beyond;
        }
        Poll::Ready(Ok(()))
    }

    /// Counts `piece` as body; returns how much of it is. The state moves on at the body's end.
    fn follow(&mut self, piece: &[u8]) -> io::Result<usize> {
        match &mut self.state {
            State::Length(left) => {
                // Never more than asked for, which was at most what is left.
                *left = left.saturating_sub(piece.len() as u64);
                Ok(piece.len())
            }
            State::Chunked(chunks) => {
                let ours = chunks.follow(piece).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                if chunks.is_done() {
                    self.state = State::Length(0);
                }
                Ok(ours)
            }
            State::Head | State::Refused => Ok(0),
        }
    }

    /// The other half of each write: how long may it stand still?
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match written {
            Poll::Pending => {
                let deadline = self.write_timer.deadline().unwrap_or_else(|| Instant::now() + self.times.stall);
                ready!(self.write_timer.poll(cx, deadline));
                self.metrics.connections_closed.inc("write_stall");
                self.end(false);
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            Poll::Ready(result) => {
                self.write_timer = Timer::default();
                if result.is_err() {
                    self.end(false);
                }
                Poll::Ready(result)
            }
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        loop {
            if !me.out.is_empty() {
                let count = me.out.len().min(buf.remaining());
                buf.put_slice(&me.out[..count]);
                me.out.advance(count);
                return Poll::Ready(Ok(()));
            }
            match me.state {
                State::Length(0) => me.state = State::Head,
                State::Head => {
                    if !ready!(me.poll_head(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                State::Length(_) | State::Chunked(_) => return me.poll_body(cx, buf),
                // Not an end of input: hyper would drop the answer that is under way.
                State::Refused => return Poll::Pending,
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        let written = Pin::new(&mut me.stream).poll_write(cx, bytes);
        me.poll_stall(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        let written = Pin::new(&mut me.stream).poll_write_vectored(cx, slices);
        me.poll_stall(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        let flushed = Pin::new(&mut me.stream).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) {
            // hyper flushes us only once its own buffer is empty.
            let mut noted = me.notes.lock();
            if noted.hand_out == HandOutState::Buffered {
                noted.hand_out = HandOutState::Written;
            }
        }
        me.poll_stall(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A deadline that may move. Polled only while somebody waits.
#[derive(Debug, Default)]
pub(super) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    fn deadline(&self) -> Option<Instant> {
        self.0.as_ref().map(|sleep| sleep.deadline())
    }

    /// Ready once `deadline` has passed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx)
    }
}
