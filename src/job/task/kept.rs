//! Is the machine of this job kept when it fails? By its record, by how many are kept, and not in a drain.

use super::Job;
use crate::job::state::{Event, State};
use std::time::Duration;
use tokio::time::Instant;

impl Job {
    /// The event, with the word that the machine is to be kept should the job fail by it. Only ends that leave a machine
    /// to look at are meant: the guest's own verdict, its silence, its timeout.
    pub(super) fn keeping(&mut self, event: Event) -> Event {
        let fails = match &event {
            Event::GuestVerdict(verdict) => !verdict.success,
            Event::SilenceDeadline | Event::TimeoutDeadline => true,
            _ => false,
        };
        let keep = self.m.record.machine_spec.as_ref().and_then(|spec| spec.keep_failed);
        let runs = matches!(self.m.record.state, State::Running { canceling: false });
        let Some(keep) = keep.filter(|_| fails && runs && !self.m.parts.drain.is_cancelled()) else { return event };
        self.kept = self.m.parts.keeps.take(&self.m.record.class, keep.at_once);
        if self.kept.is_none() {
            tracing::info!("the machine of this job is not kept: as many of its class are kept as may be");
            return event;
        }
        let until = self.m.parts.clock.uptime() + Duration::from_secs(keep.for_s);
        Event::KeepIfFailed { until: u64::try_from(until.as_millis()).unwrap_or(u64::MAX), event: Box::new(event) }
    }

    /// Says in status and log what can be done until then.
    pub(super) fn say_kept(&mut self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let until = self.m.parts.clock.now() + left;
        let job = self.m.record.key.id;
        let until = until.strftime("%H:%M:%S UTC");
        self.say_phase(&format!("kept until {until}, for `dayfly shell {job}`"));
        self.m.note("the machine is kept for an operator");
        tracing::warn!(
            seconds = left.as_secs(),
            "the job failed, and its machine is kept: `dayfly shell {job}` looks inside, `dayfly kill {job}` ends it"
        );
    }
}
