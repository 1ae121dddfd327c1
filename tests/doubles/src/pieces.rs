//! A connection without a network: its other side says the bytes of an input, cut as the input says.

#![expect(clippy::unwrap_used, reason = "a property fails by panicking")]

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

/// How an input is cut into pieces: lengths that follow from its checksum. One input in four comes whole.
#[derive(Clone, Debug)]
pub(crate) struct Cuts(u32);

impl Cuts {
    /// Those of this input.
    pub(crate) fn of(input: &[u8]) -> Self {
        Self(crc32fast::hash(input))
    }

    /// The next number, any.
    pub(crate) fn number(&mut self) -> usize {
        // Numerical Recipes' generator; its upper bits are the better ones.
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        usize::try_from(self.0 >> 8).unwrap_or_default()
    }

    /// The length of the next piece: mostly short, never 0.
    pub(crate) fn piece(&mut self) -> usize {
        match self.number() % 4 {
            0 => usize::MAX,
            1 => 1,
            2 => 1 + self.number() % 16,
            _ => 1 + self.number() % 4096,
        }
    }

    /// `bytes` in pieces, 64 at most.
    pub(crate) fn pieces<'a>(&mut self, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let length = if pieces.len() < 63 { self.piece() } else { usize::MAX };
            let (piece, rest) = bytes.split_at(length.min(bytes.len()));
            pieces.push(piece);
            bytes = rest;
        }
        pieces
    }
}

/// What the other side has heard. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<u8>>>);

impl Heard {
    /// What was heard.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A stream whose other side says `first` at once and `then` once it has heard something; then it ends, or waits.
#[derive(Debug)]
pub(crate) struct Peer {
    first: Vec<u8>,
    then: Vec<u8>,
    waits: bool,
    said: usize,
    cuts: Cuts,
    heard: Heard,
}

impl Peer {
    /// A peer, and what it will have heard.
    pub(crate) fn new(first: &[u8], then: &[u8]) -> (Self, Heard) {
        let (cuts, heard) = (Cuts::of(&[first, then].concat()), Heard::default());
        (Self { first: first.to_vec(), then: then.to_vec(), waits: false, said: 0, cuts, heard: heard.clone() }, heard)
    }

    /// One that says this and then nothing, for ever: hyper gives up what it has read of one that ends.
    pub(crate) fn waiting(bytes: &[u8]) -> Self {
        Self { waits: true, ..Self::new(bytes, b"").0 }
    }
}

impl AsyncRead for Peer {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if me.said == me.first.len() && !me.heard.bytes().is_empty() {
            me.first.append(&mut me.then);
        }
        let left = &me.first[me.said..];
        if left.is_empty() && me.waits {
            return Poll::Pending;
        }
        let count = left.len().min(buf.remaining()).min(me.cuts.piece());
        buf.put_slice(&left[..count]);
        me.said += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Peer {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs a future that waits for nothing but itself; `None` if it waits for something that will never come. It may make
/// timers, whose time never comes.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().unwrap();
    }
    RUNTIME.with(|runtime| {
        let _entered = runtime.enter();
        poll(future)
    })
}

fn poll<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    while woken.0.swap(false, Ordering::Relaxed) {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Some(value);
        }
    }
    None
}
