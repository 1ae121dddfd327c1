//! Each planted bug is looked for alone and must be found by the checker of the invariant that it breaks; the run that
//! finds it must be clean without it.

use super::Bug;
use crate::batch::nth;
use crate::plan::Plan;
use crate::report::{keep, say};
use crate::run::{self, Outcome};
use crate::story::Keep;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Jobs within which a bug must be found.
const JOBS_MAX: u64 = 2000;

/// Runs of each bug that are run a second time, for bugs that make two runs of a seed differ.
const TWICE: u64 = 3;

/// The invariant that two runs of a seed are the same.
const SAME_AGAIN: u8 = 22;

/// What found a bug.
struct Found {
    seed: u64,
    jobs: u64,
    by: String,
    /// By two runs that differ.
    differs: bool,
}

/// Tries all of them. `false`: one was missed, or a run is not clean without its bug.
pub(crate) fn all(seed: u64, threads: usize) -> bool {
    say(&format!("seed {seed}"));
    let (mut found, mut missed) = (0, 0);
    for bug in Bug::ALL {
        match hunt(*bug, seed, threads) {
            Some(finding) if is_clean(&finding) => {
                found += 1;
                say(&format!("{bug:?}: found after {} jobs (seed {}): {}", finding.jobs, finding.seed, finding.by));
            }
            Some(finding) => {
                missed += 1;
                let path = keep(&run::run(Plan::for_bugs(finding.seed, None), Keep::Text));
                let Found { seed, by, .. } = finding;
                say(&format!(
                    "{bug:?}: seed {seed} is not clean without it: {by}; its event log is {}",
                    path.display()
                ));
            }
            None => {
                missed += 1;
                say(&format!("{bug:?}: MISSED in {JOBS_MAX} jobs: nothing violates invariant {}", bug.invariant()));
            }
        }
    }
    say(&format!("figure planted.found {found}"));
    say(&format!("figure planted.missed {missed}"));
    missed == 0
}

/// Runs seeds until the bug's invariant is violated.
fn hunt(bug: Bug, seed: u64, threads: usize) -> Option<Found> {
    let (next, jobs, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let found: Mutex<Option<Found>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && jobs.load(Ordering::Relaxed) < JOBS_MAX {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let seed = nth(seed, n);
                    let twice = bug.invariant() == SAME_AGAIN && n < TWICE;
                    let (outcome, differs) = look(seed, Some(bug), twice);
                    let so_far = jobs.fetch_add(outcome.jobs, Ordering::Relaxed) + outcome.jobs;
                    let by = match outcome.violations.iter().find(|found| found.invariant == bug.invariant()) {
                        Some(violation) => violation.to_string(),
                        None if differs => format!("VIOLATION of invariant {SAME_AGAIN}: two runs differ"),
                        None => continue,
                    };
                    stop.store(true, Ordering::Relaxed);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.get_or_insert(Found { seed, jobs: so_far, by, differs });
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// One run; if asked for, whether a second one is another.
fn look(seed: u64, bug: Option<Bug>, twice: bool) -> (Outcome, bool) {
    if !twice {
        return (run::run(Plan::for_bugs(seed, bug), Keep::Nothing), false);
    }
    let [first, second] = [(); 2].map(|()| run::run(Plan::for_bugs(seed, bug), Keep::Digest));
    let differs = (first.digest, first.events) != (second.digest, second.events);
    (first, differs)
}

/// Whether the run that found a bug is clean without it.
fn is_clean(found: &Found) -> bool {
    let (outcome, differs) = look(found.seed, None, found.differs);
    outcome.violations.is_empty() && !differs
}
