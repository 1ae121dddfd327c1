//! Jobs whose machines are restored from one that was frozen, and those of which nothing comes.
//!
//! The keeper of goldens works on real files; here the test is the keeper, with the daemon's own list of them.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly::gitlab::JobId;
use dayfly::supply::goldens::{Golden, HostTraits, Key};
use dayfly::vm::{Accel, Frozen, Hypervisor as _, VmName, VmState};
use dayfly_doubles::fake::{Fault, GuestMachine, Op};
use dayfly_exec::standin::JobState;
use dayfly_guest_config::GuestConfig;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

const STATE: &str = "/state/goldens/a/state";

fn host() -> HostTraits {
    HostTraits {
        hypervisor: "fake".into(),
        accel: Accel::Tcg,
        kernel: "k".into(),
        cpu: "c".into(),
        machine_id: "1".repeat(32),
    }
}

/// Freezes the only machine that runs, for what the daemon wishes for.
async fn freeze(world: &World) -> Key {
    let wanted = world.goldens().wanted().expect("a job has booted that could have been restored");
    assert!(wanted.config.pass.is_empty() && wanted.config.seed.is_empty(), "nothing of the job is kept");
    let name = VmName::from(world.hypervisor.vms()[0].0.id.clone());
    let sha256 = world.hypervisor.freeze(&name, Path::new(STATE)).await.unwrap();
    world.hypervisor.resume(name.id());
    let frozen = Frozen { state: STATE.into(), sha256, disk: "/state/goldens/a/disk.qcow2".into() };
    let golden = Golden { frozen, image: wanted.spec.image, runner: "runner".into(), bytes: 1 << 28, made_s: 0 };
    world.goldens().add(wanted.key.clone(), golden);
    wanted.key
}

/// A world in which the next job is restored: the first has booted.
async fn world() -> World {
    let mut world = World::new(18);
    world.config.concurrent = 1;
    world.start().await.unwrap();
    world.goldens().begin(host());
    let job = world.job(&["print first", "sleep 60"]);
    world.until(job, JobState::Running).await;
    world.until_trace(job, "first").await;
    freeze(&world).await;
    world.until(job, JobState::Success).await;
    assert!(!world.trace(job).contains("restored"), "it booted");
    world
}

async fn succeeds(world: &World) -> (JobId, Duration) {
    let since = Instant::now();
    let job = world.job(&["print hello"]);
    world.until(job, JobState::Success).await;
    (job, since.elapsed())
}

/// What guests are told from now on.
fn told(world: &World) -> Arc<Mutex<Vec<GuestConfig>>> {
    let told = Arc::<Mutex<Vec<GuestConfig>>>::default();
    let tell = told.clone();
    world.set_guest(move |mut guest: Guest| {
        tell.lock().unwrap().push(guest.config.clone());
        async move {
            if let Some(payload) = guest.ask().await {
                guest.work(&payload).await;
            }
            guest.power_off().await;
        }
    });
    told
}

#[tokio::test(start_paused = true)]
async fn a_job_is_restored_once_there_is_something_to_restore_it_from() {
    let mut world = world().await;
    let (job, _) = succeeds(&world).await;
    assert!(world.trace(job).contains("machine restored"), "{}", world.trace(job));
    let history = world.hypervisor.history();
    assert!(history.iter().any(|entry| entry.op.is_none() && entry.outcome == "restored"), "{}", world.histories());
    let golden = &world.status().goldens[0];
    assert_eq!((golden.image.as_str(), golden.runner.as_str(), golden.bytes), ("test", "runner", 1 << 28));
    assert!(world.metrics().contains("dayfly_start_seconds_count{start=\"restored\"} 1"), "{}", world.metrics());
    world.assert_clean().await;
}

/// Each machine has names and secrets of its own, whatever it is restored from; its runner is told the same.
#[tokio::test(start_paused = true)]
async fn what_a_restored_guest_is_told_is_its_own() {
    let mut world = world().await;
    let configs = told(&world);
    for _ in 0..2 {
        let (job, _) = succeeds(&world).await;
        assert!(world.trace(job).contains("machine restored"));
    }
    let configs = configs.lock().unwrap().clone();
    let [a, b] = &configs[..] else { panic!() };
    assert!(a.runner == b.runner && !a.hold && !b.hold);
    for (a, b) in [
        (&a.vm, &b.vm),
        (&a.pass, &b.pass),
        (&a.hostname, &b.hostname),
        (&a.machine_id, &b.machine_id),
        (&a.boot_id, &b.boot_id),
        (&a.seed, &b.seed),
    ] {
        assert_ne!(a, b);
    }
    world.assert_clean().await;
}

/// One line for the author, none for anybody else to act on, and the job runs.
#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_restored_boots_in_its_own_stead() {
    for (op, fault) in [
        (Op::Start, Fault::Refused("migration failed")),
        (Op::Start, Fault::HangsAfterEffect),
        (Op::GoOn, Fault::Refused("it is `inmigrate`")),
        (Op::GoOn, Fault::Unreachable),
    ] {
        let mut world = world().await;
        world.expect_trouble(&["restore a machine; it boots instead"]);
        world.hypervisor.fail_nth(op, 1, fault);
        let (job, _) = succeeds(&world).await;
        let trace = world.trace(job);
        assert!(trace.matches("could not be restored; it boots").count() == 1, "{op:?} {fault:?}\n{trace}");
        assert_eq!(world.hypervisor.counts().vms, 0);
        // Once is chance.
        let (job, _) = succeeds(&world).await;
        assert!(world.trace(job).contains("machine restored"));
        world.assert_clean().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_fails_twice_in_a_row_is_thrown_away_and_told() {
    let mut world = world().await;
    world.expect_trouble(&["restore a machine; it boots instead", "could not be restored twice in a row"]);
    for left in [1, 0] {
        world.hypervisor.fail_nth(Op::GoOn, 1, Fault::Refused("no"));
        succeeds(&world).await;
        assert_eq!(world.goldens().list().len(), left);
    }
    assert!(world.status().daemon.problems[0].contains("a frozen machine of image `test` could not be restored"));
    let (job, _) = succeeds(&world).await;
    assert!(!world.trace(job).contains("restored"), "it boots, without a word");
    world.assert_clean().await;
}

/// One bit: not one machine more goes on from it.
#[tokio::test(start_paused = true)]
async fn what_is_not_what_was_frozen_is_refused_at_once() {
    let mut world = world().await;
    world.expect_trouble(&["restore a machine; it boots instead", "is not what was frozen any more"]);
    world.hypervisor.damage(Path::new(STATE));
    let (job, _) = succeeds(&world).await;
    assert!(world.trace(job).contains("could not be restored; it boots"));
    assert!(world.goldens().list().is_empty());
    assert!(world.status().daemon.problems[0].contains("is not what was frozen any more"));
    world.assert_clean().await;
}

/// It hangs, or ends, before its guest has shown the pass: within the same boot deadline another way is taken.
#[tokio::test(start_paused = true)]
async fn a_restored_guest_that_is_not_heard_of_is_booted_instead() {
    for ends in [false, true] {
        let mut world = world().await;
        world.expect_trouble(&["restore a machine; it boots instead"]);
        let memory = world.memory.clone();
        world.hypervisor.set_guest(move |machine: GuestMachine| {
            let memory = memory.clone();
            async move {
                match (&machine.spec.frozen, ends) {
                    (Some(_), false) => std::future::pending().await,
                    (Some(_), true) => {}
                    (None, _) => Guest::run(machine, memory).await,
                }
            }
        });
        let (job, took) = succeeds(&world).await;
        assert!(world.trace(job).contains("could not be restored; it boots"), "{}", world.trace(job));
        assert!((took > Duration::from_secs(20)) != ends, "{took:?}");
        world.assert_clean().await;
    }
}

/// A daemon that dies between restore and going on leaves a machine that stands still: the next one lets it go on.
#[tokio::test(start_paused = true)]
async fn a_machine_that_a_dead_daemon_left_standing_goes_on() {
    let mut world = world().await;
    let told = told(&world);
    world.hypervisor.fail_nth(Op::GoOn, 1, Fault::Hangs);
    let job = world.job(&["print hello"]);
    while !world.hypervisor.vms().iter().any(|(_, state)| matches!(state, VmState::Paused(_))) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.kill();
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert_eq!(told.lock().unwrap().len(), 1, "no other machine was made");
    assert!(world.trace(job).contains("machine started"), "{}", world.trace(job));
    world.assert_clean().await;
}

/// A class whose machines are to boot wishes for nothing.
#[tokio::test(start_paused = true)]
async fn a_class_that_wants_its_machines_to_boot_is_left_alone() {
    let mut world = World::new(19);
    world.config.class[0].start = dayfly::machine_spec::Start::Cold;
    world.start().await.unwrap();
    world.goldens().begin(host());
    succeeds(&world).await;
    assert!(world.goldens().wanted().is_none());
    world.assert_clean().await;
}
