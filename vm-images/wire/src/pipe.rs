//! Between a session and its pipe: hands over first what the handshake has read, notes when something came, lets no filler
//! into a stream, and at the host reads no faster than a guest's frames are allowed to cost.
//!
//! An old session that has not seen its end reads the filler of the next one: what is missing of a frame is filled with
//! it, and would be data of a stream, of the right length and wrong. No frame begins with a filler's byte, so a frame of
//! data that ends with one is handed over only when the next frame has begun with another. That is at once where bytes
//! flow, and with the next ping's answer where nothing else comes.
//!
//! The allowance is counted in frames and not in bytes, because bytes are cheap and what h2 does for a frame that opens,
//! resets, asks or sets something is not: floods of these are its known ones (CVE-2023-44487 and its kin). h2 has
//! bounds of its own for what they make it keep; here is the bound of what they make it do. Who is beyond it waits, as
//! an honest guest might for a moment.

use crate::limits::{COSTLY_FRAME, FILLER_BYTE, UNITS_A_SECOND};
use bytes::{Buf as _, BufMut as _, BytesMut};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// When something last came.
#[derive(Clone)]
pub(crate) struct Heard {
    start: Instant,
    after_ms: Arc<AtomicU64>,
}

impl Heard {
    pub(crate) fn now() -> Self {
        Self { start: Instant::now(), after_ms: Arc::default() }
    }

    pub(crate) fn last(&self) -> Instant {
        self.start + Duration::from_millis(self.after_ms.load(Ordering::Relaxed))
    }

    fn note(&self) {
        let after = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.after_ms.store(after, Ordering::Relaxed);
    }
}

/// What is done whenever bytes came.
type OnBytes = Box<dyn Fn() + Send>;

/// See the file.
pub(crate) struct Pipe<S> {
    inner: S,
    /// Read before the session began.
    first: BytesMut,
    on_bytes: OnBytes,
    frames: Frames,
    /// The last byte of a frame of data, while it may be a filler's.
    held: bool,
    meter: Option<Meter>,
}

impl<S> Pipe<S> {
    /// A host's: metered.
    pub(crate) fn of_host(inner: S, first: BytesMut, heard: &Heard) -> Self {
        let heard = heard.clone();
        let frames = Frames { skip: PREFACE_BYTES, ..Frames::default() };
        let on_bytes = Box::new(move || heard.note());
        Self { inner, first, on_bytes, frames, held: false, meter: Some(Meter::new()) }
    }

    /// A guest's.
    pub(crate) fn of_guest(inner: S, first: BytesMut, on_bytes: OnBytes) -> Self {
        Self { inner, first, on_bytes, frames: Frames::default(), held: false, meter: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Pipe<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(meter) = &mut this.meter {
            ready!(meter.poll_allowance(cx));
        }
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if this.held {
                let mut byte = [0];
                let mut next = ReadBuf::new(&mut byte);
                ready!(this.poll_source(cx, &mut next))?;
                match next.filled() {
                    // It ended there, and the frame is nobody's.
                    [] => return Poll::Ready(Ok(())),
                    [FILLER_BYTE] => return Poll::Ready(Err(stale())),
                    [other, ..] => {
                        let rest = std::mem::take(&mut this.first);
                        this.first.put_u8(*other);
                        this.first.unsplit(rest);
                    }
                }
                this.held = false;
                into.put_slice(&[FILLER_BYTE]);
                return Poll::Ready(Ok(()));
            }
            let before = into.filled().len();
            ready!(this.poll_source(cx, into))?;
            let came = &into.filled()[before..];
            if came.is_empty() {
                return Poll::Ready(Ok(()));
            }
            (this.on_bytes)();
            let meter = &mut this.meter;
            let charge = |kind, length| {
                if let Some(meter) = meter {
                    meter.charge(kind, length);
                }
            };
            let Ok(ends_with_filler) = this.frames.follow(came, charge) else {
                into.set_filled(before);
                return Poll::Ready(Err(stale()));
            };
            if !ends_with_filler {
                return Poll::Ready(Ok(()));
            }
            this.held = true;
            into.set_filled(into.filled().len() - 1);
            if into.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

fn stale() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the next session has begun")
}

impl<S: AsyncRead + Unpin> Pipe<S> {
    /// What the handshake has read, then the pipe.
    fn poll_source(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, into);
        }
        let count = self.first.len().min(into.remaining());
        into.put_slice(&self.first[..count]);
        self.first.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Pipe<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// HTTP/2's preface, in front of the first frame.
const PREFACE_BYTES: usize = 24;
/// Length, type, flags, stream.
const HEAD_BYTES: usize = 9;
const TYPE_DATA: u8 = 0;
const TYPE_WINDOW_UPDATE: u8 = 8;

/// Follows the frames through what comes. Whether they are good ones is h2's business.
#[derive(Default)]
struct Frames {
    /// Of the frame (or preface) that is being read, still to come.
    skip: usize,
    head: [u8; HEAD_BYTES],
    have: usize,
    is_data: bool,
}

impl Frames {
    /// Whether these bytes end with a frame of data whose last byte may be a filler's. `head` hears of each frame that
    /// begins: its type and its length.
    ///
    /// # Errors
    /// A frame begins with one: it is none.
    fn follow(&mut self, mut came: &[u8], mut head: impl FnMut(u8, usize)) -> Result<bool, ()> {
        loop {
            let skipped = self.skip.min(came.len());
            let last = skipped.checked_sub(1).map(|at| came[at]);
            came = &came[skipped..];
            self.skip -= skipped;
            if came.is_empty() {
                return Ok(self.skip == 0 && self.have == 0 && self.is_data && last == Some(FILLER_BYTE));
            }
            if self.have == 0 && came[0] == FILLER_BYTE {
                return Err(());
            }
            let taken = (HEAD_BYTES - self.have).min(came.len());
            self.head[self.have..self.have + taken].copy_from_slice(&came[..taken]);
            self.have += taken;
            came = &came[taken..];
            if self.have == HEAD_BYTES {
                self.have = 0;
                let [a, b, c, kind, ..] = self.head;
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                self.is_data = kind == TYPE_DATA;
                head(kind, self.skip);
            }
        }
    }
}

/// Counts frames against an allowance that comes back with time.
struct Meter {
    /// Negative: to be waited for.
    units: i64,
    since: Instant,
    wait: Pin<Box<Sleep>>,
}

impl Meter {
    fn new() -> Self {
        Self { units: i64::from(UNITS_A_SECOND), since: Instant::now(), wait: Box::pin(sleep(Duration::ZERO)) }
    }

    /// Ready while something is left of the allowance.
    fn poll_allowance(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.units < 0 {
            let now = Instant::now();
            let passed = i64::try_from((now - self.since).as_micros()).unwrap_or(i64::MAX);
            let back = passed.saturating_mul(i64::from(UNITS_A_SECOND)) / 1_000_000;
            if back > 0 {
                self.since = now;
                self.units = self.units.saturating_add(back).min(i64::from(UNITS_A_SECOND));
                continue;
            }
            let debt = self.units.unsigned_abs().saturating_mul(1_000_000) / u64::from(UNITS_A_SECOND);
            // Not less than a timer can tell.
            self.wait.as_mut().reset(now + Duration::from_micros(debt).max(Duration::from_millis(1)));
            ready!(self.wait.as_mut().poll(cx));
        }
        Poll::Ready(())
    }

    /// Takes what this frame costs.
    fn charge(&mut self, kind: u8, length: usize) {
        let cheap = matches!((kind, length), (TYPE_DATA, 1..) | (TYPE_WINDOW_UPDATE, _));
        self.units -= i64::from(if cheap { 1 } else { COSTLY_FRAME });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    fn frame(kind: u8, length: u8) -> Vec<u8> {
        let mut bytes = vec![0, 0, length, kind, 0, 0, 0, 0, 0];
        bytes.extend(std::iter::repeat_n(0xaa, length.into()));
        bytes
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
            let stream =
                [vec![b'P'; PREFACE_BYTES], frame(6, 8), frame(0, 200), frame(0, 0), frame(8, 4), frame(1, 30)]
                    .concat();
            for size in [1, 2, 7, 9, 10, 1000] {
                let (mut meter, mut frames) = (Meter::new(), Frames { skip: PREFACE_BYTES, ..Frames::default() });
                for piece in stream.chunks(size) {
                    frames.follow(piece, |kind, length| meter.charge(kind, length)).unwrap();
                }
                assert_eq!(meter.units, i64::from(UNITS_A_SECOND) - 3 * i64::from(COSTLY_FRAME) - 2, "{size}");
                assert_eq!((frames.skip, frames.have), (0, 0));
            }
        });
    }

    /// What is missing of a frame is never filled with the next session's filler, wherever the old one was cut; data that
    /// only looks like it arrives whole.
    #[tokio::test]
    async fn no_filler_is_ever_data() {
        for kind in [0, 8] {
            for (ends, payload) in [(0xaa, vec![0xaa; 40]), (0xff, vec![0xff; 40])] {
                let mut whole = vec![0, 0, 40, kind, 0, 0, 0, 0, 1];
                whole.extend(&payload);
                // Within a head the filler makes it one of a frame that is too long for any session.
                for cut in std::iter::once(0).chain(HEAD_BYTES..=whole.len()) {
                    let (mut old, host) = duplex(64 * 1024);
                    old.write_all(&whole[..cut]).await.unwrap();
                    old.write_all(&[FILLER_BYTE; 1000]).await.unwrap();
                    let mut pipe = Pipe::of_guest(host, BytesMut::new(), Box::new(|| {}));
                    let mut read = Vec::new();
                    let error = pipe.read_to_end(&mut read).await.unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                    let is_cut_data = kind == 0 && cut > 9 && cut < whole.len();
                    assert!(!is_cut_data || read.len() < whole.len(), "{ends:x} cut at {cut}: {} bytes", read.len());
                }
                // Whole, with a frame behind it, in pieces of any size.
                let stream = [whole.clone(), frame(6, 8), whole.clone(), frame(6, 8)].concat();
                for size in 1..stream.len() {
                    let (mut other, host) = duplex(64 * 1024);
                    for piece in stream.chunks(size) {
                        other.write_all(piece).await.unwrap();
                    }
                    drop(other);
                    let mut pipe = Pipe::of_guest(host, BytesMut::from(&stream[..0]), Box::new(|| {}));
                    let mut read = Vec::new();
                    pipe.read_to_end(&mut read).await.unwrap();
                    assert_eq!(read, stream, "{size}");
                }
            }
        }
    }

    /// A flood of pings is read at the pace that is allowed.
    #[tokio::test(start_paused = true)]
    async fn a_flood_is_read_no_faster_than_it_may_cost() {
        let (mut guest, host) = duplex(64 * 1024);
        let heard = Heard::now();
        let mut pipe = Pipe::of_host(host, BytesMut::from(&[b'P'; PREFACE_BYTES][..]), &heard);
        let pings = frame(6, 8).repeat(1000);
        let start = Instant::now();
        let flood = async {
            for _ in 0..100 {
                guest.write_all(&pings).await.unwrap();
            }
            drop(guest);
        };
        let mut read = 0;
        let drain = async {
            let mut buffer = vec![0; 16 * 1024];
            loop {
                match pipe.read(&mut buffer).await.unwrap() {
                    0 => break,
                    count => read += count,
                }
            }
        };
        tokio::join!(flood, drain);
        assert_eq!(read, PREFACE_BYTES + 17 * 100_000);
        // 100,000 at 12,500 a second, less what was allowed at once.
        let took = start.elapsed();
        assert!((Duration::from_secs(6)..Duration::from_secs(9)).contains(&took), "{took:?}");
    }
}
