//! What of an entry is asked for, and its bytes on their way.

use super::{CHUNK, Place};
use crate::cache::{JobCache, Key, Version, What};
use crate::gitlab::transport::BodyError;
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http_body::{Body, Frame, SizeHint};
use sha2::{Digest as _, Sha256};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

/// What is asked for of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ranged {
    Whole,
    Part(Range<u64>),
    /// It has no such bytes.
    Nothing,
}

/// One range, as the helper asks for; what is none is as good as not there (RFC 9110, 14.2).
pub(super) fn range(headers: &HeaderMap, length: u64) -> Ranged {
    let text = headers.get(header::RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes="));
    let Some((first, last)) = text.and_then(|text| text.split_once('-')) else { return Ranged::Whole };
    let number = |text: &str| {
        let digits = (1..=19).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let part = match (first.is_empty(), last.is_empty()) {
        (false, false) => number(first).zip(number(last)).filter(|(first, last)| first <= last),
        (false, true) => number(first).map(|first| (first, u64::MAX - 1)),
        // The last so many.
        (true, false) => number(last).map(|count| (length.saturating_sub(count), u64::MAX - 1)),
        (true, true) => None,
    };
    let Some((first, last)) = part else { return Ranged::Whole };
    let part = first..(last + 1).min(length);
    if part.is_empty() { Ranged::Nothing } else { Ranged::Part(part) }
}

/// The bytes of an entry on their way. One whose digest is not what was saved ends in an error, never cleanly.
pub(super) struct Stored {
    cache: JobCache,
    key: Key,
    version: Arc<Version>,
    left: Range<u64>,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    digest: Option<Sha256>,
    reads: TaskTracker,
    place: Place,
}

impl Stored {
    /// These bytes of a version. `reads`: where reads are counted that go on whoever waits.
    pub(super) fn new(
        cache: JobCache,
        (key, version): (Key, Arc<Version>),
        left: Range<u64>,
        (reads, place): (TaskTracker, Place),
    ) -> Self {
        let digest = (left == (0..version.bytes)).then(Sha256::new);
        Self { cache, key, version, left, reading: None, digest, reads, place }
    }

    fn read(&self) -> JoinHandle<io::Result<Bytes>> {
        let (cache, version, place) = (self.cache.clone(), Arc::clone(&self.version), Arc::clone(&self.place));
        let at = self.left.start;
        let count = usize::try_from(self.left.end - at).unwrap_or(CHUNK).min(CHUNK);
        self.reads.spawn(async move {
            let read = cache.read(&version, at, count).await;
            drop(place);
            read
        })
    }

    /// Whether these can be the entry's next bytes.
    fn check(&mut self, bytes: &Bytes) -> io::Result<()> {
        let unlike = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if bytes.is_empty() {
            return unlike("a cache's file is shorter than it was");
        }
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
            if self.left.is_empty() && !self.version.is_of(digest.clone()) {
                return unlike("a cache's file is not what was saved");
            }
        }
        Ok(())
    }
}

impl Body for Stored {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = self.get_mut();
        if me.left.is_empty() {
            return Poll::Ready(None);
        }
        let mut reading = me.reading.take().unwrap_or_else(|| me.read());
        let Poll::Ready(read) = Pin::new(&mut reading).poll(cx) else {
            me.reading = Some(reading);
            return Poll::Pending;
        };
        let checked = read.map_err(io::Error::other).flatten().and_then(|bytes| {
            me.left.start += bytes.len() as u64;
            me.cache.note(&me.key, What::Hit, bytes.len() as u64, Instant::now());
            me.check(&bytes).map(|()| bytes)
        });
        if checked.is_err() {
            me.left = 0..0;
        } else if !me.left.is_empty() {
            // The next ones come from the disk while these go out.
            me.reading = Some(me.read());
        }
        Poll::Ready(Some(checked.map(Frame::data).map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.end - self.left.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_range_is_one_or_none() {
        let of =
            |value: &'static str| range(&HeaderMap::from_iter([(header::RANGE, HeaderValue::from_static(value))]), 100);
        assert_eq!(range(&HeaderMap::new(), 100), Ranged::Whole);
        for (value, expected) in [
            ("bytes=0-0", Ranged::Part(0..1)),
            ("bytes=10-19", Ranged::Part(10..20)),
            ("bytes=90-1000", Ranged::Part(90..100)),
            ("bytes=90-", Ranged::Part(90..100)),
            ("bytes=-10", Ranged::Part(90..100)),
            ("bytes=-1000", Ranged::Part(0..100)),
            ("bytes=100-", Ranged::Nothing),
            ("bytes=200-300", Ranged::Nothing),
            ("bytes=-0", Ranged::Nothing),
            ("bytes=5-4", Ranged::Whole),
            ("bytes=0-1,5-6", Ranged::Whole),
            ("bytes=a-b", Ranged::Whole),
            ("bytes=-", Ranged::Whole),
            ("bytes=0-99999999999999999999", Ranged::Whole),
            ("lines=0-1", Ranged::Whole),
        ] {
            assert_eq!(of(value), expected, "{value}");
        }
    }
}
