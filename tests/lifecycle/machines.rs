//! What a machine may do to its job.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly::network::Listen as _;
use dayfly_doubles::fake::{Fault, GuestMachine, Op};
use dayfly_exec::standin::JobState;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;

/// V2: the author is told, with what the console said; nothing is tried again.
#[tokio::test(start_paused = true)]
async fn a_machine_that_never_asks_fails_the_job_with_our_fault() {
    let mut world = World::new(1);
    world.expect_trouble(&["did not ask for the job in time", "never asked for its job"]);
    world.hypervisor.set_guest(|mut machine: GuestMachine| async move {
        machine.console.write_all(b"Kernel panic - not syncing\r\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world
        .until_failed(
            job,
            "runner_system_failure",
            "the virtual machine was not ready within 5 min. Your job is not the cause",
        )
        .await;
    let (found, trace) = (world.found(job), world.trace(job));
    assert!(trace.contains("  | Kernel panic - not syncing"), "{trace}");
    let ran = found.finished_at.unwrap().duration_since(found.started_at.unwrap()).as_secs();
    assert!((300..=310).contains(&ran), "{ran}");
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// V1: replaced once, on a fresh overlay.
#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_made_is_replaced_once() {
    for op in [Op::Start, Op::CreateOverlay, Op::State] {
        let mut world = World::new(1);
        world.expect_trouble(&["the machine could not be made"]);
        world.hypervisor.fail_nth(op, 1, Fault::Refused("cannot allocate memory"));
        let job = world.job(&["print hello"]);
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).contains("taking another"), "{}", world.trace(job));
        world.assert_clean().await;
        assert_eq!(world.machines_started(), 1);
    }
}

/// V1: the second failure is the end.
#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_made_twice_fails_the_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["the machine could not be made", "no machine could be made"]);
    world.hypervisor.fail_always(Op::Start, Fault::Refused("cannot allocate memory"));
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world
        .until_failed(job, "runner_system_failure", "no virtual machine could be started. Your job is not the cause")
        .await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 0);
}

/// The first `deaths` machines die before they ask.
fn die_booting(world: &World, deaths: u32) {
    let memory = world.memory.clone();
    let born = Arc::new(AtomicU32::new(0));
    world.hypervisor.set_guest(move |machine: GuestMachine| {
        let (memory, born) = (memory.clone(), born.clone());
        async move {
            if born.fetch_add(1, Ordering::SeqCst) < deaths {
                machine.power.crash();
                std::future::pending::<()>().await;
            }
            Guest::run(machine, memory).await;
        }
    });
}

/// V8: before its first request, a machine that dies is replaced.
#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_booting_is_replaced_once() {
    let mut world = World::new(1);
    die_booting(&world, 1);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    let history = world.hypervisor.history();
    let started = history.iter().filter(|entry| entry.op.is_none() && entry.outcome == "started");
    let names: BTreeSet<&str> = started.map(|entry| entry.subject.as_str()).collect();
    assert_eq!((world.machines_started(), names.len()), (2, 2), "each machine has names of its own: {names:?}");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_booting_twice_fails_the_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["before the guest asked for the job", "never asked for its job"]);
    die_booting(&world, 2);
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "the virtual machine ended before it was ready, twice").await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 2);
}

/// One job whose machine does this in its middle; how long GitLab saw it run.
async fn dies(step: &str, trouble: &'static str, author_reads: &str) -> Duration {
    let mut world = World::new(1);
    world.expect_trouble(&[trouble, "a machine was stopped"]);
    let job = world.job(&["print begun", "sleep 5", "print more", step]);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", author_reads).await;
    let (found, trace) = (world.found(job), world.trace(job));
    assert!(trace.contains("begun\n"), "{trace}");
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1, "a job that has begun is never begun again");
    found.finished_at.unwrap().duration_since(found.started_at.unwrap()).try_into().unwrap()
}

/// V8: seen within 2 s.
/// R11: what it printed is there, and after it our own last lines.
#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_in_mid_job_fails_it_at_once() {
    let ran =
        dies("crash", "in the middle of the job", "its process crashed or was killed in the middle of the job").await;
    assert!(ran < Duration::from_secs(15), "{ran:?}");
}

/// V8: the exit of the guest's system is no verdict.
#[tokio::test(start_paused = true)]
async fn a_machine_that_powers_off_without_a_verdict_fails_its_job() {
    let ran = dies(
        "off",
        "in the middle of the job",
        "the virtual machine was powered off from inside, in the middle of the job",
    )
    .await;
    assert!(ran < Duration::from_secs(15), "{ran:?}");
}

/// V11: detected within 15 s.
#[tokio::test(start_paused = true)]
async fn a_machine_paused_by_a_full_disk_fails_its_job() {
    let ran = dies(
        "pause",
        "the host's disk failed or is full",
        "the host's disk failed or is full. Your job is not the cause",
    )
    .await;
    assert!(ran < Duration::from_secs(30), "{ran:?}");
}

/// V10: after five minutes of silence.
#[tokio::test(start_paused = true)]
async fn a_machine_that_goes_silent_fails_its_job() {
    let ran = dies("hang", "the guest went silent", "the virtual machine said nothing for 5 min").await;
    assert!((300..330).contains(&ran.as_secs()), "{ran:?}");
}

/// V14: the outcome is reported, the neighbours go on, and the stuck machine goes when it can.
#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_destroyed_holds_up_nobody() {
    let mut world = World::new(1);
    world.expect_trouble(&["could not take a VM down"]);
    // It does not power off by itself either.
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        std::future::pending::<()>().await;
    });
    let stuck = world.job(&["print hello", "sleep 200"]);
    world.start().await.unwrap();
    world.until_trace(stuck, "hello").await;
    let vm = world.hypervisor.vms()[0].0.id.clone();
    world.hypervisor.fail_always_for(Op::Destroy, &vm, Fault::Hangs);
    world.until(stuck, JobState::Success).await;
    let other = world.job(&["print other"]);
    world.until(other, JobState::Success).await;
    world.until_status(|status| status.jobs.len() == 1 && status.jobs[0].id == stuck).await;
    world.hypervisor.heal();
    world.assert_clean().await;
}

/// H1, H2: libvirtd is away for ten minutes.
#[tokio::test(start_paused = true)]
async fn running_jobs_do_not_mind_an_unreachable_hypervisor() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "the hypervisor does not answer",
        "could not take a VM down",
        "look for orphans",
    ]);
    let job = world.job(&["print hello", "sleep 200", "print done"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.hypervisor.set_reachable(false);
    world.until(job, JobState::Success).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    world.hypervisor.set_reachable(true);
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_door_whose_port_somebody_has_taken_gets_another() {
    let mut world = World::new(1);
    let taken = world.hypervisor.listen("127.0.0.1:20000".parse().unwrap()).await.unwrap();
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    drop(taken);
    world.assert_clean().await;
}
