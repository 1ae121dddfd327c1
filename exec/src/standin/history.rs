//! What clients sent: every request with its headers, for tests to look at. Bounded.

use super::routes::Route;
use bytes::Bytes;
use dayfly::gitlab::JobId;
use http::{HeaderMap, Method, StatusCode, Uri};
use jiff::Timestamp;
use std::collections::VecDeque;
use std::fmt;

/// More requests than any test makes on purpose; older ones are forgotten.
const ENTRIES_MAX: usize = 20_000;

/// What bodies and headers of the requests that are kept may take together: a client that is a stranger
/// (`exec`'s guest) could fill the entries with the largest bodies.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// Bodies up to this size are kept with the request: all of the API's JSON, no trace piece of a flood.
pub(super) const BODY_KEPT_BYTES: usize = 64 << 10;

/// One request as it came. Its headers and body hold secrets: `Debug` shows neither.
#[derive(Clone)]
pub struct Recorded {
    /// Number of the request, from 0.
    pub number: u64,
    /// When it came.
    pub at: Timestamp,
    /// Number of its TCP connection; 0 for calls in the process.
    pub connection: u64,
    /// Its method.
    pub method: Method,
    /// Its target.
    pub uri: Uri,
    /// What it asked for.
    pub route: Route,
    /// The job in its path.
    pub job: Option<JobId>,
    /// All its headers.
    pub headers: HeaderMap,
    /// Its body, if it was read whole, is at most 64 KiB and no piece of trace.
    pub body: Option<Bytes>,
    /// Bytes of its body that were read.
    pub body_bytes: u64,
    /// What was answered; `None`: not yet, or the connection was cut.
    pub status: Option<StatusCode>,
    /// Whether a planned fault touched it.
    pub faulted: bool,
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status.map_or_else(|| "-".to_owned(), |status| status.as_u16().to_string());
        let fault = if self.faulted { " (fault)" } else { "" };
        let (at, method, path) = (self.at, &self.method, self.uri.path());
        write!(f, "#{} {at} {method} {path} {} B -> {status}{fault}", self.number, self.body_bytes)
    }
}

/// All requests, oldest first.
#[derive(Default)]
pub struct History {
    entries: VecDeque<Recorded>,
    next: u64,
    /// Bytes of all entries' heads and bodies.
    kept_bytes: usize,
}

impl History {
    /// The requests that are still known, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Recorded> {
        self.entries.iter()
    }

    /// How many requests there ever were.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.next
    }

    /// The requests of one route.
    pub fn of(&self, route: Route) -> impl Iterator<Item = &Recorded> {
        self.entries.iter().filter(move |entry| entry.route == route)
    }

    pub(super) fn push(&mut self, mut entry: Recorded) -> u64 {
        let number = self.next;
        entry.number = number;
        self.next += 1;
        self.kept_bytes += weight(&entry);
        self.entries.push_back(entry);
        self.forget();
        number
    }

    /// Keeps the body of a request that is still known.
    pub(super) fn keep_body(&mut self, number: u64, body: &Bytes) {
        let Some(entry) = self.get_mut(number) else { return };
        let before = weight(entry);
        entry.body = Some(body.clone());
        let after = weight(entry);
        self.kept_bytes = (self.kept_bytes + after).saturating_sub(before);
        self.forget();
    }

    /// The oldest requests go, until the rest fits.
    fn forget(&mut self) {
        while self.entries.len() > ENTRIES_MAX || self.kept_bytes > KEPT_BYTES_MAX {
            let Some(oldest) = self.entries.pop_front() else { return };
            self.kept_bytes = self.kept_bytes.saturating_sub(weight(&oldest));
        }
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Recorded> {
        let first = self.entries.front()?.number;
        self.entries.get_mut(usize::try_from(number.checked_sub(first)?).ok()?)
    }
}

/// Bytes that an entry holds beside itself.
fn weight(entry: &Recorded) -> usize {
    let headers: usize = entry.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let target = entry.uri.path_and_query().map_or(0, |target| target.as_str().len());
    headers + target + entry.body.as_ref().map_or(0, Bytes::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U31: what a client sends again and again does not add up in memory
    #[test]
    fn the_oldest_requests_go_when_the_rest_is_heavy() {
        let mut history = History::default();
        let entry = Recorded {
            number: 0,
            at: Timestamp::UNIX_EPOCH,
            connection: 1,
            method: Method::PUT,
            uri: Uri::from_static("/api/v4/jobs/1"),
            route: Route::UpdateJob,
            job: None,
            headers: HeaderMap::new(),
            body: None,
            body_bytes: 0,
            status: None,
            faulted: false,
        };
        let body = Bytes::from(vec![0; BODY_KEPT_BYTES]);
        for _ in 0..ENTRIES_MAX {
            let number = history.push(entry.clone());
            history.keep_body(number, &body);
        }
        let kept: usize = history.iter().map(weight).sum();
        assert_eq!(kept, history.kept_bytes);
        assert!(kept <= KEPT_BYTES_MAX && kept > KEPT_BYTES_MAX / 2, "{kept}");
        assert_eq!(history.total(), ENTRIES_MAX as u64);
        assert_eq!(history.iter().last().map(|entry| entry.number), Some(ENTRIES_MAX as u64 - 1));
    }
}
