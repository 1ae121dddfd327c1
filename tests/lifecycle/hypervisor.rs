//! The rows about machines and hypervisor that need more than one machine, or another's doing:
//! hosts that lose every machine, neighbours of a stuck one, doors that are used again, collisions.

use crate::support::guest::Guest;
use crate::support::world::{LONG, World, paused};
use dayfly::gitlab::JobId;
use dayfly::network::Listen as _;
use dayfly::status::RunnerState;
use dayfly::vm::{Hypervisor as _, Stream, VmId, VmName, VmSpec, VmState};
use dayfly_doubles::fake::{Fault, Op, Timing};
use dayfly_exec::standin::{JobState, Route};
use dayfly_test_guest::Connection;
use dayfly_test_guest::job::update;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep, timeout};

/// How long GitLab saw the job run.
fn ran_for(world: &World, job: JobId) -> Duration {
    let found = world.found(job);
    found.finished_at.unwrap().duration_since(found.started_at.unwrap()).try_into().unwrap()
}

/// Waits until so many VMs are left, and says when.
async fn until_vms(world: &World, count: usize) -> Instant {
    let reached = async {
        while world.hypervisor.vms().len() != count {
            sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(timeout(LONG, reached).await.is_ok(), "{}", world.histories());
    Instant::now()
}

/// V1: three machines lost in a row, whoever's: no job is asked for but one a minute, and the status says why.
#[tokio::test(start_paused = true)]
async fn a_host_that_loses_every_machine_stops_asking_for_jobs() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "the machine could not be made", "no machine could be made"]);
    world.config.concurrent = 1;
    world.hypervisor.fail_always(Op::Start, Fault::Refused("cannot allocate memory"));
    let jobs: Vec<JobId> = (0..5).map(|_| world.job(&["print hello"])).collect();
    world.start().await.unwrap();
    for job in &jobs[..2] {
        world.until_failed(*job, "runner_system_failure", "no virtual machine could be started").await;
    }
    world
        .until_status(
            |status| matches!(&status.runners[0].state, RunnerState::Blocked { reason } if reason.contains("were lost before")),
        )
        .await;
    assert_eq!(world.status().daemon.problems.len(), 1, "health is red");
    let before = world.requests(Route::RequestJob).len();
    sleep(Duration::from_secs(55)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), before);
    assert_eq!(world.found(jobs[3]).state, JobState::Pending);
    world.hypervisor.heal();
    for job in &jobs[3..] {
        world.until(*job, JobState::Success).await;
    }
    assert!(world.status().daemon.problems.is_empty());
    world.assert_clean().await;
}

/// V1: a poll without a job tries nothing. After a minute the next job is asked for as ever, and tries the host.
#[tokio::test(start_paused = true)]
async fn a_host_that_lost_machines_is_tried_by_jobs_and_not_by_polls() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "the machine could not be made", "no machine could be made"]);
    world.config.concurrent = 1;
    world.hypervisor.fail_always(Op::Start, Fault::Refused("cannot allocate memory"));
    let lost: Vec<JobId> = (0..2).map(|_| world.job(&["print never"])).collect();
    world.start().await.unwrap();
    for job in &lost {
        world.until_failed(*job, "runner_system_failure", "no virtual machine could be started").await;
    }
    sleep(Duration::from_secs(90)).await;
    let (job, since) = (world.job(&["print hello"]), Instant::now());
    world.until_failed(job, "runner_system_failure", "no virtual machine could be started").await;
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    // It was a try: the next one comes a minute later.
    world.hypervisor.heal();
    let job = world.job(&["print hello"]);
    sleep(Duration::from_secs(40)).await;
    assert_eq!(world.found(job).state, JobState::Pending);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// V3: the guest's ask arrives around the boot deadline, to the millisecond.
#[test]
fn an_ask_at_the_boot_deadline_runs_the_job_or_fails_it_and_never_both() {
    let mut outcomes = Vec::new();
    for offset_ms in -4..=4_i64 {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["did not ask for the job in time", "never asked for its job"]);
            world.hypervisor.set_timing(Timing { boot: Duration::ZERO, ..Timing::default() });
            let (standin, clock) = (world.standin.clone(), world.clock.clone());
            world.set_guest(move |mut guest: Guest| {
                let (standin, clock) = (standin.clone(), clock.clone());
                async move {
                    // Its wire is up before, so that the ask is all that counts.
                    drop(guest.connect().await);
                    let assigned =
                        standin.requests().into_iter().find(|r| r.status.is_some_and(|s| s == 201)).unwrap().at;
                    let gone = Duration::try_from(clock.now().duration_since(assigned)).unwrap();
                    let wait = Duration::from_millis(u64::try_from(300_000 + offset_ms).unwrap()) - gone;
                    sleep(wait).await;
                    let given = guest.ask_once().await.filter(|answer| answer.status == 201);
                    if let Some(payload) = given.and_then(|answer| serde_json::from_slice(&answer.body).ok()) {
                        guest.work(&payload).await;
                    }
                    guest.power_off().await;
                }
            });
            let job = world.job(&["print hello"]);
            world.start().await.unwrap();
            world.until_over(job).await;
            let (found, told) = (world.found(job), world.memory.of(world.found(job).token.expose()));
            let runs = u32::from(found.state == JobState::Success);
            assert_eq!(told.runs, runs, "{offset_ms} ms: {:?}\n{}", found.state, world.histories());
            assert_eq!(world.trace(job).contains("was not ready within"), runs == 0, "{}", world.trace(job));
            outcomes.push(runs);
            world.assert_clean().await;
        });
    }
    assert_eq!((outcomes.first(), outcomes.last()), (Some(&1), Some(&0)), "before it in time, after it too late");
    assert!(outcomes.is_sorted_by(|a, b| a >= b), "{outcomes:?}");
}

/// V6: a reboot, of a kernel that panicked, is the machine's end, and the job's.
#[tokio::test(start_paused = true)]
async fn a_machine_that_reboots_in_mid_job_has_ended() {
    let mut world = World::new(1);
    world.expect_trouble(&["in the middle of the job", "that wrote no log"]);
    world.set_guest(|guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.begin(&payload).await;
        // Whoever asks a second time once the job has begun is told that there is none.
        assert_eq!(guest.ask_once().await.unwrap().status, 204);
        guest.machine.power.reboot();
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "was restarted from inside, which ends it,").await;
    assert!(ran_for(&world, job) < Duration::from_secs(12), "{:?}", ran_for(&world, job));
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// V7: a guest with a wrong pass gets nowhere, and its boot deadline runs on.
#[tokio::test(start_paused = true)]
async fn a_guest_with_a_wrong_pass_fails_its_job_at_the_boot_deadline() {
    let mut world = World::new(1);
    world.expect_trouble(&["did not ask for the job in time", "never asked for its job"]);
    world.set_guest(|mut guest: Guest| async move {
        guest.config.pass = "A".repeat(43);
        assert!(guest.ask().await.is_none(), "the door lets nobody in");
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "was not ready within 5 min").await;
    assert!((300..=310).contains(&ran_for(&world, job).as_secs()), "{:?}", ran_for(&world, job));
    assert_eq!(world.memory.of(world.found(job).token.expose()).runs, 0);
    world.assert_clean().await;
}

/// V12: the machine's process is killed for want of the host's memory, or by nobody knows whom; the author reads which.
#[tokio::test(start_paused = true)]
async fn a_machine_killed_for_its_memory_fails_its_job_and_names_memory() {
    for (kills, words) in
        [("5", "its process crashed or was killed"), ("6", "this runner's host had too little memory")]
    {
        let mut world = World::new(1);
        world.expect_trouble(&["in the middle of the job", "while the host ran out of memory"]);
        let files = world.files.clone();
        let count = |kills: &str| {
            let text = format!("drop_slab 0\noom_kill {kills}\nzone_reclaim_failed 0\n");
            files.meddle("/proc/vmstat".as_ref(), Some(text.into_bytes()));
        };
        count("5");
        let job = world.job(&["print begun", "sleep 600"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        count(kills);
        let since = Instant::now();
        world.hypervisor.crash(&world.hypervisor.vms()[0].0.id);
        world.until_failed(job, "runner_system_failure", words).await;
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
        world.files.meddle("/proc/vmstat".as_ref(), None);
        world.assert_clean().await;
    }
}

/// V13: a guest that does not power off after its verdict is given five seconds.
#[tokio::test(start_paused = true)]
async fn a_machine_that_does_not_power_off_is_destroyed_after_its_verdict() {
    let mut world = World::new(1);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until_word("releasing").await;
    let since = Instant::now();
    let took = until_vms(&world, 0).await - since;
    assert!((4..=6).contains(&took.as_secs()), "{took:?}");
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// V14: one reservation, and only one, is held by a machine that cannot be destroyed.
#[tokio::test(start_paused = true)]
async fn a_stuck_machine_costs_one_reservation_and_never_two() {
    let mut world = World::new(1);
    world.expect_trouble(&["could not take a VM down"]);
    world.config.concurrent = 2;
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        std::future::pending::<()>().await;
    });
    let stuck = world.job(&["print hello", "sleep 60"]);
    world.start().await.unwrap();
    world.until_trace(stuck, "hello").await;
    let vm = world.hypervisor.vms()[0].0.id.clone();
    world.hypervisor.fail_always_for(Op::Destroy, &vm, Fault::Hangs);
    world.until(stuck, JobState::Success).await;
    let others: Vec<JobId> = (0..4).map(|_| world.job(&["print other", "sleep 30"])).collect();
    for other in others {
        world.until(other, JobState::Success).await;
    }
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.status().jobs.iter().map(|job| job.id).collect::<Vec<_>>(), [stuck]);
    assert!(world.machines_at_once() <= 2);
    let tries = world.hypervisor.history().iter().filter(|e| e.op == Some(Op::Destroy)).count();
    assert!((5..60).contains(&tries), "tried for ever, with pauses: {tries}");
    world.hypervisor.heal();
    world.assert_clean().await;
}

/// V16: a connection of the machine before, kept alive by somebody, reaches nothing behind the same address.
#[tokio::test(start_paused = true)]
async fn an_old_connection_never_reaches_the_next_job_behind_the_same_port() {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    world.by_port();
    world.config.network.guest_ports = "20000-20000".parse().unwrap();
    // Connection, pass and door of each machine.
    type Kept = (Connection<Box<dyn Stream>>, String, String);
    let kept: Arc<Mutex<Vec<Kept>>> = Arc::default();
    let keeps = kept.clone();
    world.set_guest(move |mut guest: Guest| {
        let keeps = keeps.clone();
        async move {
            let connection = guest.connect().await.unwrap();
            keeps.lock().unwrap().push((connection, guest.config.pass.clone(), guest.config.door.clone()));
            let payload = guest.ask().await.unwrap();
            guest.work(&payload).await;
            guest.power_off().await;
        }
    });
    let first = world.job(&["print first"]);
    world.start().await.unwrap();
    world.until(first, JobState::Success).await;
    until_vms(&world, 0).await;
    let second = world.job(&["print second", "sleep 60"]);
    world.until_trace(second, "second").await;
    let mut kept = std::mem::take(&mut *kept.lock().unwrap());
    assert_eq!(kept.len(), 2);
    assert_eq!(kept[0].2, kept[1].2, "the same door");
    assert_ne!(kept[0].1, kept[1].1, "another pass");
    let (mut old, ..) = kept.remove(0);
    let token = world.found(second).token.expose().to_owned();
    let _ = old.send(&update(second.0, &token, r#"{"state":"failed"}"#)).await;
    let read = timeout(Duration::from_secs(5), old.rest()).await;
    assert!(read.as_ref().is_ok_and(Vec::is_empty), "it was not cut: {read:?}");
    drop(kept);
    world.until(second, JobState::Success).await;
    world.assert_clean().await;
}

/// V18: the guest program says on the console what its image lacks, and the job's author reads it.
#[tokio::test(start_paused = true)]
async fn a_guest_without_a_fit_runner_fails_its_job_with_its_own_words() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "before the guest asked for the job",
        "never asked for its job",
        "guest could not do its part",
    ]);
    world.set_guest(|mut guest: Guest| async move {
        guest
            .machine
            .console
            .write_all(b"dayfly-guest: start gitlab-runner: No such file or directory\r\n")
            .await
            .unwrap();
        let failed = dayfly_guest_config::Report::Failed("start gitlab-runner: No such file or directory".into());
        guest.machine.channel.write_all(format!("{failed}\n").as_bytes()).await.unwrap();
        sleep(Duration::from_secs(2)).await;
        guest.machine.power.off();
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "  | dayfly-guest: start gitlab-runner: No such file").await;
    assert!(ran_for(&world, job) <= Duration::from_secs(310));
    assert!(world.log.text().contains("start gitlab-runner: No such file"), "the operator reads it too");
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 2, "replaced once, for it died before its first request");
}

/// H1: after libvirtd has come back the list is asked for anew: who is gone is noticed, who lives is left alone.
/// H3: it is the same when only the way to libvirtd is gone.
#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_while_libvirtd_is_away_is_noticed_and_its_neighbour_goes_on() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "the hypervisor does not answer",
        "could not take a VM down",
        "look for orphans",
        "in the middle of the job",
    ]);
    let (dies, lives) =
        (world.job(&["print begun", "sleep 900"]), world.job(&["print begun", "sleep 300", "print done"]));
    world.start().await.unwrap();
    world.until_trace(dies, "begun").await;
    world.until_trace(lives, "begun").await;
    world.hypervisor.set_reachable(false);
    let dying = world.status().jobs.iter().find(|job| job.id == dies).unwrap().vm.clone().unwrap();
    let dying = VmName::parse(&dying).unwrap().id().clone();
    sleep(Duration::from_secs(20)).await;
    world.hypervisor.crash(&dying);
    sleep(Duration::from_secs(20)).await;
    world.hypervisor.set_reachable(true);
    world.until_failed(dies, "runner_system_failure", "its process crashed or was killed").await;
    world.until(lives, JobState::Success).await;
    world.assert_clean().await;
}

/// H2: nothing is asked for while libvirtd is away, and the status says so; then the job comes.
#[tokio::test(start_paused = true)]
async fn without_libvirtd_no_job_is_asked_for() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "the hypervisor does not answer", "look for orphans"]);
    world.start().await.unwrap();
    world.until_status(|status| status.runners[0].state == RunnerState::Polling).await;
    world.hypervisor.set_reachable(false);
    world.until_status(|status| matches!(status.runners[0].state, RunnerState::Blocked { .. })).await;
    let before = world.requests(Route::RequestJob).len();
    let job = world.job(&["print hello"]);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), before);
    assert_eq!(world.status().daemon.problems.len(), 1);
    world.hypervisor.set_reachable(true);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// H14: a machine whose door cannot be opened is never started, and health is red.
#[tokio::test(start_paused = true)]
async fn no_machine_starts_without_its_door() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "bind a door", "no machine could be made"]);
    world.config.concurrent = 1;
    world.by_port();
    world.hypervisor.fail_always(Op::Listen, Fault::Refused("network is down"));
    let jobs = [world.job(&["print never"]), world.job(&["print never"]), world.job(&["print hello"])];
    world.start().await.unwrap();
    for job in &jobs[..2] {
        world.until_failed(*job, "runner_system_failure", "no virtual machine could be started").await;
    }
    // The other is the image's.
    world.until_status(|status| status.daemon.problems.iter().any(|problem| problem.contains("were lost"))).await;
    assert_eq!(world.machines_started(), 0);
    world.hypervisor.heal();
    world.until(jobs[2], JobState::Success).await;
    world.assert_clean().await;
}

/// H15: a job that finds no door waits for one, which comes when a neighbour ends.
#[tokio::test(start_paused = true)]
async fn a_job_without_a_free_port_waits_for_one() {
    let mut world = World::new(1);
    world.expect_trouble(&["the job waits for one"]);
    world.by_port();
    world.config.network.guest_ports = "20000-20001".parse().unwrap();
    let jobs: Vec<JobId> = (0..4).map(|_| world.job(&["print hello", "sleep 60"])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(world.machines_at_once(), 2);
    world.assert_clean().await;
}

/// H15: likewise one whose ports others hold, until its boot deadline.
#[test]
fn a_port_that_others_hold_is_waited_for_until_the_boot_deadline() {
    for (held_s, ends) in [(100, JobState::Success), (1000, JobState::Failed)] {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["the job waits for one", "did not ask for the job in time"]);
            world.by_port();
            world.config.network.guest_ports = "20000-20000".parse().unwrap();
            let held = world.hypervisor.listen("127.0.0.1:20000".parse().unwrap()).await.unwrap();
            let job = world.job(&["print hello"]);
            world.start().await.unwrap();
            let holder = async {
                sleep(Duration::from_secs(held_s)).await;
                drop(held);
            };
            tokio::join!(holder, world.until(job, ends));
            if ends == JobState::Failed {
                assert!((300..=310).contains(&ran_for(&world, job).as_secs()), "{:?}", ran_for(&world, job));
                assert_eq!(world.found(job).failure_reason.as_deref(), Some("runner_system_failure"));
            }
            world.assert_clean().await;
        });
    }
}

/// H17: somebody else's machine has the very name that ours would have; ours takes another.
#[test]
fn a_name_that_is_taken_is_not_fought_over() {
    // Learnt from a first life: the same seed chooses the same names.
    let mut chosen = None;
    for collides in [false, true] {
        paused(async {
            let mut world = World::new(7);
            let job = world.job(&["print hello"]);
            let mut foreign = None;
            if collides {
                world.expect_trouble(&["the machine could not be made"]);
                let id: VmId = chosen.clone().unwrap();
                let spec = VmSpec {
                    installation: "bbbbbbbbbbbbbbbb".parse().unwrap(),
                    overlay: "/elsewhere/disk.qcow2".into(),
                    ..foreign_spec(id)
                };
                world.hypervisor.host().disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
                world.hypervisor.start(&spec).await.unwrap();
                foreign = Some(spec);
            }
            world.start().await.unwrap();
            world.until(job, JobState::Success).await;
            let started = world.hypervisor.history();
            let names: Vec<_> = started.iter().filter(|e| e.op == Some(Op::Start)).map(|e| e.subject.clone()).collect();
            match foreign {
                None => chosen = Some(names[0].strip_prefix("df-").unwrap().parse().unwrap()),
                Some(foreign) => {
                    assert!(world.trace(job).contains("taking another"), "{}", world.trace(job));
                    assert_eq!(names.len(), 2, "theirs, and ours of another name: {names:?}");
                    assert_ne!(names[0], names[1]);
                    let left = world.hypervisor.vms();
                    assert_eq!((left.len(), left[0].0.id == foreign.id), (1, true), "theirs is untouched");
                    assert_eq!(left[0].1, VmState::Running);
                    world.hypervisor.destroy(&foreign.id.clone().into()).await.unwrap();
                    world.hypervisor.host().disks.remove(&foreign.overlay).await.unwrap();
                    world.hypervisor.host().sockets.remove(&foreign.socket_dir, &foreign.id).await.unwrap();
                }
            }
            world.assert_clean().await;
        });
    }
}

/// A machine that is not of our making.
fn foreign_spec(id: VmId) -> VmSpec {
    VmSpec {
        installation: id.clone(),
        overlay: "/elsewhere/disk.qcow2".into(),
        id,
        bound: None,
        cpus: 1,
        memory_mib: 512,
        accel: dayfly::vm::Accel::Tcg,
        boot: dayfly::vm::Boot::Disk,
        base: "/images/test/disk.qcow2".into(),
        frozen: None,
        attachment: dayfly::vm::Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine: dayfly::vm::Confinement::default(),
        socket_dir: "/elsewhere".into(),
    }
}

/// H4: a call that gets no answer for minutes holds up its own machine and nobody else's.
#[tokio::test(start_paused = true)]
async fn a_hypervisor_call_that_hangs_holds_up_one_job_only() {
    let mut world = World::new(1);
    world.expect_trouble(&["the machine could not be made"]);
    let calls = Arc::new(AtomicU32::new(0));
    let seen = calls.clone();
    world.hypervisor.judge_calls(move |op, _| {
        (op == Op::Start && seen.fetch_add(1, Ordering::SeqCst) == 0).then_some(Fault::Hangs)
    });
    let (slow, quick) = (world.job(&["print slow"]), world.job(&["print quick"]));
    world.start().await.unwrap();
    world.until(quick, JobState::Success).await;
    assert!(ran_for(&world, quick) < Duration::from_secs(20), "{:?}", ran_for(&world, quick));
    assert_eq!(world.found(slow).state, JobState::Running);
    world.until(slow, JobState::Success).await;
    assert!(ran_for(&world, slow) > Duration::from_secs(60));
    world.assert_clean().await;
}
