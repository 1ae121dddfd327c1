//! `cache:` from an operator's own S3 store: what the host's disk would answer, streamed through.
//!
//! A store that fails is an empty one for reads, and a line in the job's log for both.

use super::ranges::{Ranged, range};
use super::{BINARY, BYTES, Place, put};
use crate::cache::{JobCache, Key, Upstream, UpstreamError, What};
use crate::gitlab::transport::{self, BodyError};
use crate::guest::answer::{self, Answer};
use crate::guest::body::{Held, Pace, Paced, RequestBody};
use crate::guest::handler::Handler;
use crate::guest::routes::CacheRoute;
use crate::telemetry::chain;
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// An object whose length is not known is not asked for ranges of.
const WHOLE_MAX: u64 = u64::MAX;

impl Handler {
    /// One request to the store behind.
    pub(super) async fn upstream(
        &self,
        cache: &JobCache,
        upstream: &Upstream,
        key: &Key,
        route: CacheRoute,
        (headers, body): (&HeaderMap, RequestBody),
        place: Place,
    ) -> Answer {
        let since = Instant::now();
        match route {
            CacheRoute::Save => {
                let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
                let Some(length) = length else { return self.refuse(StatusCode::LENGTH_REQUIRED, "cache_length") };
                let (answer, what) = self.save_upstream(cache, (upstream, key), length, body).await;
                cache.note(key, what, length, since);
                drop(place);
                answer
            }
            CacheRoute::Fetch | CacheRoute::Look => {
                // Which part of how much is the store's to say; what is no range is none.
                let asked = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
                let asked = asked.filter(|_| !matches!(range(headers, WHOLE_MAX), Ranged::Whole));
                // A look at all is a look at its first byte: the answer to that says the whole length.
                let asked = if route == CacheRoute::Look { Some("bytes=0-0") } else { asked };
                match cache.find_upstream(upstream, key, asked, self.limits().transfer_total).await {
                    Ok(None) => {
                        cache.note(key, What::Miss, 0, since);
                        self.missed()
                    }
                    Ok(Some(found)) => self.passed(cache, key, (found, route), place),
                    Err(error) => {
                        self.upstream_failed(&error);
                        cache.note(key, What::Failed, 0, since);
                        self.missed()
                    }
                }
            }
        }
    }

    fn upstream_failed(&self, error: &UpstreamError) {
        self.metrics().cache.inc("failed");
        let error = chain(error);
        self.not_saved.log(|_| {
            tracing::warn!(vm = %self.vm(), job = %self.job, error, "the store of caches (`cache.upstream`) fails");
        });
    }

    /// What the store says, with no header of its own but these.
    fn passed(
        &self,
        cache: &JobCache,
        key: &Key,
        (found, route): (Response<transport::Body>, CacheRoute),
        place: Place,
    ) -> Answer {
        let (parts, body) = found.into_parts();
        let text = |name: header::HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let content_range = text(header::CONTENT_RANGE).filter(|text| text.starts_with("bytes "));
        if parts.status == StatusCode::RANGE_NOT_SATISFIABLE {
            let mut answer = self.refuse(StatusCode::RANGE_NOT_SATISFIABLE, "cache_range");
            if let Some(text) = content_range {
                put(answer.headers_mut(), header::CONTENT_RANGE, text);
            }
            return answer;
        }
        let is_part = parts.status == StatusCode::PARTIAL_CONTENT;
        if !is_part || content_range.is_some_and(|text| text.starts_with("bytes 0-0/")) {
            self.metrics().cache.inc("hit");
        }
        cache.note(key, What::Hit, 0, Instant::now());
        let mut answer = Response::new(());
        let whole = content_range.and_then(|text| text.rsplit_once('/')?.1.parse::<u64>().ok());
        let length = body.size_hint().exact();
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, BINARY);
        headers.insert(header::ACCEPT_RANGES, BYTES);
        for name in [header::ETAG, header::LAST_MODIFIED] {
            if let Some(value) = parts.headers.get(&name) {
                headers.insert(name, value.clone());
            }
        }
        if route == CacheRoute::Look {
            // A store that knows no ranges gives all of it.
            if let Some(whole) = whole.or(length.filter(|_| !is_part)) {
                put(headers, header::CONTENT_LENGTH, &whole.to_string());
            }
            return answer.map(|()| transport::full(""));
        }
        if let (true, Some(text)) = (is_part, content_range) {
            put(headers, header::CONTENT_RANGE, text);
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        let deadline = Instant::now() + self.limits().transfer_total;
        let pace = Pace { stall: self.limits().stall, deadline, bytes: self.metrics().cache_down_bytes.clone() };
        let noted = Noted { body, cache: cache.clone(), key: key.clone() };
        answer.map(|()| Held::new(Paced::new(noted, pace), place).boxed_unsync())
    }

    async fn save_upstream(
        &self,
        cache: &JobCache,
        (upstream, key): (&Upstream, &Key),
        length: u64,
        body: RequestBody,
    ) -> (Answer, What) {
        if length > cache.bytes_max() {
            return (self.refuse(StatusCode::PAYLOAD_TOO_LARGE, "cache_too_large"), What::TooLarge);
        }
        let total = self.limits().transfer_total;
        let pace = Pace {
            stall: self.limits().stall,
            deadline: Instant::now() + total,
            bytes: self.metrics().cache_up_bytes.clone(),
        };
        let ended = body.ended();
        let body = body.into_stream(pace).boxed_unsync();
        match cache.save_upstream(upstream, key, (length, body), total).await {
            Ok(()) => {
                self.metrics().cache.inc("saved");
                (answer::empty(StatusCode::OK), What::Saved)
            }
            // The guest broke off, and so the store has nothing.
            Err(UpstreamError::Transport(_)) if !ended.load(std::sync::atomic::Ordering::Acquire) => {
                (self.refuse(StatusCode::BAD_REQUEST, "cache_cut"), What::Cut)
            }
            Err(error) => {
                self.upstream_failed(&error);
                // No 5xx, or the helper sends it all again.
                (self.refuse(StatusCode::FORBIDDEN, "cache_upstream"), What::Failed)
            }
        }
    }
}

/// A body of the store's whose bytes are noted for the job.
struct Noted {
    body: transport::Body,
    cache: JobCache,
    key: Key,
}

impl Body for Noted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = self.get_mut();
        let polled = Pin::new(&mut me.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            me.cache.note(&me.key, What::Hit, data.len() as u64, Instant::now());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
