//! Each outward call of one job's life fails once (threats.md B3).
//!
//! Whatever it was, the job ends with one verdict, an honest one, with all of its trace, and
//! nothing is left: `assert_clean` knows. A daemon that does not start is started again, as
//! systemd would.

use crate::support::world::{World, paused};
use dayfly_doubles::fake;
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use std::io;
use std::time::Duration;
use tokio::time::sleep;

const SCRIPT: &[&str] = &["print one", "sleep 5", "upload 1000", "print two", "sleep 4", "print three"];

/// More calls than a life has; a loop that goes on for ever is a bug of its own.
const CALLS_MAX: u64 = 500;

/// What is in every line of trouble: each fault may say something.
const ANYTHING: &[&str] = &[""];

/// Who meets the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meets {
    /// The daemon that takes the job.
    First,
    /// The one that adopts it this many seconds later.
    Second(u64),
}

/// How many of the jobs of a loop did not succeed.
#[derive(Debug, Default)]
struct Tally {
    calls: u64,
    failed: Vec<u64>,
}

/// One job with a fault planned before the daemon starts. `false`: the fault is still to come.
async fn story(
    meets: Meets,
    n: u64,
    plan: &dyn Fn(&World),
    pending: &dyn Fn(&World) -> bool,
    tally: &mut Tally,
) -> bool {
    let mut world = World::new(1);
    world.expect_trouble(ANYTHING);
    let job = world.job(SCRIPT);
    if let Meets::Second(after) = meets {
        world.start().await.unwrap();
        sleep(Duration::from_secs(after)).await;
        world.hand_over().await;
    }
    plan(&world);
    if world.start().await.is_err() {
        world.start().await.expect("the fault comes once");
    }
    let written_down = world.until_over(job).await;
    let lost = world.requests(Route::RequestJob).iter().any(|poll| poll.faulted && poll.status.is_none());
    let (found, trace) = (world.found(job), world.trace(job));
    match found.state {
        JobState::Success => assert!(trace.ends_with("three\nJob succeeded\n"), "call {n}: {trace}"),
        // K1, K2: the answer that carried the job was lost, which nobody can mend.
        JobState::Failed if lost && !written_down => {
            assert_eq!(found.failure_reason.as_deref(), Some("no_updates_running"), "{}", world.histories());
            tally.failed.push(n);
        }
        JobState::Failed => {
            let reason = found.failure_reason.as_deref();
            assert_eq!(reason, Some("runner_system_failure"), "call {n}: {trace}\n{}", world.histories());
            assert!(trace.contains("dayfly: for your operators"), "call {n}: {trace}\n{}", world.histories());
            assert!(
                !trace.contains("was restarted"),
                "nobody restarted this host; call {n}: {trace}\n{}",
                world.histories()
            );
            tally.failed.push(n);
        }
        state => panic!("call {n}: {state:?}\n{}", world.histories()),
    }
    let met = !pending(&world);
    world.settle().await;
    world.assert_clean().await;
    met
}

/// Goes through the calls of one life until the fault is not met any more.
fn every_call(meets: Meets, plan: impl Fn(&World, u64), pending: impl Fn(&World, u64) -> bool) -> Tally {
    let mut tally = Tally::default();
    for n in 1..CALLS_MAX {
        let mut met = false;
        paused(async { met = story(meets, n, &|w| plan(w, n), &|w| pending(w, n), &mut tally).await });
        if !met {
            tally.calls = n - 1;
            return tally;
        }
    }
    panic!("the job's life has no end");
}

/// H6, H8, H9: a write that fails is not written; whoever needed it says so.
#[test]
fn a_call_of_the_file_layer_that_fails_costs_at_most_its_job() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        let tally = every_call(Meets::First, |w, n| w.files.fail_call(n, kind), |w, _| w.files.failure_pending());
        assert!(tally.calls > 30 && tally.failed.len() < 8, "{tally:?}");
    }
}

/// H8: a file that cannot be read once, by the daemon that adopts a job.
#[test]
fn a_call_of_the_file_layer_that_fails_in_an_adoption_costs_no_job() {
    for after in [1, 8] {
        let plan = |w: &World, n| w.files.fail_call(n, io::ErrorKind::Other);
        let tally = every_call(Meets::Second(after), plan, |w, _| w.files.failure_pending());
        assert!(tally.calls > 15 && tally.failed.is_empty(), "{tally:?}");
    }
}

/// H1: likewise a call to the hypervisor.
#[test]
fn a_call_to_the_hypervisor_that_fails_in_an_adoption_costs_no_job() {
    for after in [1, 8] {
        let tally = every_call(Meets::Second(after), |w, n| w.hypervisor.fail_call(n), |_, n| n > 25);
        assert!(tally.failed.is_empty(), "{tally:?}");
    }
}

/// V1, V14, H1: before the effect, after it, and without an answer.
#[test]
fn a_call_to_the_hypervisor_that_fails_costs_no_job() {
    use fake::Fault::{AnswerLost, Hangs, HangsAfterEffect, Refused, Unreachable};
    for fault in [Unreachable, Refused("injected"), AnswerLost, Hangs, HangsAfterEffect] {
        let plan = |w: &World, n: u64| {
            let mut left = n;
            w.hypervisor.judge_calls(move |_, _| {
                left = left.saturating_sub(1);
                (left == 0).then(|| std::mem::replace(&mut left, u64::MAX)).map(|_| fault)
            });
        };
        // The calls of a life go on with its list: those of the job come first.
        let tally = every_call(Meets::First, plan, |w, n| w.hypervisor.calls() < n || n > 60);
        assert!(tally.calls > 15 && tally.failed.is_empty(), "{fault:?}: {tally:?}");
    }
}

/// G1, G2, R1, R2, R10: refused, cut before GitLab took it, cut after.
#[test]
fn a_request_to_gitlab_that_fails_costs_no_job() {
    let faults =
        [Fault::status(500), Fault::html(503), Fault::DropBeforeApply, Fault::ApplyThenDrop, Fault::DropInBody(5)];
    for fault in faults {
        // The polls of a runner go on for ever: those of the job come first.
        let plan = |w: &World, n: u64| w.standin.script(Matcher::any().after(n - 1), fault.clone());
        let tally = every_call(Meets::First, plan, |_, n| n > 24);
        assert!(tally.failed.len() <= 1, "{tally:?}");
    }
}
