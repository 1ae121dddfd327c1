//! The same seed gives the same event log.

use crate::support::world::{World, paused};
use dayfly_exec::standin::JobState;

/// What GitLab and the hypervisor saw of a few jobs, in order, with their virtual times and ids.
fn event_log(seed: u64) -> String {
    let mut log = String::new();
    paused(async {
        let mut world = World::new(seed);
        world.add_runner("second");
        let jobs = [
            world.job(&["print one", "sleep 12"]),
            world.job(&["exit 3"]),
            world.job(&["print three", "sleep 40", "upload 1000"]),
            world.job(&["sleep 5"]),
            world.job(&["print five"]),
        ];
        world.start().await.unwrap();
        world.until(jobs[1], JobState::Failed).await;
        for job in [jobs[0], jobs[2], jobs[3], jobs[4]] {
            world.until(job, JobState::Success).await;
        }
        world.assert_clean().await;
        for entry in world.hypervisor.history() {
            log.push_str(&format!("{entry:?}\n"));
        }
        for request in world.standin.requests() {
            log.push_str(&format!("{request:?}\n"));
        }
        for job in jobs {
            log.push_str(&world.trace(job));
        }
    });
    log
}

/// Invariant 22, for the parts that a seed decides: ids, jitter, order.
#[test]
fn the_same_seed_gives_the_same_event_log() {
    let first = event_log(7);
    assert!(first.len() > 10_000, "there is something to compare");
    for (a, b) in first.lines().zip(event_log(7).lines()) {
        assert_eq!(a, b);
    }
    assert_ne!(first, event_log(8), "another seed is another story");
}
