//! What is printed: tables, violations and how to repeat them, figures last.

use crate::batch::{self, Total};
use crate::kinds::Kind;
use crate::plan::Plan;
use crate::run::{self, Outcome};
use crate::story::Keep;
use std::path::PathBuf;
use tokio::time::Instant;

/// Runs of so many jobs. `false`: something was violated.
pub(crate) fn jobs(jobs: u64, seed: Option<u64>, threads: usize, twice: u64) -> bool {
    let seed = seed.unwrap_or_else(fresh_seed);
    say(&format!("seed {seed}"));
    // Outside of any runtime: real time.
    let began = Instant::now();
    let total = batch::run(seed, jobs, threads);
    let seconds = began.elapsed().as_secs_f64();
    let different = batch::twice(seed, twice, threads);
    for outcome in &total.bad {
        tell(outcome);
    }
    for seed in &different {
        say(&format!("VIOLATION of invariant 22: two runs of seed {seed} differ"));
    }
    table(&total);
    let (rarest, least) = total.hits.rarest();
    let hours = total.virtual_time.as_secs() / 3600;
    say(&format!(
        "{} runs, {} events, {hours} virtual hours; three kinds of faults or more in {} % of the runs; the rarest is {rarest:?} ({})",
        total.runs,
        total.events,
        total.rich * 100 / total.runs.max(1),
        rarest.ids()
    ));
    let violations: usize = total.bad.iter().map(|outcome| outcome.violations.len()).sum::<usize>() + different.len();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let speed = total.jobs as f64 / seconds / threads as f64;
    if twice > 0 {
        say(&format!("figure sim.same_twice {}", twice - different.len() as u64));
    }
    say(&format!("figure sim.jobs {}", total.jobs));
    say(&format!("figure sim.violations {violations}"));
    say(&format!("figure sim.fault_kinds {}", total.hits.kinds()));
    say(&format!("figure sim.min_hits {least}"));
    say(&format!("figure sim.jobs_per_second {speed:.0}"));
    violations == 0
}

/// One run, told in full.
pub(crate) fn one(seed: u64) -> bool {
    let outcome = run::run(Plan::draw(seed), Keep::Text);
    let path = keep(&outcome);
    say(&format!("seed {seed}: {} jobs, {} events, log in {}", outcome.jobs, outcome.events, path.display()));
    for violation in &outcome.violations {
        say(&violation.to_string());
    }
    outcome.violations.is_empty()
}

/// A run that violates something: what, and how to see it again.
fn tell(outcome: &Outcome) {
    say(&format!("--- seed {}", outcome.seed));
    for violation in &outcome.violations {
        say(&violation.to_string());
    }
    // The same again, this time written down.
    let again = run::run(Plan::draw(outcome.seed), Keep::Text);
    if again.violations != outcome.violations {
        say("VIOLATION of invariant 22: told again, the run is another one");
    }
    let path = keep(&again);
    say(&format!("its event log is {}; again: scripts/sim --seed {} --jobs 1", path.display(), outcome.seed));
}

/// Writes a run's event log to a file.
pub(crate) fn keep(outcome: &Outcome) -> PathBuf {
    let path = std::env::temp_dir().join(format!("dayfly-sim-{}.log", outcome.seed));
    if let Err(error) = std::fs::write(&path, &outcome.text) {
        say(&format!("cannot write {}: {error}", path.display()));
    }
    path
}

fn table(total: &Total) {
    for kind in Kind::ALL {
        say(&format!("{:>8}  {:<10} {kind:?}: {}", total.hits.of(*kind), kind.ids(), kind.words()));
    }
}

/// A seed that nobody chose.
pub(crate) fn fresh_seed() -> u64 {
    u64::from_le_bytes(dayfly::rng::Rng::system().bytes()) >> 20
}

/// A line of output.
#[expect(clippy::print_stdout, reason = "this is what a tool is for")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}
