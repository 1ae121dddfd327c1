//! Wall time and uptime, and nothing else: durations and deadlines are Tokio's, which tests can move.
//!
//! One of the seams. Wall time is for people (the trace) and for protocols (a guest's clock): somebody may set it.
//! The host's uptime is for deadlines that must outlive a restart of the daemon (when GitLab's 201 came). Nothing waits
//! for either.

use jiff::Timestamp;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long a simulated host has been up when its clock is made, in milliseconds.
const SIMULATED_UPTIME_MS: i64 = 1_000_000;

/// Tells the wall time and the uptime.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    /// `ahead_ms`: how far somebody has set it since; `up_before_ms`: for how long the host had been up at `since`,
    /// less than nothing if it was started later. In milliseconds.
    Simulated {
        start: Timestamp,
        since: Instant,
        ahead_ms: Arc<AtomicI64>,
        up_before_ms: Arc<AtomicI64>,
    },
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
        let up_before_ms = Arc::new(AtomicI64::new(SIMULATED_UPTIME_MS));
        Self(Source::Simulated { start, since: Instant::now(), ahead_ms: Arc::default(), up_before_ms })
    }

    /// How long the host has been up, suspended or not. Less than before only after a reboot.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        match &self.0 {
            Source::System => {
                let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
                Duration::new(u64::try_from(up.tv_sec).unwrap_or(0), u32::try_from(up.tv_nsec).unwrap_or(0))
            }
            Source::Simulated { since, up_before_ms, .. } => {
                let up = up_before_ms.load(Ordering::Relaxed).saturating_add(whole_ms(since.elapsed()));
                Duration::from_millis(u64::try_from(up).unwrap_or(0))
            }
        }
    }

    /// Lets a simulated host start anew: its uptime, and that of all clones, begins at nothing (threats.md H5).
    pub fn reboot(&self) {
        if let Source::Simulated { since, up_before_ms, .. } = &self.0 {
            up_before_ms.store(-whole_ms(since.elapsed()), Ordering::Relaxed);
        }
    }

    /// Sets a simulated clock, and all its clones, forward or back, as an administrator or a time server does
    /// (threats.md E9). The host's clock is not ours to set.
    pub fn jump(&self, forward: bool, by: Duration) {
        if let Source::Simulated { ahead_ms, .. } = &self.0 {
            let by = whole_ms(by);
            ahead_ms.fetch_add(if forward { by } else { -by }, Ordering::Relaxed);
        }
    }

    /// The wall time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => Timestamp::now(),
            Source::Simulated { start, since, ahead_ms, .. } => {
                let ahead = jiff::SignedDuration::from_millis(ahead_ms.load(Ordering::Relaxed));
                let now = start.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX);
                now.saturating_add(ahead).unwrap_or(now)
            }
        }
    }
}

fn whole_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
