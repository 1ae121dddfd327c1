//! One daemon goes, the next goes on: hand-over, drain, end, a reboot of the host, orphans.

use crate::support::guest::Guest;
use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::vm::{Accel, Attachment, Boot, Confinement, Hypervisor as _, VmId, VmSpec};
use dayfly_doubles::fake::{Fault as VmFault, Op};
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Route};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const SCRIPT: &[&str] = &["print one", "sleep 30", "print two", "upload 1000", "sleep 30", "print three"];

/// The same in less time, for stories that are told often.
const SHORT: &[&str] = &["print one", "sleep 3", "print two", "upload 1000", "sleep 3", "print three"];

/// SIGTERM now; the end comes within seconds. Then the next daemon, and the job's green end.
async fn goes_on(world: &mut World, job: JobId, away: Duration) {
    let since = Instant::now();
    world.hand_over().await;
    assert!(since.elapsed() <= Duration::from_secs(5), "{:?}", since.elapsed());
    assert_eq!(world.hypervisor.counts().listeners, 0);
    sleep(away).await;
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).contains("three\nJob succeeded\n"), "{}", world.trace(job));
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// E1: whatever second of the job's life it comes in, and however long the next daemon takes.
#[test]
fn a_hand_over_at_any_second_costs_nothing() {
    for away in [0, 20] {
        for second in 0..15 {
            paused(async {
                let mut world = World::new(1);
                world.expect_trouble(&["it will be sent again", "did not let go in time"]);
                let job = world.job(SHORT);
                world.start().await.unwrap();
                sleep(Duration::from_millis(second * 1000 + 200)).await;
                goes_on(&mut world, job, Duration::from_secs(away)).await;
            });
        }
    }
}

/// E1: around the calls that make the machine, too.
#[test]
fn a_hand_over_in_mid_boot_costs_nothing() {
    for millis in (0..600).step_by(20) {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["did not let go in time"]);
            let job = world.job(SCRIPT);
            world.start().await.unwrap();
            sleep(Duration::from_millis(millis)).await;
            goes_on(&mut world, job, Duration::ZERO).await;
        });
    }
}

/// Decision D5: the verdict is in the outbox; GitLab gets it from the next daemon.
#[tokio::test(start_paused = true)]
async fn a_verdict_that_gitlab_has_not_taken_survives_a_hand_over() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again"]);
    let job = world.job(&["print hello"]);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1).always(), Fault::html(502));
    world.start().await.unwrap();
    world.until_word("releasing").await;
    world.until_status(|status| status.jobs.iter().all(|job| job.vm.is_none())).await;
    world.hand_over().await;
    world.standin.behave();
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// G13: a poll that GitLab holds is awaited, but not for long.
#[tokio::test(start_paused = true)]
async fn a_held_poll_delays_a_hand_over_by_less_than_five_seconds() {
    let mut world = World::new(1);
    world.standin.configure(|settings| settings.long_poll = Duration::from_secs(50));
    world.start().await.unwrap();
    sleep(Duration::from_secs(10)).await;
    let since = Instant::now();
    world.hand_over().await;
    assert!((3900..=5000).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());
    // A job that comes meanwhile is the next daemon's.
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// E2: during a hand-over the second signal only skips the wait.
#[tokio::test(start_paused = true)]
async fn a_second_signal_skips_the_wait_of_a_hand_over() {
    let mut world = World::new(1);
    world.standin.configure(|settings| settings.long_poll = Duration::from_secs(50));
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_trace(job, "one").await;
    sleep(Duration::from_secs(1)).await;
    let since = Instant::now();
    world.shutdown().hand_over();
    world.shutdown().hand_over();
    world.ended().await;
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// E3: no new job; the running one finishes.
#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let mut world = World::new(1);
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_word("running").await;
    world.shutdown().drain_or_end();
    let later = world.job(&["print later"]);
    world.ended().await;
    assert_eq!(world.found(job).state, JobState::Success);
    assert_eq!(world.found(later).state, JobState::Pending);
    world.start().await.unwrap();
    world.until(later, JobState::Success).await;
    world.assert_clean().await;
}

/// E2: during a drain the second signal ends the jobs honestly, within thirty seconds.
#[tokio::test(start_paused = true)]
async fn a_second_signal_during_a_drain_ends_the_jobs() {
    let mut world = World::new(1);
    world.expect_trouble(&["the operator ended the job"]);
    let jobs = [world.job(SCRIPT), world.job(SCRIPT)];
    world.start().await.unwrap();
    for job in jobs {
        world.until_trace(job, "one").await;
    }
    world.shutdown().drain_or_end();
    let since = Instant::now();
    world.shutdown().drain_or_end();
    world.ended().await;
    assert!(since.elapsed() <= Duration::from_secs(30), "{:?}", since.elapsed());
    for job in jobs {
        world.until_failed(job, "runner_interrupted", "an operator of this runner ended the job").await;
    }
    world.start().await.unwrap();
    world.assert_clean().await;
}

/// H5: the VMs are gone with the host, and so is what lay in memory; each job is told.
#[tokio::test(start_paused = true)]
async fn after_a_reboot_of_the_host_every_job_fails_and_says_why() {
    let mut world = World::new(1);
    world.expect_trouble(&["the host was restarted", "did not survive"]);
    let running = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_trace(running, "one").await;
    let booting = world.job(SCRIPT);
    world.until_word("booting").await;
    world.kill();
    world.hypervisor.reboot_host();
    world.clock.reboot();
    world.files.remove(Path::new("/run")).await.unwrap();
    world.start().await.unwrap();
    for job in [running, booting] {
        world.until_failed(job, "runner_system_failure", "this runner's host was restarted").await;
    }
    world.assert_clean().await;
}

/// V8: a VM that died while no daemon was there.
#[tokio::test(start_paused = true)]
async fn a_machine_that_died_while_nobody_watched_fails_its_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["in the middle of the job"]);
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_trace(job, "one").await;
    world.hand_over().await;
    world.hypervisor.crash(&world.hypervisor.vms()[0].0.id);
    world.start().await.unwrap();
    world
        .until_failed(
            job,
            "runner_system_failure",
            "the virtual machine ended because its process crashed or was killed in the middle of the job",
        )
        .await;
    world.assert_clean().await;
}

/// A cancel that came while no daemon was there.
#[tokio::test(start_paused = true)]
async fn a_job_canceled_while_nobody_watched_ends_at_once() {
    for graceful in [true, false] {
        let mut world = World::new(1);
        let job = world.job_of(JobSpec::script(["print one", "sleep 600", "print never"]));
        world.start().await.unwrap();
        world.until_trace(job, "one").await;
        world.hand_over().await;
        world.standin.cancel(job, graceful);
        world.start().await.unwrap();
        world.until(job, JobState::Canceled).await;
        world.until_idle().await;
        assert!(!world.trace(job).contains("never"));
        world.assert_clean().await;
    }
}

/// The silence deadline does not run while the daemon is away.
#[tokio::test(start_paused = true)]
async fn time_without_a_daemon_is_no_silence_of_the_guest() {
    let mut world = World::new(1);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.config.door_patience_s = 3600;
        guest.work(&payload).await;
        guest.power_off().await;
    });
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    world.until_trace(job, "one").await;
    goes_on(&mut world, job, Duration::from_secs(900)).await;
}

fn spec(id: &str, installation: VmId) -> VmSpec {
    let id: VmId = id.parse().unwrap();
    VmSpec {
        overlay: PathBuf::from(format!("/state/overlays/df-{id}.qcow2")),
        id,
        installation,
        bound: None,
        cpus: 1,
        memory_mib: 512,
        accel: Accel::Tcg,
        boot: Boot::Disk,
        base: "/images/test/disk.qcow2".into(),
        frozen: None,
        attachment: Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine: Confinement::default(),
        socket_dir: "/run/vm".into(),
    }
}

/// E1: also while a call to the hypervisor hangs: at create, at destroy.
#[tokio::test(start_paused = true)]
async fn a_hand_over_is_quick_whatever_call_hangs() {
    for op in [Op::CreateOverlay, Op::Start, Op::State, Op::Destroy, Op::List] {
        let mut world = World::new(1);
        world.expect_trouble(&["could not be made", "could not take a VM down", "look for", "let go in time"]);
        if op == Op::Destroy {
            // One that does not power off by itself.
            world.set_guest(|mut guest: Guest| async move {
                let payload = guest.ask().await.unwrap();
                guest.work(&payload).await;
                std::future::pending::<()>().await;
            });
        }
        let job = world.job(&["print begun", "sleep 5", "print ended"]);
        if op == Op::List {
            world.start().await.unwrap();
            world.until_word("running").await;
            world.hypervisor.fail_always(op, VmFault::Hangs);
            sleep(Duration::from_secs(3)).await;
        } else {
            world.hypervisor.fail_always(op, VmFault::Hangs);
            world.start().await.unwrap();
            world.until_word(if op == Op::Destroy { "releasing" } else { "booting" }).await;
            sleep(Duration::from_secs(8)).await;
        }
        let since = Instant::now();
        world.hand_over().await;
        assert!(since.elapsed() <= Duration::from_secs(5), "{op:?}: {:?}", since.elapsed());
        world.hypervisor.heal();
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
        assert_eq!(world.machines_at_once(), 1);
    }
}

/// E1: while an artifact is on its way, which GitLab is slow to take.
#[tokio::test(start_paused = true)]
async fn a_hand_over_in_the_middle_of_an_upload_costs_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["let go in time"]);
    world.standin.script(Matcher::on(Route::UploadArtifacts), Fault::Delay(Duration::from_secs(30)));
    let job = world.job(&["print one", "upload 1000", "print three"]);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(2)).await;
    goes_on(&mut world, job, Duration::from_secs(3)).await;
    assert!(world.trace(job).contains("upload: Some(201)"), "{}", world.trace(job));
}

/// E3: a drain that has a time ends what is left then, as a second signal does.
#[tokio::test(start_paused = true)]
async fn a_drain_with_a_time_ends_what_is_left_then() {
    let mut world = World::new(1);
    world.expect_trouble(&["the operator ended the job", "as long as it may"]);
    world.config.limits.drain_timeout = Some(dayfly::config::Span::from_secs(120));
    let (short, long) = (world.job(&["print short", "sleep 60"]), world.job(&["print long", "sleep 3000"]));
    world.start().await.unwrap();
    for (job, text) in [(short, "short"), (long, "long")] {
        world.until_trace(job, text).await;
    }
    let since = Instant::now();
    world.shutdown().drain();
    world.ended().await;
    assert!((120..150).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
    world.until(short, JobState::Success).await;
    world.until_failed(long, "runner_interrupted", "an operator of this runner ended the job").await;
    world.start().await.unwrap();
    world.assert_clean().await;
}

/// E2: a job that a poll brings while all are ended is ended too.
#[tokio::test(start_paused = true)]
async fn a_job_that_comes_while_all_are_ended_is_ended_too() {
    let mut world = World::new(1);
    world.expect_trouble(&["the operator ended the job"]);
    let job = world.job(&["print begun", "sleep 3000"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    // GitLab has decided, and its answer is on its way.
    world.standin.script(Matcher::on(Route::RequestJob), Fault::DelayAnswer(Duration::from_secs(3)));
    let late = world.job(&["print late", "sleep 3000"]);
    world.until(late, JobState::Running).await;
    let since = Instant::now();
    world.shutdown().end();
    world.ended().await;
    assert!(since.elapsed() <= Duration::from_secs(30), "{:?}", since.elapsed());
    for job in [job, late] {
        world.until_failed(job, "runner_interrupted", "an operator of this runner ended the job").await;
    }
    world.start().await.unwrap();
    world.assert_clean().await;
}

/// H16: what carries our installation id and belongs to no job goes; what is foreign stays.
#[tokio::test(start_paused = true)]
async fn orphans_of_ours_are_reaped_and_foreign_machines_are_not_touched() {
    let mut world = World::new(1);
    world.expect_trouble(&["belongs to no job"]);
    world.hypervisor.set_guest(|_| std::future::pending());
    world.start().await.unwrap();
    let file = world.files.read(Path::new("/state/installation.json"), 4096).await.unwrap();
    let installation: serde_json::Value = serde_json::from_slice(&file).unwrap();
    let ours: VmId = installation["id"].as_str().unwrap().parse().unwrap();
    world.hand_over().await;
    let orphan = spec("aaaaaaaaaaaaaaaa", ours.clone());
    let mut foreign = spec("bbbbbbbbbbbbbbbb", VmId::random(&Rng::seeded(9)));
    foreign.overlay = "/elsewhere/df-bbbbbbbbbbbbbbbb.qcow2".into();
    let overlay_only = spec("cccccccccccccccc", ours);
    for spec in [&orphan, &foreign, &overlay_only] {
        world.hypervisor.host().disks.create(&spec.overlay, &spec.base, 1).await.unwrap();
    }
    for spec in [&orphan, &foreign] {
        world.hypervisor.start(spec).await.unwrap();
    }
    world.start().await.unwrap();
    let left: Vec<_> = world.hypervisor.vms().into_iter().map(|(spec, _)| spec.id).collect();
    assert_eq!(left, [foreign.id.clone()]);
    assert_eq!(world.hypervisor.overlays().into_keys().collect::<Vec<_>>(), [foreign.overlay.clone()]);
    world.hypervisor.destroy(&foreign.id.clone().into()).await.unwrap();
    world.hypervisor.host().disks.remove(&foreign.overlay).await.unwrap();
    world.hypervisor.host().sockets.remove(&foreign.socket_dir, &foreign.id).await.unwrap();
    world.assert_clean().await;
}

/// A daemon that dies while it adopts changes nothing more (invariant 17).
#[test]
fn a_daemon_killed_while_it_adopts_costs_no_job() {
    for second in [1, 8, 12] {
        for seam in [Seam::Files, Seam::Hypervisor, Seam::GitLab] {
            for call in 1..200 {
                let mut died = false;
                paused(async {
                    let mut world = World::new(1);
                    let job = world.job(SHORT);
                    world.start().await.unwrap();
                    sleep(Duration::from_secs(second)).await;
                    world.kill();
                    world.live(Some(End { seam, call, when: When::Before })).await.unwrap();
                    world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
                    if !world.is_dead() {
                        world.settle().await;
                    }
                    died = world.is_dead();
                    if died {
                        world.start().await.unwrap();
                    }
                    world.until(job, JobState::Success).await;
                    assert!(world.trace(job).ends_with("three\nJob succeeded\n"), "{}", world.trace(job));
                    world.assert_clean().await;
                    assert_eq!(world.machines_started(), 1);
                });
                if !died {
                    break;
                }
            }
        }
    }
}
