//! What clients sent: every request with its headers, for tests to look at. Bounded.

use super::routes::Route;
use crate::gitlab::JobId;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use jiff::Timestamp;
use std::collections::VecDeque;
use std::fmt;

/// More requests than any test makes on purpose; older ones are forgotten.
const ENTRIES_MAX: usize = 20_000;

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
    /// Its body, if it was read whole and is at most 64 KiB.
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
        if self.entries.len() == ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
        number
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Recorded> {
        let first = self.entries.front()?.number;
        self.entries.get_mut(usize::try_from(number.checked_sub(first)?).ok()?)
    }
}
