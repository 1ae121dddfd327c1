//! `cache:`: what the runner's helper takes for an S3 store, three verbs on the door (decision D28).
//!
//! Whose cache it is stands in the job, never in the URL: of that only the key counts, and a project that is not the
//! job's is refused. Signatures are looked at by nobody, for the pass has said who speaks. Bodies stream both ways through
//! buffers of [`CHUNK`]; whatever a guest begins and leaves holds one of [`TRANSFERS`] places until the disk is done with
//! it. A `PUT` that is refused gets no 5xx, after which the helper would send all of it again.

mod ranges; // which bytes, and where are they?
mod upstream; // an operator's own store

use self::ranges::{Ranged, Stored, range};
use super::answer::{self, Answer};
use super::body::{Held, Pace, Paced, RequestBody};
use super::handler::Handler;
use super::routes::CacheRoute;
use super::trace::is_over;
use crate::cache::{CacheError, JobCache, Key, Save, Version, What};
use crate::gitlab::transport::{self, BodyError};
use crate::telemetry::chain;
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};
use http_body::Body;
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use std::io;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

/// Bytes that the disk gets, or gives, at once. One transfer has two of them in memory.
const CHUNK: usize = 128 * 1024;

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
        if let Some(upstream) = cache.upstream() {
            return self.upstream(cache, upstream, &key, route, (&parts.headers, body), place).await;
        }
        match route {
            CacheRoute::Save => {
                let since = Instant::now();
                let (answer, what, bytes) = self.save(cache, &key, &parts.headers, body, place).await;
                if let Some(what) = what {
                    cache.note(&key, what, bytes, since);
                }
                answer
            }
            CacheRoute::Fetch | CacheRoute::Look => match cache.find(&key).await {
                None => {
                    cache.note(&key, What::Miss, 0, Instant::now());
                    self.missed()
                }
                Some(version) => self.fetch(cache, (key, version), route, &parts.headers, place).await,
            },
        }
    }

    fn missed(&self) -> Answer {
        self.metrics().cache.inc("miss");
        answer::error(StatusCode::NOT_FOUND)
    }

    async fn fetch(
        &self,
        cache: &JobCache,
        (key, version): (Key, Arc<Version>),
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
        let (cached, of) = (cache.clone(), key.clone());
        if !is_whole || route == CacheRoute::Look {
            // More parts will be asked for, maybe of another daemon. Where the disk is late it goes without.
            let deadline = Instant::now() + self.limits().stall;
            let held = self.on_disk(deadline, async move {
                cached.hold(&of).await;
                Ok(())
            });
            let _ = held.await;
        }
        cache.note(&key, What::Hit, 0, Instant::now());
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
        let reading = (self.writes.clone(), Arc::clone(&place));
        let stored = Stored::new(cache.clone(), (key, version), wanted, reading);
        answer.map(|()| Held::new(Paced::new(stored, pace), place).boxed_unsync())
    }

    /// The answer, what the job's log says of it, and how many bytes that is about.
    async fn save(
        &self,
        cache: &JobCache,
        key: &Key,
        headers: &HeaderMap,
        body: RequestBody,
        place: Place,
    ) -> (Answer, Option<What>, u64) {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let Some(length) = length else { return (self.refuse(StatusCode::LENGTH_REQUIRED, "cache_length"), None, 0) };
        let deadline = Instant::now() + self.limits().transfer_total;
        let pace = Pace { stall: self.limits().stall, deadline, bytes: self.metrics().cache_up_bytes.clone() };
        let (cache, key) = (cache.clone(), key.clone());
        let saved = async {
            let held = Arc::clone(&place);
            let save = self.on_disk(deadline, async move { (cache.save(&key, length).await, held).0 }).await?;
            self.receive(save, body.into_stream(pace), &place, deadline).await
        };
        let (answer, what) = match saved.await {
            Ok(digest) => {
                self.metrics().cache.inc("saved");
                let mut answer = answer::empty(StatusCode::OK);
                put(answer.headers_mut(), header::ETAG, &format!("\"{digest}\""));
                (answer, What::Saved)
            }
            Err(NotSaved::Cache(CacheError::TooLarge(_))) => {
                (self.refuse(StatusCode::PAYLOAD_TOO_LARGE, "cache_too_large"), What::TooLarge)
            }
            Err(NotSaved::Cache(CacheError::NoRoom)) => {
                (self.refuse(StatusCode::FORBIDDEN, "cache_room"), What::NoRoom)
            }
            Err(NotSaved::Cache(CacheError::Length) | NotSaved::Cut) => {
                (self.refuse(StatusCode::BAD_REQUEST, "cache_cut"), What::Cut)
            }
            Err(NotSaved::Cache(error @ CacheError::Io(_))) => {
                // On a file system of its own the room is there when it is looked for, and not any more later.
                let is_full = matches!(&error, CacheError::Io(source) if source.kind() == io::ErrorKind::StorageFull);
                let error = chain(&error);
                self.not_saved.log(|line| tracing::warn!(vm = %self.vm(), job = %self.job, error, "{line}"));
                if is_full {
                    (self.refuse(StatusCode::FORBIDDEN, "cache_room"), What::NoRoom)
                } else {
                    (answer::come_again(StatusCode::SERVICE_UNAVAILABLE), What::Failed)
                }
            }
            Err(NotSaved::Late) => (answer::come_again(StatusCode::SERVICE_UNAVAILABLE), What::Failed),
        };
        (answer, Some(what), length)
    }

    /// Takes the body, a chunk at a time: one goes to the disk while the next one comes, and the disk is waited for now and
    /// then beside both.
    async fn receive(
        &self,
        save: Save,
        mut body: impl Body<Data = Bytes, Error = BodyError> + Unpin,
        place: &Place,
        deadline: Instant,
    ) -> Result<String, NotSaved> {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let mut writing = self.writes.spawn(async move { Ok(save) });
        let mut syncing: Option<JoinHandle<Result<(), CacheError>>> = None;
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
                let mut save = landed(deadline, writing).await?;
                if let Some(sync) = save.sync_due() {
                    if let Some(before) = syncing.take() {
                        landed(deadline, before).await?;
                    }
                    syncing = Some(self.writes.spawn(sync));
                }
                // In a task of its own: a guest that hangs up does not leave it half done, and its place goes with it.
                writing = self.writes.spawn(async move {
                    let put = save.put(bytes).await;
                    drop(held);
                    put.map(|()| save)
                });
                if ended {
                    if let Some(before) = syncing {
                        landed(deadline, before).await?;
                    }
                    let save = landed(deadline, writing).await?;
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
        landed(deadline, self.writes.spawn(work)).await
    }
}

/// What came of work on the disk.
async fn landed<T>(deadline: Instant, work: JoinHandle<Result<T, CacheError>>) -> Result<T, NotSaved> {
    match timeout_at(deadline, work).await {
        Ok(Ok(done)) => done.map_err(NotSaved::Cache),
        // A panic, which its own line reports; or the disk hangs.
        Ok(Err(_)) | Err(_) => Err(NotSaved::Late),
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
