//! Many runs on several threads: seeds one after the other, counts added up, the first violation told in full.

use crate::kinds::Hits;
use crate::plan::Plan;
use crate::run::{self, Outcome};
use crate::story::Keep;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Runs that are told to the end after a violation; more would only hide the first.
const VIOLATIONS_MAX: u64 = 5;

/// What a batch comes to.
#[derive(Default)]
pub(crate) struct Total {
    pub(crate) runs: u64,
    pub(crate) jobs: u64,
    pub(crate) events: u64,
    pub(crate) hits: Hits,
    /// Runs with at least three kinds of faults.
    pub(crate) rich: u64,
    pub(crate) virtual_time: Duration,
    /// Runs that violate something, in the order of their seeds.
    pub(crate) bad: Vec<Outcome>,
}

impl Total {
    fn add(&mut self, outcome: Outcome) {
        self.runs += 1;
        self.jobs += outcome.jobs;
        self.events += outcome.events;
        self.virtual_time += outcome.virtual_time;
        self.rich += u64::from(outcome.hits.kinds() >= 3);
        self.hits.add(&outcome.hits);
        if !outcome.violations.is_empty() {
            self.bad.push(outcome);
        }
    }
}

/// The seed of the n-th run: the first is the given one, so that it repeats alone.
pub(crate) fn nth(seed: u64, n: u64) -> u64 {
    seed.wrapping_add(n.wrapping_mul(0x9e37_79b9))
}

/// Runs seeds until there were so many jobs.
pub(crate) fn run(seed: u64, jobs: u64, threads: usize) -> Total {
    let total = Mutex::new(Total::default());
    let (next, taken, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let plan = Plan::draw(nth(seed, n));
                    if taken.fetch_add(plan.jobs.len() as u64, Ordering::Relaxed) >= jobs {
                        break;
                    }
                    let outcome = run::run(plan, Keep::Nothing);
                    let mut total = total.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    total.add(outcome);
                    if total.bad.len() as u64 >= VIOLATIONS_MAX {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut total = total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    total.bad.sort_by_key(|outcome| outcome.seed.wrapping_sub(seed));
    total
}

/// Seeds of which two runs differ: invariant 22.
pub(crate) fn twice(seed: u64, runs: u64, threads: usize) -> Vec<u64> {
    let different = Mutex::new(Vec::new());
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= runs {
                        break;
                    }
                    let seed = nth(seed, n);
                    let [a, b] = [(); 2].map(|()| run::run(Plan::draw(seed), Keep::Digest));
                    if (a.digest, a.events) != (b.digest, b.events) {
                        different.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(seed);
                    }
                }
            });
        }
    });
    different.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
