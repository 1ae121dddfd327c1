//! Wall time, and nothing else: durations and deadlines are Tokio's, which tests can move.
//!
//! One of the five seams. Wall time is for people (the trace), for protocols (a guest's clock)
//! and for what must outlive a restart (when GitLab's 201 came); nothing waits for it.

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the wall time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Simulated { start: Timestamp, since: Instant },
}

impl Clock {
    /// The host's clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that reads `start` now and goes with Tokio's (pausable) time.
    #[must_use]
    pub fn simulated(start: Timestamp) -> Self {
        Self(Source::Simulated { start, since: Instant::now() })
    }

    /// The wall time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => Timestamp::now(),
            Source::Simulated { start, since } => start.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX),
        }
    }
}
