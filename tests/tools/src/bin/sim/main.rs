//! The simulation: the whole daemon through its seams, on paused time, against seeded faults and random lives.
//!
//! ```text
//!     sim --jobs N [--seed S]     runs of that many jobs in all; with S the first run is that seed's
//!     sim --seed S                that run alone, its event log printed to a file
//!     sim --planted               each planted bug must be found
//!     sim --soak                  24 hours in one life of a daemon
//! ```
//!
//! A run draws everything from its seed ([`plan`]): host, runners, jobs, guests good and bad, faults at each seam, an
//! operator, and the ends of the daemon's lives. What passes is told to the [`story`], noted in the [`ledger`], and
//! judged by one checker for each invariant of threats.md §4 ([`check`]). 0: nothing was violated; 1: something was;
//! 64: bad arguments.

mod args;
mod batch;
mod check;
mod clones;
mod dice;
mod event;
mod guest;
mod kinds;
mod ledger;
mod operator;
mod panics;
mod plan;
mod planted;
mod report;
mod run;
mod seams;
mod soak;
mod story;
mod tokens;
mod world;

#[path = "../../../../support/log.rs"]
#[expect(unreachable_pub, dead_code, reason = "shared with the lifecycle ring")]
mod log;
#[path = "../../../../support/mortal.rs"]
#[expect(unreachable_pub, dead_code, reason = "shared with the lifecycle ring")]
mod mortal;

use args::Task;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(problem) => {
            eprintln!("{problem}\n{}", args::USAGE);
            return ExitCode::from(64);
        }
    };
    panics::watch();
    let good = match args.task {
        Task::Jobs { jobs, seed } => report::jobs(jobs, seed, args.threads, args.twice),
        Task::One { seed } => report::one(seed),
        Task::Planted { seed } => planted::all(seed.unwrap_or_else(report::fresh_seed), args.threads),
        Task::Soak { seed } => soak::soak(seed.unwrap_or_else(report::fresh_seed)),
    };
    tokens::clear();
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
