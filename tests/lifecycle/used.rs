//! The section `machine` at the end of a job's log: what its machine used, written once, and never waited for long.

use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::vm::Usage;
use dayfly_exec::standin::JobState;
use std::time::Duration;

const USED: Usage = Usage {
    memory_peak_bytes: Some(700 << 20),
    memory_bytes: None,
    cpu: Some(Duration::from_secs(12)),
    disk_written_bytes: Some(3 << 20),
    network_received_bytes: None,
    network_sent_bytes: None,
};

const ROW: &str = "  memory, at most: 700.0 MiB\n";

/// Behind the guest's last byte, in a section of its own; not where nothing is known, nor where that takes too long.
#[tokio::test(start_paused = true)]
async fn a_log_ends_with_what_its_machine_used_if_that_is_known_in_time() {
    for (takes, usage, told) in [
        (Duration::ZERO, USED, true),
        (Duration::from_millis(400), USED, true),
        (Duration::from_millis(600), USED, false),
        (Duration::ZERO, Usage::default(), false),
    ] {
        let mut world = World::new(1);
        world.hypervisor.set_usage(takes, usage);
        let jobs = [(world.job(&["print done"]), JobState::Success), (world.job(&["exit 3"]), JobState::Failed)];
        world.start().await.unwrap();
        for (job, state) in jobs {
            world.until(job, state).await;
            let trace = world.trace(job);
            assert_eq!(trace.matches(ROW).count(), usize::from(told), "{takes:?}: {trace}");
            assert_eq!(trace.contains("section_end:") && trace.contains("dayfly_machine"), told, "{trace}");
            if told && state == JobState::Success {
                assert!(trace.find("done\n").unwrap() < trace.find("dayfly_machine").unwrap(), "{trace}");
            }
        }
        world.assert_clean().await;
    }
}

/// Killed at any call of the disk's, before it or behind: the section stands there once.
#[test]
fn the_section_is_written_once_whatever_crash_comes_between() {
    for when in [When::Before, When::After] {
        for call in 1.. {
            let mut died = false;
            paused(async {
                let mut world = World::new(1);
                world.expect_trouble(&["it will be sent again"]);
                world.hypervisor.set_usage(Duration::ZERO, USED);
                let job = world.job(&["print one", "sleep 3", "print done"]);
                world.live(Some(End { seam: Seam::Files, call, when })).await.unwrap();
                world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
                world.settle().await;
                died = world.is_dead();
                if died {
                    world.start().await.unwrap();
                }
                let assigned = world.until_over(job).await;
                if assigned && world.found(job).state == JobState::Success {
                    assert_eq!(world.trace(job).matches(ROW).count(), 1, "call {call}: {}", world.trace(job));
                }
                world.assert_clean().await;
            });
            if !died {
                assert!(call > 10, "only {call} calls");
                break;
            }
        }
    }
}
