//! What does GitLab not take, and for how long do we wait for that? (U12)
//!
//! While GitLab is away everything waits, for a day if need be. A GitLab that answers, takes the state of the job and
//! not its trace (a broken object store, a proxy that cuts bodies, a checksum that never matches) would hold the
//! verdict as long. So time counts from the first state that it took while nothing more of the trace went through.

use crate::awake::{Awake, Moment};
use prometheus_client::metrics::gauge::Gauge;
use std::time::Duration;

/// What is known of a trace that does not go through.
pub(super) struct Owed {
    awake: Awake,
    /// Most bytes that GitLab has held.
    most: u64,
    /// The last PATCH was not taken.
    failing: bool,
    /// GitLab has taken the job's state since, and no call has failed for want of GitLab itself.
    stuck: Option<Moment>,
    /// When the verdict was known.
    verdict: Option<Moment>,
    /// Counted among the jobs whose log or verdict GitLab has not taken.
    waiting: Option<Counted>,
    gauge: Gauge,
}

/// One more in a gauge, until it is dropped.
struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Bytes that wait here, in a gauge of all jobs'.
#[derive(Debug)]
pub(super) struct Backlog {
    gauge: Gauge,
    bytes: i64,
}

impl Backlog {
    pub(super) fn new(gauge: Gauge) -> Self {
        Self { gauge, bytes: 0 }
    }

    /// So many wait now.
    pub(super) fn is(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.gauge.inc_by(bytes - std::mem::replace(&mut self.bytes, bytes));
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.gauge.dec_by(self.bytes);
    }
}

impl Owed {
    pub(super) fn new(awake: Awake, gauge: Gauge) -> Self {
        Self { awake, most: 0, failing: false, stuck: None, verdict: None, waiting: None, gauge }
    }

    /// GitLab holds so many bytes. `true`: it did not take them for a while.
    pub(super) fn holds(&mut self, bytes: u64) -> bool {
        if bytes <= self.most && self.stuck.is_some() {
            return false;
        }
        self.most = self.most.max(bytes);
        (self.failing, self.stuck) = (false, None);
        self.taken()
    }

    /// It took a state, or the verdict but for the trace. `true`: it did not for a while.
    pub(super) fn took_state(&mut self, without_the_trace: bool) -> bool {
        if self.failing || without_the_trace {
            self.stuck.get_or_insert_with(|| self.awake.now());
            return false;
        }
        self.taken()
    }

    fn taken(&mut self) -> bool {
        self.waiting.take().is_some()
    }

    /// It did not take a piece of the trace, or asked for another again and again.
    pub(super) fn trace_failed(&mut self) {
        self.failing = true;
        self.wait();
    }

    /// It did not take the state either: it is away.
    pub(super) fn state_failed(&mut self) {
        self.stuck = None;
        self.wait();
    }

    fn wait(&mut self) {
        if self.waiting.is_none() {
            self.gauge.inc();
            self.waiting = Some(Counted(self.gauge.clone()));
        }
    }

    /// Whether the state is to be told between two pieces: the last of them was not taken.
    pub(super) fn is_failing(&self) -> bool {
        self.failing
    }

    /// There is a verdict.
    pub(super) fn verdict(&mut self) {
        if self.verdict.is_none() {
            self.verdict = Some(self.awake.now());
        }
    }

    /// For how long there has been one.
    pub(super) fn verdict_for(&self) -> Duration {
        self.verdict.map_or(Duration::ZERO, |since| self.awake.elapsed(since))
    }

    /// Whether the verdict has waited for the trace, and GitLab was there, for `patience`.
    pub(super) fn is_hopeless(&self, patience: Duration) -> bool {
        self.verdict_for() >= patience && self.stuck.is_some_and(|since| self.awake.elapsed(since) >= patience)
    }
}
