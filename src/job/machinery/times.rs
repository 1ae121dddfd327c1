//! How long is it since GitLab gave the job out, and how long may it take?

use super::Machinery;
use crate::awake::Moment;
use crate::job::Parts;
use crate::job::journal::Record;
use std::time::Duration;
use tokio::time::Instant;

/// Time for a guest of before to find its door open again; a relay tries every 0.2 s.
const REOPENED_GRACE: Duration = Duration::from_secs(20);

/// Longest timeout that we count ourselves (GitLab's own bound is a month). The guest's runner is told GitLab's number.
const TIMEOUT_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// When this task began, and how long after GitLab's 201 that was.
pub(super) struct Times {
    started: Instant,
    awake_since: Moment,
    elapsed_before: Duration,
    /// A former daemon had begun this job's machine.
    adopted: bool,
}

/// How long ago GitLab has given the job out.
pub(in crate::job) fn age(parts: &Parts, record: &Record) -> Duration {
    match record.received_uptime_ms {
        Some(then) => parts.clock.uptime().saturating_sub(Duration::from_millis(then)),
        None => Duration::try_from(parts.clock.now().duration_since(record.received)).unwrap_or_default(),
    }
}

impl Times {
    pub(super) fn of(parts: &Parts, record: &Record) -> Self {
        let elapsed_before = age(parts, record);
        let (started, awake_since) = (Instant::now(), parts.awake.now());
        Self { started, awake_since, elapsed_before, adopted: record.machine.is_some() }
    }

    /// GitLab has given the job out anew just now.
    pub(super) fn begin_anew(&mut self, parts: &Parts) {
        (self.started, self.elapsed_before) = (Instant::now(), Duration::ZERO);
        self.awake_since = parts.awake.now();
    }
}

impl Machinery {
    /// Time since GitLab's 201.
    pub(in crate::job) fn elapsed(&self) -> Duration {
        self.times.elapsed_before + self.times.started.elapsed()
    }

    /// When the host's uptime will be this, in milliseconds.
    pub(in crate::job) fn at_uptime(&self, then_ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(then_ms).saturating_sub(self.parts.clock.uptime())
    }

    /// The instant `after` GitLab's 201; at the earliest when this task began.
    pub(in crate::job) fn since_received(&self, after: Duration) -> Instant {
        self.times.started + after.saturating_sub(self.times.elapsed_before)
    }

    /// Whether the host's uptime has begun anew since GitLab's 201.
    pub(in crate::job) fn host_was_restarted(&self) -> bool {
        let up = self.parts.clock.uptime().as_millis();
        self.record.received_uptime_ms.is_some_and(|then| up < u128::from(then))
    }

    /// The same for what others must do meanwhile: time in which this process did not hear them is not counted.
    pub(in crate::job) fn awake_since_received(&self, after: Duration) -> Instant {
        self.parts.awake.deadline(self.times.awake_since, after.saturating_sub(self.times.elapsed_before))
    }

    /// Until when those who waited while this process slept are given time to be heard.
    pub(in crate::job) fn heard_after_sleep(&self) -> Instant {
        self.parts.awake.woke().map_or(self.times.started, |woke| woke + REOPENED_GRACE)
    }

    /// Until when a guest of before is given time to find its door open again.
    pub(in crate::job) fn reopened(&self) -> Instant {
        if self.times.adopted { self.times.started + REOPENED_GRACE } else { self.times.started }
    }

    /// The job's timeout, or the default for a job without one.
    pub(in crate::job) fn timeout(&self) -> Duration {
        let told = self.record.timeout_s.map(|seconds| Duration::from_secs(seconds).min(TIMEOUT_MAX));
        told.unwrap_or(self.parts.limits.default_timeout.get())
    }

    /// When the job's VM is destroyed at the latest, after GitLab's 201. A job without a timeout
    /// has nobody else to end it, so its default counts to the second.
    pub(in crate::job) fn cap(&self) -> Duration {
        let grace =
            if self.record.timeout_s.is_some() { self.parts.limits.timeout_grace.get() } else { Duration::ZERO };
        self.timeout().saturating_add(grace)
    }
}
