//! The link to GitLab: a token bucket for each direction, shared by all connections.
//!
//! It sits below TLS on the server's sockets, so whoever calls meets the same link. What does not fit
//! waits in the kernel's socket buffers, as behind a slow network card.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// What may go at once after a pause: 8 ms at 125 MB/s, so that a thread that is woken late loses nothing.
const BURST_BYTES: usize = 1 << 20;
/// Who finds the bucket empty waits for so much: 1 ms at 125 MB/s, the resolution of timers.
const PORTION_BYTES: usize = 128 << 10;

/// A link; clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    up: Arc<Bucket>,
    down: Arc<Bucket>,
}

impl Link {
    pub(crate) fn unlimited() -> Self {
        Self { up: Arc::new(Bucket::new()), down: Arc::new(Bucket::new()) }
    }

    /// From now on so many bytes a second each way; 0: as many as there are.
    pub(crate) fn limit(&self, bytes_per_second: u32) {
        for bucket in [&self.up, &self.down] {
            let mut state = bucket.lock();
            (state.rate, state.tokens, state.at) = (bytes_per_second, 0, Instant::now());
        }
    }

    pub(crate) fn over(&self, stream: TcpStream) -> Limited {
        Limited { stream, link: self.clone(), read_wait: None, write_wait: None }
    }
}

#[derive(Debug)]
struct Bucket(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Bytes a second; 0: no limit.
    rate: u32,
    tokens: usize,
    /// When `tokens` was right.
    at: Instant,
}

impl Bucket {
    fn new() -> Self {
        Self(Mutex::new(State { rate: 0, tokens: 0, at: Instant::now() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Held for a few lines, never across an await.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes at most `wanted`, or says when to ask again.
    fn take(&self, wanted: usize) -> Result<usize, Instant> {
        let mut state = self.lock();
        if state.rate == 0 {
            return Ok(wanted);
        }
        let (now, rate) = (Instant::now(), u128::from(state.rate));
        let earned = now.duration_since(state.at).as_micros() * rate / 1_000_000;
        if earned > 0 {
            state.tokens = usize::try_from(earned).unwrap_or(BURST_BYTES).saturating_add(state.tokens).min(BURST_BYTES);
            state.at = now;
        }
        if state.tokens >= wanted.min(PORTION_BYTES) {
            let taken = wanted.min(state.tokens);
            state.tokens -= taken;
            return Ok(taken);
        }
        let missing = PORTION_BYTES.saturating_sub(state.tokens) as u128;
        let micros = u64::try_from(missing * 1_000_000 / rate).unwrap_or(u64::MAX);
        Err(now + Duration::from_micros(micros))
    }

    fn give_back(&self, bytes: usize) {
        let mut state = self.lock();
        if state.rate > 0 {
            state.tokens = state.tokens.saturating_add(bytes).min(BURST_BYTES);
        }
    }

    fn poll_take(&self, wait: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>, wanted: usize) -> Poll<usize> {
        use std::future::Future as _;
        loop {
            match self.take(wanted) {
                Ok(taken) => {
                    *wait = None;
                    return Poll::Ready(taken);
                }
                Err(until) => {
                    let sleep = wait.insert(Box::pin(sleep_until(until)));
                    ready!(sleep.as_mut().poll(cx));
                }
            }
        }
    }
}

/// A server's socket on the link.
#[derive(Debug)]
pub(crate) struct Limited {
    stream: TcpStream,
    link: Link,
    read_wait: Option<Pin<Box<Sleep>>>,
    write_wait: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Limited {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        let granted = ready!(me.link.up.poll_take(&mut me.read_wait, cx, buf.remaining()));
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(granted));
        let polled = Pin::new(&mut me.stream).poll_read(cx, &mut part);
        let read = part.filled().len();
        me.link.up.give_back(granted - read);
        buf.advance(read);
        polled
    }
}

impl AsyncWrite for Limited {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let me = self.get_mut();
        let granted = ready!(me.link.down.poll_take(&mut me.write_wait, cx, bytes.len()));
        let polled = Pin::new(&mut me.stream).poll_write(cx, &bytes[..granted]);
        let written = if let Poll::Ready(Ok(written)) = &polled { *written } else { 0 };
        me.link.down.give_back(granted - written);
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_its_rate_and_no_more() {
        let bucket = Bucket::new();
        assert_eq!(bucket.take(usize::MAX), Ok(usize::MAX));
        (bucket.lock().rate, bucket.lock().at) = (125_000_000, Instant::now());
        let begun = Instant::now();
        let mut taken = 0;
        while begun.elapsed() < Duration::from_secs(2) {
            match bucket.take(16 << 10) {
                Ok(bytes) => taken += bytes,
                Err(until) => tokio::time::sleep_until(until).await,
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        assert!((taken as f64 / seconds / 125e6 - 1.0).abs() < 0.01, "{taken} bytes in {seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_used_is_given_back() {
        let bucket = Bucket::new();
        (bucket.lock().rate, bucket.lock().at) = (1_000_000, Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        let taken = bucket.take(800_000).unwrap();
        bucket.give_back(taken);
        assert_eq!(bucket.take(900_000), Ok(900_000));
    }
}
