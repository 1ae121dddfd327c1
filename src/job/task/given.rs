//! What does it mean that a guest asks for its job? By what it was given, and has shown of that.

use super::Job;
use crate::job::state::{Ask, State};
use std::time::Duration;
use tokio::time::Instant;

/// A second ask is answered with the payload again only this long after the first (V5): parallel
/// asks are one runner's slip or a hostile guest; an ask after a failed write comes 3 s later.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// So often a job is given to a guest that shows no work of it, as far as is known in vain: a runner that cannot read
/// the payload (of a newer GitLab than itself) asks every 3 s.
const HAND_OUTS_MAX: u32 = 3;

/// What a guest was given by this task.
#[derive(Default)]
pub(super) struct Given {
    last: Option<Instant>,
    /// How often, those times left out that are known to be lost.
    times: u32,
    /// It has made a call for its job since.
    pub(super) spoke: bool,
    /// Its verdict could not be written down, and has not come again since.
    pub(super) verdict_unkept: bool,
}

impl Given {
    /// What is known of it when this task begins.
    pub(super) fn before(spoke: bool) -> Self {
        Self { spoke, ..Self::default() }
    }

    /// It is given the job now.
    pub(super) fn now(&mut self) {
        self.last = Some(Instant::now());
        self.times += 1;
    }

    /// The answer did not reach it.
    pub(super) fn lost(&mut self) {
        self.last = None;
        self.times = self.times.saturating_sub(1);
    }

    /// What an ask means. `first`: it was given nothing yet, by this daemon or another; `in_time`: there is something to
    /// give.
    fn ask(&self, first: bool, in_time: bool) -> Ask {
        let rested = self.last.is_none_or(|at| at.elapsed() >= ASK_AGAIN_AFTER);
        if !first && (self.spoke || !rested) {
            Ask::Busy
        } else if !first && self.times >= HAND_OUTS_MAX {
            Ask::Untaken
        } else if !in_time {
            Ask::TooLate
        } else {
            Ask::Idle
        }
    }
}

impl Job {
    /// What it means that the guest asks now.
    pub(super) fn ask(&self) -> Ask {
        if self.m.is_being_replaced() {
            // It came up after all, and its end is on the way.
            return Ask::Busy;
        }
        self.given.ask(matches!(self.m.record.state, State::Booting { .. }), self.m.is_in_time())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// V5: the job again to a guest that rests and has shown no work of it, three times; to one that works, never.
    #[tokio::test(start_paused = true)]
    async fn a_guest_is_given_its_job_again_until_it_shows_work_of_it() {
        let mut given = Given::default();
        assert_eq!((given.ask(true, true), given.ask(true, false)), (Ask::Idle, Ask::TooLate));
        for _ in 0..HAND_OUTS_MAX {
            given.now();
            assert_eq!(given.ask(false, true), Ask::Busy, "a moment ago");
            tokio::time::sleep(ASK_AGAIN_AFTER).await;
        }
        assert_eq!(given.ask(false, true), Ask::Untaken);
        // Known to be lost, it does not count, and nobody waits for a rest.
        given.now();
        given.lost();
        assert_eq!(given.ask(false, true), Ask::Untaken);
        given.lost();
        assert_eq!((given.ask(false, true), given.ask(false, false)), (Ask::Idle, Ask::TooLate));
        given.spoke = true;
        tokio::time::sleep(ASK_AGAIN_AFTER).await;
        assert_eq!(given.ask(false, true), Ask::Busy, "it works");
        // After a restart, by what it has written.
        assert_eq!(Given::before(true).ask(false, true), Ask::Busy);
        assert_eq!(Given::before(false).ask(false, true), Ask::Idle);
    }
}
