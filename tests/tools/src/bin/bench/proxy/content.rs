//! What is sent: random bytes that repeat, so that 1 GiB of them costs the sender nothing.

use bytes::Bytes;
use dayfly::rng::Rng;
use hyper::body::{Body, Frame, SizeHint};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A prime, so that pieces of any usual size that change places are noticed by the checksum.
const PERIOD_BYTES: usize = 1_048_573;

/// Endless content; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Content(Bytes);

/// Length and CRC-32 of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
}

/// Counts and sums up what comes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Digester(u64, crc32fast::Hasher);

impl Digester {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0 += bytes.len() as u64;
        self.1.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        Digest { bytes: self.0, crc: self.1.finalize() }
    }
}

impl Content {
    pub(crate) fn new(rng: &Rng) -> Self {
        let mut bytes = vec![0; PERIOD_BYTES];
        rng.fill(&mut bytes);
        Self(bytes.into())
    }

    /// At most `wanted` bytes from `offset` on, at least one.
    fn at(&self, offset: u64, wanted: usize) -> Bytes {
        let period = PERIOD_BYTES as u64;
        let from = usize::try_from(offset % period).unwrap_or(0);
        self.0.slice(from..PERIOD_BYTES.min(from + wanted))
    }

    /// The bytes from `offset` on, exactly `bytes` of them.
    pub(crate) fn copy(&self, offset: u64, bytes: usize) -> Bytes {
        let mut copied = Vec::with_capacity(bytes);
        while copied.len() < bytes {
            copied.extend_from_slice(&self.at(offset + copied.len() as u64, bytes - copied.len()));
        }
        copied.into()
    }

    /// A body: `head`, so many bytes of content, `tail`; in pieces of at most `piece` bytes.
    pub(crate) fn body(&self, head: &'static str, bytes: u64, tail: &'static str, piece: usize) -> Stretch {
        let (head, tail) = (Bytes::from_static(head.as_bytes()), Bytes::from_static(tail.as_bytes()));
        Stretch { content: self.clone(), head, at: 0, end: bytes, tail, piece }
    }
}

/// A stretch of content as a body.
#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    content: Content,
    head: Bytes,
    at: u64,
    end: u64,
    tail: Bytes,
    piece: usize,
}

impl Iterator for Stretch {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let piece = if !self.head.is_empty() {
            std::mem::take(&mut self.head)
        } else if left > 0 {
            let piece = self.content.at(self.at, self.piece.min(left));
            self.at += piece.len() as u64;
            piece
        } else {
            std::mem::take(&mut self.tail)
        };
        Some(piece).filter(|piece| !piece.is_empty())
    }
}

impl Stretch {
    /// What a receiver of all of it must find.
    pub(crate) fn digest(&self) -> Digest {
        let mut digester = Digester::default();
        self.clone().for_each(|piece| digester.update(&piece));
        digester.finish()
    }
}

/// Without a length, as the official runner's uploads are: chunked.
impl Body for Stretch {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.next().map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        // A download has neither head nor tail, and GitLab says how long it is.
        if self.tail.is_empty() { SizeHint::with_exact(self.end - self.at) } else { SizeHint::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_the_content_in_its_frame() {
        let content = Content::new(&Rng::seeded(1));
        let bytes = 2 * PERIOD_BYTES as u64 + 5;
        let body = content.body("head", bytes, "tail", 1000);
        let whole: Vec<u8> = body.clone().flatten().collect();
        let middle = content.copy(0, usize::try_from(bytes).unwrap());
        assert!(whole == [b"head", &middle[..], b"tail"].concat());
        assert_eq!(body.digest(), Digest { bytes: bytes + 8, crc: crc32fast::hash(&whole) });
        assert_eq!(content.copy(7, 10), middle.slice(7..17));
    }
}
