//! What does a job wait for, and until when?

use super::Job;
use crate::awake::Moment;
use crate::job::state::{Event, Grace, State};
use std::time::Duration;
use tokio::time::Instant;

/// How often a job that found no free door looks again; it has until its boot deadline.
const DOOR_PAUSE: Duration = Duration::from_secs(5);

/// How much longer than its update interval a guest with something to say may take to say it.
const UNTOLD_SLACK: Duration = Duration::from_millis(200);

/// How long the disk may refuse a guest's trace before that is given up: the official runner tries a
/// PATCH about as long.
const SPOOL_PATIENCE: Duration = Duration::from_secs(60);

/// A grace that was begun.
#[derive(Clone, Copy)]
pub(super) struct Armed {
    since: Moment,
    pub(super) length: Duration,
    /// The job is over at GitLab, and its guest has not called since: it cannot know.
    untold: bool,
    pub(super) over: bool,
}

impl Job {
    /// The deadline that comes first, and its event.
    pub(super) fn deadline(&self) -> (Instant, Event) {
        let (limits, awake) = (&self.m.parts.limits, &self.m.parts.awake);
        let grace = self.grace.filter(|grace| !grace.over);
        let mut next = grace.map(|grace| (awake.deadline(grace.since, grace.length), Event::GraceOver));
        let mut sooner = |at: Instant, event: Event| {
            if next.as_ref().is_none_or(|(first, _)| at < *first) {
                next = Some((at, event));
            }
        };
        match self.m.record.state {
            State::Booting { .. } => {
                // After a restart the guest's request may be waiting in its relay: it gets time to arrive.
                let deadline = self.m.awake_since_received(limits.boot_deadline.get()).max(self.m.reopened());
                sooner(deadline, Event::BootDeadline);
                sooner(self.m.since_received(self.m.cap()), Event::TimeoutDeadline);
            }
            State::Running { .. } => {
                // Its guest tries again and again, so this is looked at often enough.
                if let Some(since) = self.m.spool_failing_since() {
                    sooner((since + SPOOL_PATIENCE).max(self.m.heard_after_sleep()), Event::HostDiskFailed);
                }
                let silence = awake.deadline(self.m.last_spoke, limits.silence_deadline.get());
                sooner(silence, Event::SilenceDeadline);
                // Its machine was not asleep, so this counts on; but its verdict may be waiting to be heard.
                let cap = self.m.since_received(self.m.cap()).max(self.m.heard_after_sleep());
                sooner(cap, Event::TimeoutDeadline);
            }
            State::Releasing { kept_until: Some(until), .. } => sooner(self.m.at_uptime(until), Event::KeepOver),
            State::Accepted | State::Releasing { .. } | State::Ended => {}
        }
        // A job that only waits for its uploader or machine still wakes now and then.
        next.unwrap_or_else(|| (Instant::now() + Duration::from_secs(3600), Event::GraceOver))
    }

    /// Begins a grace, in place of the one before.
    pub(super) fn arm(&mut self, grace: Grace) {
        let limits = &self.m.parts.limits;
        let length = match grace {
            Grace::Canceling => limits.canceling_grace.get(),
            // A silent guest would learn it after up to 30 s; what it could end by then GitLab takes no more.
            Grace::Over => limits.cancel_grace.get().min(limits.guest_update_interval.get() + UNTOLD_SLACK),
            Grace::PowerOff => limits.power_off_grace.get(),
            Grace::Door => DOOR_PAUSE,
        };
        let since = self.m.parts.awake.now();
        self.grace = Some(Armed { since, length, untold: grace == Grace::Over, over: false });
    }

    /// The guest has made a call since its job was over at GitLab, and read so: it gets its grace to end properly.
    pub(super) fn told_of_the_end(&mut self) {
        let Some(grace) = self.grace.as_mut().filter(|grace| grace.untold) else { return };
        grace.untold = false;
        if !grace.over {
            (grace.since, grace.length) = (self.m.parts.awake.now(), self.m.parts.limits.cancel_grace.get());
        }
    }
}
