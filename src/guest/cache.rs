//! `cache:`: what the runner's helper takes for an S3 store, three verbs on the door (decision D28).
//!
//! Whose cache it is stands in the job, never in the URL: of that only the key counts, and a project that is not the
//! job's is refused. Signatures are looked at by nobody, for the pass has said who speaks. Bodies stream both ways through
//! buffers of [`CHUNK`]; whatever a guest begins and leaves holds one of [`TRANSFERS`] places until the disk is done with
//! it. A `PUT` that is refused gets no 5xx, after which the helper would send all of it again.

use super::answer::{self, Answer};
use super::body::{Held, Pace, Paced, RequestBody};
use super::handler::Handler;
use super::routes::CacheRoute;
use super::trace::is_over;
use crate::cache::{CacheError, JobCache, Key, Save, Version};
use crate::gitlab::transport::{self, BodyError};
use crate::telemetry::chain;
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use sha2::{Digest as _, Sha256};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;

/// Bytes that one transfer has in memory, and the disk gets at once.
const CHUNK: usize = 256 * 1024;

/// Transfers of one guest at once: as many ranges as the helper fetches side by side.
pub(super) const TRANSFERS: usize = 16;

const BINARY: HeaderValue = HeaderValue::from_static("application/octet-stream");
const BYTES: HeaderValue = HeaderValue::from_static("bytes");

/// A transfer's place. The disk may hold a copy of it longer than the guest does.
type Place = Arc<OwnedSemaphorePermit>;

impl Handler {
    /// One request to the store.
    pub(super) async fn cached(&self, route: CacheRoute, parts: &Parts, body: RequestBody) -> Answer {
        if is_over(&self.view()) {
            return self.refuse_over();
        }
        // No cache is a cache with nothing in it.
        let Some(cache) = &self.cache else { return self.missed() };
        let Some((project, key)) = Key::of_path(parts.uri.path()) else {
            return self.refuse(StatusCode::NOT_FOUND, "cache_key");
        };
        if project != cache.project() {
            return self.refuse(StatusCode::FORBIDDEN, "other_project");
        }
        let place = match timeout(self.limits().stall, Arc::clone(&self.cache_transfers).acquire_owned()).await {
            Ok(permit) => Arc::new(permit.expect("never closed")),
            Err(_) => return answer::come_again(StatusCode::SERVICE_UNAVAILABLE),
        };
        match route {
            CacheRoute::Save => self.save(cache, &key, &parts.headers, body, place).await,
            CacheRoute::Fetch | CacheRoute::Look => match cache.find(&key).await {
                None => self.missed(),
                Some(version) => self.fetch(cache, version, route, &parts.headers, place),
            },
        }
    }

    fn missed(&self) -> Answer {
        self.metrics().cache.inc("miss");
        answer::error(StatusCode::NOT_FOUND)
    }

    fn fetch(
        &self,
        cache: &JobCache,
        version: Arc<Version>,
        route: CacheRoute,
        headers: &HeaderMap,
        place: Place,
    ) -> Answer {
        let wanted = match range(headers, version.bytes) {
            Ranged::Whole => 0..version.bytes,
            Ranged::Part(part) => part,
            Ranged::Nothing => {
                let mut answer = self.refuse(StatusCode::RANGE_NOT_SATISFIABLE, "cache_range");
                put(answer.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{}", version.bytes));
                return answer;
            }
        };
        let is_whole = wanted == (0..version.bytes);
        // A helper that asks whether ranges can be had is no second hit.
        if wanted.start == 0 && (is_whole || wanted.end == 1) {
            self.metrics().cache.inc("hit");
        }
        let mut answer = Response::new(());
        *answer.status_mut() = if is_whole { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, BINARY);
        headers.insert(header::ACCEPT_RANGES, BYTES);
        put(headers, header::ETAG, &format!("\"{}\"", version.sha256));
        put(headers, header::LAST_MODIFIED, &date(&version.saved));
        if !is_whole {
            let text = format!("bytes {}-{}/{}", wanted.start, wanted.end - 1, version.bytes);
            put(headers, header::CONTENT_RANGE, &text);
        }
        if route == CacheRoute::Look {
            put(headers, header::CONTENT_LENGTH, &version.bytes.to_string());
            return answer.map(|()| transport::full(""));
        }
        let deadline = Instant::now() + self.limits().transfer_total;
        let pace = Pace { stall: self.limits().stall, deadline, bytes: self.metrics().cache_down_bytes.clone() };
        let stored = Stored {
            cache: cache.clone(),
            version,
            left: wanted,
            reading: None,
            digest: is_whole.then(Sha256::new),
            reads: self.writes.clone(),
            place: Arc::clone(&place),
        };
        answer.map(|()| Held::new(Paced::new(stored, pace), place).boxed_unsync())
    }

    async fn save(&self, cache: &JobCache, key: &Key, headers: &HeaderMap, body: RequestBody, place: Place) -> Answer {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let Some(length) = length else { return self.refuse(StatusCode::LENGTH_REQUIRED, "cache_length") };
        let deadline = Instant::now() + self.limits().transfer_total;
        let pace = Pace { stall: self.limits().stall, deadline, bytes: self.metrics().cache_up_bytes.clone() };
        let (cache, key) = (cache.clone(), key.clone());
        let saved = async {
            let held = Arc::clone(&place);
            let save = self.on_disk(deadline, async move { (cache.save(&key, length).await, held).0 }).await?;
            self.receive(save, body.into_stream(pace), &place, deadline).await
        };
        match saved.await {
            Ok(digest) => {
                self.metrics().cache.inc("saved");
                let mut answer = answer::empty(StatusCode::OK);
                put(answer.headers_mut(), header::ETAG, &format!("\"{digest}\""));
                answer
            }
            Err(NotSaved::Cache(CacheError::TooLarge(_))) => {
                self.refuse(StatusCode::PAYLOAD_TOO_LARGE, "cache_too_large")
            }
            Err(NotSaved::Cache(CacheError::NoRoom)) => self.refuse(StatusCode::FORBIDDEN, "cache_room"),
            Err(NotSaved::Cache(CacheError::Length) | NotSaved::Cut) => {
                self.refuse(StatusCode::BAD_REQUEST, "cache_cut")
            }
            Err(NotSaved::Cache(error @ CacheError::Io(_))) => {
                let error = chain(&error);
                self.not_saved.log(|line| tracing::warn!(vm = %self.vm(), job = %self.job, error, "{line}"));
                answer::come_again(StatusCode::SERVICE_UNAVAILABLE)
            }
            Err(NotSaved::Late) => answer::come_again(StatusCode::SERVICE_UNAVAILABLE),
        }
    }

    /// Takes the body, a chunk at a time.
    async fn receive(
        &self,
        mut save: Save,
        mut body: impl Body<Data = Bytes, Error = BodyError> + Unpin,
        place: &Place,
        deadline: Instant,
    ) -> Result<String, NotSaved> {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        loop {
            let came = match body.frame().await {
                None => None,
                Some(Ok(frame)) => Some(frame.into_data().unwrap_or_default()),
                Some(Err(_)) => return Err(NotSaved::Cut),
            };
            let ended = came.is_none();
            let mut came = came.unwrap_or_default();
            while ended || !came.is_empty() {
                let taken = came.split_to(came.len().min(CHUNK - chunk.len()));
                chunk.extend_from_slice(&taken);
                if chunk.len() < CHUNK && !ended {
                    break;
                }
                let (bytes, held) = (chunk.split().freeze(), Arc::clone(place));
                // In a task of its own: a guest that hangs up does not leave it half done, and its place goes with it.
                save = self
                    .on_disk(deadline, async move {
                        let put = save.put(bytes).await;
                        drop(held);
                        put.map(|()| save)
                    })
                    .await?;
                if ended {
                    return self.on_disk(deadline, save.commit()).await;
                }
                chunk.reserve(CHUNK);
            }
        }
    }

    /// What is begun on the disk ends there, whoever waits for it.
    async fn on_disk<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl Future<Output = Result<T, CacheError>> + Send + 'static,
    ) -> Result<T, NotSaved> {
        match timeout_at(deadline, self.writes.spawn(work)).await {
            Ok(Ok(done)) => done.map_err(NotSaved::Cache),
            // A panic, which its own line reports; or the disk hangs.
            Ok(Err(_)) | Err(_) => Err(NotSaved::Late),
        }
    }
}

/// Why a cache was not saved.
enum NotSaved {
    Cache(CacheError),
    /// The guest broke off.
    Cut,
    Late,
}

fn put(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    headers.insert(name, HeaderValue::try_from(value).expect("digits, hex and dates are header values"));
}

fn date(at: &Timestamp) -> String {
    rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(at).unwrap_or_default()
}

/// What is asked for of an entry.
#[derive(Debug, PartialEq, Eq)]
enum Ranged {
    Whole,
    Part(Range<u64>),
    /// It has no such bytes.
    Nothing,
}

/// One range, as the helper asks for; what is none is as good as not there (RFC 9110, 14.2).
fn range(headers: &HeaderMap, length: u64) -> Ranged {
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
struct Stored {
    cache: JobCache,
    version: Arc<Version>,
    left: Range<u64>,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    digest: Option<Sha256>,
    reads: TaskTracker,
    place: Place,
}

impl Stored {
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
            me.check(&bytes).map(|()| bytes)
        });
        if checked.is_err() {
            me.left = 0..0;
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
