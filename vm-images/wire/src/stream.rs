//! One stream of a session: the bytes of one connection of the runner, both ways.
//!
//! `shutdown` ends our way and leaves the other open. A stream that is dropped with something left to say or to hear is
//! reset at the host; at the guest not before the host has answered, for more than 20 resets of streams that a host has
//! not seen yet end its whole session (h2's bound against CVE-2023-44487): what is left of it goes to the session,
//! which says that no more comes, and lets it end ([`Left`]).

use crate::limits::{DRAIN, DRAIN_BYTES};
use bytes::{Buf as _, Bytes};
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::StatusCode;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Sleep, sleep};

/// Bytes that one write takes at most: what is copied, and given to h2, at once.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// Bytes both ways.
pub struct Stream {
    /// `None` once it was left to the session.
    halves: Option<Halves>,
    /// What came and was not read.
    came: Bytes,
    /// Where a guest's stream goes when it is dropped.
    left: Option<mpsc::UnboundedSender<Left>>,
}

/// The two ways of a stream.
pub(crate) struct Halves {
    reading: Reading,
    writing: Writing,
    /// Counts until both sides are done with it.
    _permit: Option<OwnedSemaphorePermit>,
}

/// What comes on a stream, for who says himself when there is room for more.
pub struct Reading {
    receive: Receive,
    /// A host's: by which its session counts its streams.
    _alive: Option<Arc<()>>,
}

/// What is sent on a stream, for who wants to know first how much of it may go. Dropped before [`Writing::end`] it
/// resets the stream.
pub struct Writing {
    send: SendStream<Bytes>,
    /// We have said that no more comes.
    ended: bool,
}

enum Receive {
    /// A guest's, not answered yet.
    Awaited(ResponseFuture),
    Open(RecvStream),
    Ended,
}

impl Stream {
    /// A host's, answered.
    pub(crate) fn of_host(send: SendStream<Bytes>, receive: RecvStream, alive: Arc<()>) -> Self {
        let (reading, writing) = halves(send, receive, alive);
        Self { halves: Some(Halves { reading, writing, _permit: None }), came: Bytes::new(), left: None }
    }

    /// A guest's, not answered yet.
    pub(crate) fn of_guest(
        send: SendStream<Bytes>,
        answer: ResponseFuture,
        permit: OwnedSemaphorePermit,
        left: mpsc::UnboundedSender<Left>,
    ) -> Self {
        let halves = Halves {
            reading: Reading { receive: Receive::Awaited(answer), _alive: None },
            writing: Writing { send, ended: false },
            _permit: Some(permit),
        };
        Self { halves: Some(halves), came: Bytes::new(), left: Some(left) }
    }

    /// Ready once the host has taken it: a session whose host died looks alive until the next one begins, and what is
    /// written before may be lost. At once for a host's own.
    ///
    /// # Errors
    /// The session is over, or the host refuses: [`io::ErrorKind::TimedOut`] if what is behind it did not answer in time
    /// (its 504), [`io::ErrorKind::ConnectionRefused`] for all others.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn accepted(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.halves.as_mut().map_or(Poll::Ready(Ok(())), |halves| halves.reading.poll_accepted(cx))).await
    }

    /// Ends both ways at once, as a connection that breaks does: the other side learns that something may be missing.
    /// A guest's that was not accepted yet is only dropped (see the file).
    pub fn reset(mut self) {
        if let Some(halves) = &mut self.halves
            && !matches!(halves.reading.receive, Receive::Awaited(_))
        {
            halves.writing.send.send_reset(Reason::CANCEL);
            self.halves = None;
        }
    }
}

/// The two ways of a host's stream, answered.
pub(crate) fn halves(send: SendStream<Bytes>, receive: RecvStream, alive: Arc<()>) -> (Reading, Writing) {
    (Reading { receive: Receive::Open(receive), _alive: Some(alive) }, Writing { send, ended: false })
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writing").finish_non_exhaustive()
    }
}

fn broken(error: h2::Error) -> io::Error {
    if error.is_io() {
        error.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())
    } else if error.is_reset() {
        io::Error::new(io::ErrorKind::ConnectionReset, error)
    } else {
        io::Error::new(io::ErrorKind::ConnectionAborted, error)
    }
}

impl Reading {
    fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Receive::Awaited(answer) = &mut self.receive else { return Poll::Ready(Ok(())) };
        let refused = match ready!(Pin::new(answer).poll(cx)) {
            Ok(answer) if answer.status().is_success() => {
                self.receive = Receive::Open(answer.into_body());
                return Poll::Ready(Ok(()));
            }
            Ok(answer) if answer.status() == StatusCode::GATEWAY_TIMEOUT => io::ErrorKind::TimedOut.into(),
            Ok(_) => io::ErrorKind::ConnectionRefused.into(),
            Err(error) => broken(error),
        };
        self.receive = Receive::Ended;
        Poll::Ready(Err(refused))
    }

    /// The next bytes; none: the other side says no more. They fill its window until they are [`Reading::release`]d.
    ///
    /// # Errors
    /// The other side has reset the stream, or the session is over.
    pub fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            match &mut self.receive {
                Receive::Awaited(_) => ready!(self.poll_accepted(cx))?,
                Receive::Open(body) => match ready!(body.poll_data(cx)) {
                    Some(Ok(bytes)) if bytes.is_empty() => {}
                    Some(Ok(bytes)) => return Poll::Ready(Ok(bytes)),
                    // It wants no more of us, and has said all.
                    Some(Err(error)) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => {
                        self.receive = Receive::Ended;
                    }
                    Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                    None => self.receive = Receive::Ended,
                },
                Receive::Ended => return Poll::Ready(Ok(Bytes::new())),
            }
        }
    }

    /// Makes room at the other side for as many more.
    pub fn release(&mut self, count: usize) {
        if let Receive::Open(body) = &mut self.receive {
            // It can fail only if more is given back than came.
            let _ = body.flow_control().release_capacity(count);
        }
    }
}

impl Writing {
    /// How many of `wanted` bytes may be sent now: at least one, and none of anybody's before it is asked for.
    ///
    /// # Errors
    /// The stream has ended, was reset, or the session is over.
    pub fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let wanted = wanted.min(WRITE_BYTES_MAX);
        self.send.reserve_capacity(wanted);
        loop {
            // `poll_capacity` tells of changes only.
            let room = self.send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room.min(wanted)));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }

    /// Sends these, for which there must be room.
    ///
    /// # Errors
    /// The stream has ended, was reset, or the session is over.
    pub fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        self.send.send_data(bytes, false).map_err(broken)
    }

    /// Says that no more comes.
    ///
    /// # Errors
    /// As [`Writing::send`]; once is enough.
    pub fn end(&mut self) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        self.ended = true;
        self.send.reserve_capacity(0);
        self.send.send_data(Bytes::new(), true).map_err(broken)
    }

    /// Ready when the other side wants no more of us, or the session is over.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.send.poll_reset(cx).map(|reset| match reset {
            Ok(reason) => broken(reason.into()),
            Err(error) => broken(error),
        })
    }

    /// Ends both ways at once, as a connection that breaks does.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { halves: Some(halves), came, .. } = &mut *self else { return Poll::Ready(Ok(())) };
        let mut taken = 0;
        // All that is there: whoever copies pays for each piece, and a frame is a small one.
        while into.remaining() > 0 {
            if came.is_empty() {
                match halves.reading.poll_bytes(cx) {
                    Poll::Ready(Ok(bytes)) if !bytes.is_empty() => *came = bytes,
                    // The end and an error are met again by the next call.
                    ended if taken == 0 => {
                        ready!(ended)?;
                        return Poll::Ready(Ok(()));
                    }
                    _ => break,
                }
            }
            let count = came.len().min(into.remaining());
            into.put_slice(&came[..count]);
            came.advance(count);
            taken += count;
        }
        halves.reading.release(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(halves) = &mut self.halves else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(halves.writing.poll_room(cx, bytes.len()))?;
        halves.writing.send(Bytes::copy_from_slice(&bytes[..room]))?;
        Poll::Ready(Ok(room))
    }

    /// What was written is the session's, which flushes by itself.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends our way.
    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.halves.as_mut().map_or(Ok(()), |halves| halves.writing.end()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let (Some(mut halves), Some(left)) = (self.halves.take(), self.left.take()) else { return };
        halves.reading.release(self.came.len());
        // Where the session is over, there is nothing to end.
        let _ = left.send(Left::new(halves));
    }
}

/// A guest's stream that nobody waits for any more, until it may be forgotten.
pub(crate) struct Left {
    halves: Halves,
    drained: usize,
    /// From the answer on.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Left {
    fn new(mut halves: Halves) -> Self {
        // An error says that it is over, which `poll_end` sees.
        let _ = halves.writing.end();
        Self { halves, drained: 0, patience: None }
    }

    /// Ready when both sides have said all, or the host has answered and then goes on for too long: h2 resets what is
    /// not at its end when it is dropped.
    pub(crate) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let bytes = self.halves.reading.poll_bytes(cx);
            if self.patience.is_none() && !matches!(self.halves.reading.receive, Receive::Awaited(_)) {
                self.patience = Some(Box::pin(sleep(DRAIN)));
            }
            match bytes {
                Poll::Ready(Ok(bytes)) if !bytes.is_empty() => {
                    self.halves.reading.release(bytes.len());
                    self.drained += bytes.len();
                    if self.drained > DRAIN_BYTES {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => {
                    return match &mut self.patience {
                        Some(patience) => patience.as_mut().poll(cx),
                        None => Poll::Pending,
                    };
                }
            }
        }
    }
}
