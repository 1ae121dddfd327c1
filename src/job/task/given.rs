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
}

impl Job {
    pub(super) fn ask(&self) -> Ask {
        if self.m.is_being_replaced() {
            // It came up after all, and its end is on the way.
            return Ask::Busy;
        }
        let first = matches!(self.m.record.state, State::Booting { .. });
        let rested = self.given.last.is_none_or(|at| at.elapsed() >= ASK_AGAIN_AFTER);
        let works = self.given.spoke;
        if !first && (works || !rested) {
            Ask::Busy
        } else if !first && self.given.times >= HAND_OUTS_MAX {
            Ask::Untaken
        } else if !self.m.is_in_time() {
            Ask::TooLate
        } else {
            Ask::Idle
        }
    }
}
