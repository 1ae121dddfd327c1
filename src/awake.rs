//! For how long did this process not run?
//!
//! A daemon that was stopped (SIGSTOP, a frozen cgroup, a host that is starved) hears nobody meanwhile: a deadline that
//! asks whether somebody has spoken must not count that time. A task looks at the clock every few seconds; where two
//! looks are further apart, the process slept. Whoever reads looks, too, so it does not matter which timer fires first
//! after the sleep. The job's own timeout counts on: its machine was not asleep.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Between two looks.
const TICK: Duration = Duration::from_secs(5);

/// So much later than due a look may come on a busy host.
const SLACK: Duration = Duration::from_secs(5);

/// What is known of this process's sleep. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Awake(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// `None`: nobody watches, and nothing counts as sleep.
    last: Option<Instant>,
    slept: Duration,
    woke: Option<Instant>,
}

/// A point of time, and how long the process had slept by then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    slept: Duration,
}

impl Awake {
    /// Looks again and again, for ever.
    pub async fn watch(self) {
        self.seen().last = Some(Instant::now());
        loop {
            tokio::time::sleep(TICK).await;
            self.look();
        }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Moment {
        let slept = self.look().0;
        Moment { at: Instant::now(), slept }
    }

    /// When `since` lies `after` back, the sleep in between not counted, as far as is known by now: ask again then.
    #[must_use]
    pub fn deadline(&self, since: Moment, after: Duration) -> Instant {
        since.at + after + self.look().0.saturating_sub(since.slept)
    }

    /// How long ago that was, the sleep in between not counted.
    #[must_use]
    pub fn elapsed(&self, since: Moment) -> Duration {
        let slept = self.look().0.saturating_sub(since.slept);
        since.at.elapsed().saturating_sub(slept)
    }

    /// When the process last woke from a sleep.
    #[must_use]
    pub fn woke(&self) -> Option<Instant> {
        self.look().1
    }

    fn look(&self) -> (Duration, Option<Instant>) {
        let now = Instant::now();
        let mut seen = self.seen();
        if let Some(last) = &mut seen.last {
            let gap = now.saturating_duration_since(*last);
            *last = now;
            if gap > TICK + SLACK {
                tracing::warn!(seconds = gap.as_secs(), "this process did not run for a while; its deadlines wait");
                seen.slept += gap - TICK;
                seen.woke = Some(now);
            }
        }
        (seen.slept, seen.woke)
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U7: what the process slept is not counted, whoever looks first.
    #[tokio::test(start_paused = true)]
    async fn sleep_is_not_counted() {
        let awake = Awake::default();
        let since = awake.now();
        let minutes = Duration::from_secs(600);
        tokio::time::sleep(minutes).await;
        assert_eq!(awake.elapsed(since), minutes, "nobody watches yet");
        #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
        tokio::spawn(awake.clone().watch());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (since, limit) = (awake.now(), Duration::from_secs(60));
        let due = awake.deadline(since, limit);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(awake.deadline(since, limit), due);
        // As after SIGSTOP: the clock has gone on, and no timer has fired.
        tokio::time::advance(minutes).await;
        let counted = awake.elapsed(since);
        assert!((30..=40).contains(&counted.as_secs()), "{counted:?}");
        assert!(awake.deadline(since, limit) > Instant::now() + Duration::from_secs(19));
        assert!(awake.woke().is_some());
        tokio::time::sleep(minutes).await;
        assert!(awake.elapsed(since) > minutes, "awake since");
    }
}
