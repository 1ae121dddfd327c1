//! How much of a body, and how fast? Small bodies are read whole, large ones stream, both bounded.

use super::wire::Timer;
use crate::failpoint::{Point, reached};
use crate::gitlab::transport::BodyError;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use prometheus_client::metrics::counter::Counter;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// A body that is read whole may be this slow, bytes a second, once [`SLOW_AFTER`] is over. The
/// official runner sends its bodies in one go.
const SLOW_BYTES_PER_SECOND: f64 = 1024.0;
/// How long a body may take to get going.
const SLOW_AFTER: Duration = Duration::from_secs(10);

/// Why a small body was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyFault {
    /// 413.
    TooLarge,
    /// 408: it stood still or crept.
    Slow,
    /// It broke off, or its framing did: nobody waits for an answer any more.
    Cut,
}

/// A request's body until somebody takes it; remembers whether it was read to its end, for only
/// then may the connection go on.
#[derive(Debug)]
pub(super) struct RequestBody {
    body: Incoming,
    ended: Arc<AtomicBool>,
}

impl RequestBody {
    pub(super) fn new(body: Incoming) -> Self {
        let ended = Arc::new(AtomicBool::new(body.is_end_stream()));
        Self { body, ended }
    }

    /// Tells, later, whether the body was read to its end.
    pub(super) fn ended(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.ended)
    }

    /// Reads all of at most `bytes_max` bytes.
    pub(super) async fn read(&mut self, bytes_max: usize, stall: Duration) -> Result<Bytes, BodyFault> {
        let begun = Instant::now();
        if self.body.size_hint().lower() > bytes_max as u64 {
            return Err(BodyFault::TooLarge);
        }
        // As long as it says it is, so that no growing buffer takes twice as much.
        let told = usize::try_from(self.body.size_hint().lower()).unwrap_or(bytes_max).min(bytes_max);
        let mut read = BytesMut::with_capacity(told);
        loop {
            let frame = match timeout(stall, self.body.frame()).await {
                Err(_) => return Err(BodyFault::Slow),
                Ok(Some(Err(_))) => return Err(BodyFault::Cut),
                Ok(None) => break,
                Ok(Some(Ok(frame))) => frame,
            };
            // Trailers are no data, and dropped.
            let Ok(data) = frame.into_data() else { continue };
            if read.len() + data.len() > bytes_max {
                return Err(BodyFault::TooLarge);
            }
            read.extend_from_slice(&data);
            let elapsed = begun.elapsed();
            #[expect(clippy::cast_precision_loss, reason = "small bodies lie far below 2^53 bytes")]
            if elapsed > SLOW_AFTER && (read.len() as f64) < elapsed.as_secs_f64() * SLOW_BYTES_PER_SECOND {
                return Err(BodyFault::Slow);
            }
        }
        self.ended.store(true, Ordering::Release);
        Ok(read.freeze())
    }

    /// Makes it a stream towards GitLab. A guest that breaks off, or stands still, ends it with an
    /// error and never cleanly, so that GitLab stores no half of an artifact (threats.md R15).
    pub(super) fn into_stream(self, pace: Pace) -> Paced<Incoming> {
        Paced { body: self.body, pace, waiting: None, timer: Timer::default(), ended: self.ended }
    }
}

/// Reads a small body's JSON object. Of what serde is lenient about nothing passes: a list of the members' values is
/// no object, and what is no UTF-8 is no JSON, even in a member that nobody reads.
pub fn object<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Option<T> {
    let text = std::str::from_utf8(body).ok()?;
    text.trim_ascii_start().starts_with('{').then(|| serde_json::from_str(text).ok()).flatten()
}

/// How a stream may go.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    /// Longest pause.
    pub(super) stall: Duration,
    /// When it must be over.
    pub(super) deadline: Instant,
    /// Counts its bytes.
    pub(super) bytes: Counter,
}

/// A body in motion stood still for too long, or went on for too long.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("body did not go on in time")]
pub(super) struct TooSlow;

/// A streaming body within time limits; data only, trailers are dropped.
#[derive(Debug)]
pub(super) struct Paced<B> {
    body: B,
    pace: Pace,
    /// Since when we wait for its other side. Time in which nobody asks us does not count.
    waiting: Option<Instant>,
    timer: Timer,
    ended: Arc<AtomicBool>,
}

impl<B> Paced<B> {
    pub(super) fn new(body: B, pace: Pace) -> Self {
        Self { body, pace, waiting: None, timer: Timer::default(), ended: Arc::new(AtomicBool::new(false)) }
    }
}

impl<B> Body for Paced<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = self.get_mut();
        loop {
            match Pin::new(&mut me.body).poll_frame(cx) {
                Poll::Pending => {
                    let since = *me.waiting.get_or_insert_with(Instant::now);
                    ready!(me.timer.poll(cx, (since + me.pace.stall).min(me.pace.deadline)));
                    return Poll::Ready(Some(Err(TooSlow.into())));
                }
                Poll::Ready(None) => {
                    me.ended.store(true, Ordering::Release);
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error.into()))),
                Poll::Ready(Some(Ok(frame))) => {
                    me.waiting = None;
                    if Instant::now() >= me.pace.deadline {
                        return Poll::Ready(Some(Err(TooSlow.into())));
                    }
                    let Ok(data) = frame.into_data() else { continue };
                    me.pace.bytes.inc_by(data.len() as u64);
                    reached(Point::K13);
                    // With a length, nobody need ask for the end.
                    if me.body.is_end_stream() {
                        me.ended.store(true, Ordering::Release);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body that keeps something alive until it was sent or given up.
#[derive(Debug)]
pub(super) struct Held<B, T> {
    body: B,
    _held: T,
}

impl<B, T> Held<B, T> {
    pub(super) fn new(body: B, held: T) -> Self {
        Self { body, _held: held }
    }
}

impl<B: Body + Unpin, T: Unpin> Body for Held<B, T> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
