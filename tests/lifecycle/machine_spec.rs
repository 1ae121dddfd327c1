//! What machine a job gets stands in its record: no restart with another configuration changes it.

use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::config::Class;
use dayfly::gitlab::JobId;
use dayfly_doubles::fake::Op;
use dayfly_exec::standin::JobState;
use std::time::Duration;

const SCRIPT: &[&str] = &["print begun", "sleep 200", "print finished"];

/// A world of one job at a time, so that what is promised is promised to it.
fn world() -> World {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    world.expect_trouble(&["belongs to no job"]);
    world
}

/// A class that has nothing in common with the one of [`World::new`].
fn large() -> Class {
    Class {
        cpus: 7,
        memory_mib: 4096,
        disk_gib: 40,
        run_as_root: true,
        allow_standin_runner: true,
        ..Class::new("small", "test")
    }
}

/// How the configuration is changed between two daemons.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// The class is edited under its name.
    ClassEdited,
    /// The entry is gone; another of the same GitLab, of another class, is there.
    AnotherEntry,
}

impl Change {
    fn apply(self, world: &mut World) {
        match self {
            Self::ClassEdited => world.config.class = vec![large()],
            Self::AnotherEntry => {
                world.config.runner.clear();
                world.add_runner("another");
                world.config.runner[0].class = "large".into();
                world.config.class = vec![Class { name: "large".into(), ..large() }];
            }
        }
    }
}

/// The machine is the record's, and so is the user of its runner.
fn judge_machine(world: &World, what: &str) {
    let vms = world.hypervisor.vms();
    assert_eq!(vms.len(), 1, "{what}");
    assert_eq!((vms[0].0.cpus, vms[0].0.memory_mib), (1, 512), "{what}");
    let contents = world.files.contents();
    let guest = contents.iter().find(|(path, _)| path.ends_with("guest")).expect("the guest config is kept");
    let guest = String::from_utf8_lossy(&guest.1);
    assert!(guest.contains("\"user\":\"gitlab-runner\"") && guest.contains("\\\"runner\\\""), "{what}: {guest}");
}

async fn judge(world: &mut World, job: JobId, what: &str) {
    world.until_trace(job, "begun").await;
    judge_machine(world, what);
    assert_eq!(world.status().capacity.cpus, 1, "{what}: room is booked for the machine that there is");
    world.until(job, JobState::Success).await;
    assert_eq!(world.machines_started(), 1, "{what}");
    world.assert_clean().await;
}

/// The job is taken by the first daemon, which dies at this call; the next has another configuration.
async fn changed_at(seam: Seam, call: u64, change: Change) {
    let what = format!("{change:?}, killed at {seam:?} {call}");
    let mut world = world();
    let job = world.job(SCRIPT);
    world.live(Some(End { seam, call, when: When::After })).await.unwrap();
    world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
    assert!(world.is_dead(), "{what}");
    change.apply(&mut world);
    world.start().await.unwrap();
    judge(&mut world, job, &what).await;
}

/// U4: accepted, and nothing made: the machine that is made is the one of the class by which the job was taken.
#[test]
fn a_job_that_was_accepted_boots_as_it_was_accepted() {
    let record = first_call(|world| {
        let history = world.files.history();
        history
            .iter()
            .position(|line| line.starts_with("replace ") && line.trim_end_matches(" ok").ends_with("record.json"))
    });
    for change in [Change::ClassEdited, Change::AnotherEntry] {
        paused(changed_at(Seam::Files, record, change));
    }
}

/// U4: booting, the overlay is made; then the machine is started.
#[test]
fn a_job_that_boots_goes_on_with_its_machine() {
    for op in [Op::CreateOverlay, Op::Start] {
        // Its first call, which makes directories, is in no history.
        let call =
            first_call(|world| world.hypervisor.history().iter().filter_map(|entry| entry.op).position(|o| o == op))
                + 1;
        for change in [Change::ClassEdited, Change::AnotherEntry] {
            paused(changed_at(Seam::Hypervisor, call, change));
        }
    }
}

/// U4: running, and in the middle of its end.
#[test]
fn a_job_that_runs_or_is_released_ends_as_it_began() {
    for (change, word) in [
        (Change::ClassEdited, "begun"),
        (Change::AnotherEntry, "begun"),
        (Change::ClassEdited, "finished"),
        (Change::AnotherEntry, "finished"),
    ] {
        paused(changed_when(word, change));
    }
}

/// Killed once GitLab has this word of the job.
async fn changed_when(word: &str, change: Change) {
    let mut world = world();
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_trace(job, word).await;
    if word == "begun" {
        judge_machine(&world, "before");
    } else {
        // Its guest has said how it ended, or does so in a moment.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    world.kill();
    change.apply(&mut world);
    world.start().await.unwrap();
    if word == "begun" {
        judge_machine(&world, &format!("{change:?}"));
    }
    world.until(job, JobState::Success).await;
    assert_eq!(world.machines_started(), 1);
    world.assert_clean().await;
}

/// The number of the first call, counted from one, that `find` finds in the history of a whole life.
fn first_call(find: impl Fn(&World) -> Option<usize>) -> u64 {
    let mut at = None;
    paused(async {
        let mut world = world();
        let job = world.job(SCRIPT);
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        world.until_idle().await;
        at = find(&world);
        world.assert_clean().await;
    });
    at.expect("a life has this call") as u64 + 1
}
