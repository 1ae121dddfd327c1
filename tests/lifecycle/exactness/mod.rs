//! Trace exactness (threats.md invariant 5): whatever guest, GitLab and daemon go through, GitLab's
//! bytes are our first lines ‖ the guest's bytes ‖ our last lines, nothing lost, nothing twice.
//!
//! Two rigs run the same random plans. [`rig`] is the smallest thing that is real: door, spool and
//! uploader, between a guest that a plan drives and the stand-in, with a harness for the job's few
//! decisions; thousands of plans. [`whole`] is the daemon, killed and started again; hundreds.
//! A failing plan is shrunk and printed. `DAYFLY_EXACTNESS_CASES` and `DAYFLY_EXACTNESS_SEED` run
//! more of them, or others.

mod client; // what a guest does to its door
mod moods; // what GitLab does to the uploader, and what it must never hold
mod plan; // what happens in one case
mod rig; // door, spool and uploader alone
mod whole; // the whole daemon

use dayfly_exec::standin::Persist;
use plan::Plan;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::io::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// Threads of one property: each runs its share of the cases with seeds of its own.
const THREADS: u32 = 2;

/// Runs `case` on this many random plans, and says so in the output, which `cargo test` does not hold back.
fn hold(name: &str, cases: u32, kinds: plan::Kinds, case: fn(&Plan) -> Result<(), String>) {
    let setting = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    // A setting is about the rig's cases; the whole daemon keeps its share of them.
    let cases = setting("DAYFLY_EXACTNESS_CASES").map_or(cases, |n| n.saturating_mul(cases) / RIG_CASES).max(THREADS);
    let seed = setting("DAYFLY_EXACTNESS_SEED").unwrap_or(1);
    let done = AtomicU32::new(0);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let share = cases / THREADS + u32::from(thread < cases % THREADS);
                let done = &done;
                scope.spawn(move || run(name, share, (seed, thread), kinds, case, done))
            })
            .collect();
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let done = done.load(Ordering::Relaxed);
    assert!(done >= cases, "only {done} of {cases} cases ran");
    // On a line of its own, whatever the test harness has printed.
    writeln!(std::io::stdout().lock(), "\nfigure exactness.{name} {done} cases").unwrap();
}

fn run(
    name: &str,
    cases: u32,
    (seed, thread): (u32, u32),
    kinds: plan::Kinds,
    case: fn(&Plan) -> Result<(), String>,
    done: &AtomicU32,
) {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&seed.to_le_bytes());
    bytes[4..8].copy_from_slice(&thread.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::XorShift, &bytes));
    let outcome = runner.run(&plan::plans(kinds), |plan| {
        done.fetch_add(1, Ordering::Relaxed);
        case(&plan).map_err(TestCaseError::fail)
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(why, plan)) => {
            panic!("exactness.{name}, seed {seed}: {why}\nthe smallest plan that fails so:\n{plan:?}")
        }
        Err(TestError::Abort(why)) => panic!("exactness.{name}: {why}"),
    }
}

/// Plans of the property over door, spool and uploader.
const RIG_CASES: u32 = 10_400;

/// Plans of the property over the whole daemon.
const WHOLE_CASES: u32 = 400;

/// R1, R2, R3, R5, R6, R7, R8, R9, R13: any guest, any mood of GitLab, any number of restarts.
#[test]
fn gitlab_holds_exactly_the_spool_whatever_happens() {
    hold("rig", RIG_CASES, plan::Kinds::RIG, rig::case);
}

/// R4: a GitLab that names more bytes than there are is believed, counted, and asked once more before the verdict.
#[test]
fn a_size_beyond_the_end_is_counted_and_asked_for_again() {
    let plan = Plan {
        log: plan::Log { flavour: plan::Flavour::Lines, start: 0, length: 500 },
        moves: Vec::new(),
        ending: plan::Ending::Verdict { success: true },
        // The first call says that the job runs, the second is a PATCH.
        moods: vec![plan::Mood::Fine, plan::Mood::Wrong(plan::Range::Higher(77))],
        last_moods: Vec::new(),
        persist: Persist::AtOnce,
        interval: None,
        kills: Vec::new(),
        first_lines: 0,
        room: None,
    };
    let counted = rig::counted(&plan).unwrap();
    assert!(counted.contains("trace_ahead_total 1\n"), "{counted}");
}

/// R2, R9, R10, R11, K12, K14: the same through the whole daemon, killed at any call.
#[test]
fn gitlab_holds_exactly_the_trace_of_a_daemon_that_is_killed() {
    hold("whole", WHOLE_CASES, plan::Kinds::WHOLE, whole::case);
}
