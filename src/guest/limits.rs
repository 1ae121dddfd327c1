//! How fast may a guest go? Token buckets that delay rather than drop.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A token bucket. Taking may run into debt; the debtor waits for as long as the debt lasts, so a
/// guest that sends too fast is slowed down (back-pressure), and nothing of it is lost.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: f64,
    burst: f64,
    /// Tokens (negative: debt) at a moment. Held for a few lines, never across an await.
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    /// A full one. A rate below 1 counts as 1.
    pub(super) fn new(per_second: u64, burst: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "rates lie far below 2^53")]
        let (per_second, burst) = (per_second.max(1) as f64, burst as f64);
        Self { per_second, burst, level: Mutex::new((burst, Instant::now())) }
    }

    /// Takes `amount` and says how long to wait before going on; `None` (and nothing taken) if that
    /// were longer than `wait_max`.
    pub(super) fn take(&self, amount: usize, wait_max: Duration) -> Option<Duration> {
        let now = Instant::now();
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = level.0 + now.saturating_duration_since(level.1).as_secs_f64() * self.per_second;
        #[expect(clippy::cast_precision_loss, reason = "bodies lie far below 2^53 bytes")]
        let left = filled.min(self.burst) - amount as f64;
        let wait = Duration::from_secs_f64((-left).max(0.0) / self.per_second);
        if wait > wait_max {
            return None;
        }
        *level = (left, now);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_lets_its_burst_through_and_then_its_rate() {
        let bucket = Bucket::new(50, 100);
        let none = Some(Duration::ZERO);
        assert!((0..100).all(|_| bucket.take(1, Duration::ZERO) == none));
        assert_eq!(bucket.take(1, Duration::ZERO), None, "a refused one takes nothing");
        assert_eq!(bucket.take(1, Duration::from_secs(1)), Some(Duration::from_millis(20)));
        assert_eq!(bucket.take(1, Duration::from_secs(1)), Some(Duration::from_millis(40)));
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(bucket.take(100, Duration::ZERO), none, "an hour fills no more than the burst");
        assert_eq!(bucket.take(50, Duration::MAX), Some(Duration::from_secs(1)));
    }
}
