//! The daemon is killed where it stands, at each call of one job's life, and the next one goes on.

use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly_exec::standin::JobState;

/// What a job does in these stories: trace before, between and after, and an artifact.
const SCRIPT: &[&str] = &["print one", "sleep 5", "upload 1000", "print two", "sleep 4", "print three"];

/// More calls than a life has; a loop that goes on for ever is a bug of its own.
const CALLS_MAX: u64 = 500;

/// One life that ends at this call, then another that must bring the job to its end. `false`: the
/// job ended before.
async fn story(end: End) -> bool {
    let mut world = World::new(1);
    let job = world.job(SCRIPT);
    world.live(Some(end)).await.unwrap();
    world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
    if !world.is_dead() {
        // The verdict is there, and what is left of the life is the removal of what was kept.
        world.settle().await;
    }
    let died = world.is_dead();
    if died {
        world.start().await.unwrap();
    }
    let assigned = world.until_over(job).await;
    let found = world.found(job);
    let lost = found.failure_reason.as_deref() == Some("no_updates_running");
    // K1 to K3, GitLab gave the job to a daemon that died before it was written down.
    if !lost || assigned {
        assert_eq!(found.state, JobState::Success, "killed {end:?}: {:?}\n{}", found.failure_reason, world.histories());
        assert!(world.trace(job).ends_with("three\nJob succeeded\n"), "killed {end:?}");
    }
    world.assert_clean().await;
    died
}

fn every_call(seam: Seam) {
    for when in [When::Before, When::After] {
        let mut call = 1;
        loop {
            let mut died = false;
            paused(async { died = story(End { seam, call, when }).await });
            if !died {
                break;
            }
            call += 1;
            assert!(call < CALLS_MAX, "the job's life has no end");
        }
        assert!(call > 10, "only {call} calls of {seam:?} were seen");
    }
}

/// No place in a job's life where a kill costs the job or leaves anything behind.
#[test]
fn a_daemon_killed_at_any_write_costs_no_job() {
    every_call(Seam::Files);
}

/// Likewise around each call to the hypervisor.
#[test]
fn a_daemon_killed_at_any_call_to_the_hypervisor_costs_no_job() {
    every_call(Seam::Hypervisor);
}

/// Likewise around each call to GitLab.
#[test]
fn a_daemon_killed_at_any_call_to_gitlab_costs_no_job() {
    every_call(Seam::GitLab);
}

/// Invariant 4: a failure of ours is explained exactly once, wherever in between the daemon was killed.
#[test]
fn a_failure_is_explained_once_whatever_write_the_daemon_was_killed_at() {
    for when in [When::Before, When::After] {
        for call in 1..CALLS_MAX {
            let mut died = false;
            paused(async {
                let mut world = World::new(1);
                world.expect_trouble(&["in the middle of the job"]);
                let job = world.job(&["print begun", "sleep 5", "crash"]);
                world.live(Some(End { seam: Seam::Files, call, when })).await.unwrap();
                world.until_dead_or(job, &[JobState::Failed]).await;
                if !world.is_dead() {
                    world.settle().await;
                }
                died = world.is_dead();
                if died {
                    world.start().await.unwrap();
                }
                let assigned = world.until_over(job).await;
                let (found, trace) = (world.found(job), world.trace(job));
                let lost = found.failure_reason.as_deref() == Some("no_updates_running");
                if !lost || assigned {
                    let lines = trace.matches("dayfly: for your operators: job").count();
                    assert_eq!(lines, 1, "killed {when:?} call {call}: {trace}\n{}", world.histories());
                    assert!(trace.contains("its process crashed or was killed in the middle of the job"), "{trace}");
                }
                world.assert_clean().await;
            });
            if !died {
                break;
            }
        }
    }
}
