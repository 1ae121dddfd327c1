//! The invariants of threats.md §4, each a checker of its own: asked at each event, and at the end.
//!
//! 7's argv and XML and 21's counting allocator mean nothing in memory: 7 looks at everything that guests, files and
//! the log get, 21 at the spool's bound (and the soak at the process's memory). 22 is two runs of one seed: `batch`.

mod bounds;
mod concurrency;
mod credentials;
mod deadlines;
mod ends_once;
mod first_wins;
mod foreign;
mod journal_first;
mod liveness;
mod one_job_per_vm;
mod our_failures;
mod payload;
mod rate;
mod reconcile;
mod resources;
mod secrets;

mod success_stands;
mod trace;
mod upstream;
mod user_code;

pub(crate) use secrets::{JOB_CANARY, RUNNER_CANARY, Secrets};

use crate::event::{Event, GuestDoes};
use crate::ledger::{At, Ledger};
use crate::plan::Plan;
use std::fmt;

/// Judges one invariant.
pub(crate) trait Checker: Send {
    /// Called at each event, after the ledger has noted it.
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings);

    /// Called when nothing is left to happen.
    fn end(&mut self, _: &Ledger, _: &mut Findings) {}
}

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) invariant: u8,
    pub(crate) at: At,
    pub(crate) sentence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VIOLATION of invariant {} at {:.3} s: {}", self.invariant, self.at.as_secs_f64(), self.sentence)
    }
}

/// What was found. Bounded: one broken thing breaks many.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) now: At,
    pub(crate) all: Vec<Violation>,
    told: usize,
}

/// Findings kept of one run.
const FINDINGS_MAX: usize = 20;

impl Findings {
    pub(crate) fn add(&mut self, invariant: u8, sentence: impl Into<String>) {
        let sentence = sentence.into();
        let known = self.all.iter().any(|known| known.invariant == invariant && known.sentence == sentence);
        if self.all.len() < FINDINGS_MAX && !known {
            self.all.push(Violation { invariant, at: self.now, sentence });
        }
    }

    /// Adds what is not so.
    pub(crate) fn unless(&mut self, holds: bool, invariant: u8, sentence: impl FnOnce() -> String) {
        if !holds {
            self.add(invariant, sentence());
        }
    }

    /// Those not seen before.
    pub(crate) fn news(&mut self) -> impl Iterator<Item = &Violation> {
        let from = std::mem::replace(&mut self.told, self.all.len());
        self.all[from..].iter()
    }
}

/// One of each.
pub(crate) fn all(plan: &Plan) -> Vec<Box<dyn Checker>> {
    vec![
        Box::new(ends_once::EndsOnce),
        Box::new(first_wins::FirstWins::default()),
        Box::new(success_stands::SuccessStands),
        Box::new(our_failures::OurFailures::new(plan)),
        Box::new(trace::Trace::default()),
        Box::new(payload::Payload),
        Box::new(secrets::Secrets::default()),
        Box::new(credentials::Credentials),
        Box::new(upstream::Upstream),
        Box::new(user_code::UserCode),
        Box::new(one_job_per_vm::OneJobPerVm::default()),
        Box::new(resources::Resources),
        Box::new(concurrency::Concurrency::new(plan)),
        Box::new(foreign::Foreign),
        Box::new(journal_first::JournalFirst),
        Box::new(reconcile::Reconcile),
        Box::new(deadlines::Deadlines::new(plan)),
        Box::new(liveness::Liveness::default()),
        Box::new(rate::Rate::default()),
        Box::new(bounds::Bounds::new(plan)),
        Box::new(FromGuests),
    ]
}

/// What guests saw that must not be.
struct FromGuests;

impl Checker for FromGuests {
    fn on(&mut self, event: &Event<'_>, _: &Ledger, findings: &mut Findings) {
        if let Event::Guest { job, does: GuestDoes::Wrong { invariant, what }, .. } = event {
            findings.add(*invariant, format!("a guest of job {job} saw that {what}"));
        }
    }
}
