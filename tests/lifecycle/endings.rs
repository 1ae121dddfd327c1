//! Machines that end or stand still in mid-job, and whose doing that was: the guest's, the host's, an operator's.

use crate::support::guest::Guest;
use crate::support::world::{World, paused};
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly::status::RunnerState;
use dayfly::vm::Pause;
use dayfly_exec::standin::{JobSpec, JobState, Route, Variable};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, sleep};

/// How long GitLab saw the job run.
fn ran_for(world: &World, job: JobId) -> Duration {
    let found = world.found(job);
    found.finished_at.unwrap().duration_since(found.started_at.unwrap()).try_into().unwrap()
}

/// Why no job is asked for, if that is so.
fn blocked(world: &World) -> Option<String> {
    match &world.status().runners[0].state {
        RunnerState::Blocked { reason } => Some(reason.clone()),
        _ => None,
    }
}

/// U8, U47: what a guest does to its machine ends it within seconds, each by its own name; the host is never blamed,
/// and stays in use however often it happens.
#[tokio::test(start_paused = true)]
async fn what_a_guest_does_to_its_machine_is_its_end_and_never_the_hosts_fault() {
    let mut world = World::new(1);
    world.expect_trouble(&["in the middle of the job", "that wrote no log"]);
    world.config.concurrent = 1;
    let ends = [
        ("off", "was powered off from inside,"),
        ("restart", "was restarted from inside, which ends it,"),
        ("panic", "ended by a panic of its kernel"),
        ("suspend", "was put to sleep from inside, which ends it,"),
    ];
    let jobs: Vec<JobId> = ends.iter().map(|(word, _)| world.job(&["print begun", "sleep 5", word])).collect();
    let last = world.job(&["print well"]);
    world.start().await.unwrap();
    for (job, (word, words)) in jobs.into_iter().zip(ends) {
        world.until_failed(job, "runner_system_failure", words).await;
        let (took, trace) = (ran_for(&world, job), world.trace(job));
        assert!(took < Duration::from_secs(20), "{word}: {took:?}");
        assert!(
            ["disk", "memory", "host"].iter().all(|blamed| !trace.split("begun").nth(1).unwrap().contains(blamed)),
            "{trace}"
        );
        assert_eq!(blocked(&world), None, "{word}");
    }
    world.until(last, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 5, "no job was run twice");
}

/// U47: without a word of the hypervisor, and with what the machine itself says: quoted, as its own words.
#[tokio::test(start_paused = true)]
async fn what_is_not_known_of_a_machines_end_is_not_said_and_its_own_words_are_quoted() {
    let mut world = World::new(1);
    world.expect_trouble(&["could not do its part", "in the middle of the job", "that wrote no log"]);
    world.hypervisor.set_endings_seen(false);
    let job = world.job(&[
        "print begun",
        "console [ 4.2] Kernel panic - not syncing: sysrq triggered crash",
        "report runner-exited 137",
        "report failed the guest program was ended by SIGKILL",
        "sleep 2",
        "restart",
    ]);
    world.start().await.unwrap();
    for words in [
        "the virtual machine ended in the middle of the job. If the job powered it off or restarted it, change the job",
        "dayfly: the machine says that its gitlab-runner had ended before that, killed by signal 9.",
        "dayfly: the machine says: the guest program was ended by SIGKILL",
        "dayfly: the machine's console says: Kernel panic - not syncing: sysrq triggered crash",
    ] {
        world.until_failed(job, "runner_system_failure", words).await;
    }
    world.assert_clean().await;
}

/// U50: three machines in a row that stop by themselves in mid-job, whoever's jobs they had: no more are burned than one
/// a minute, and the status says why, until a job comes to its own end.
#[test]
fn a_host_on_which_machines_stop_by_themselves_does_not_burn_the_queue() {
    for (word, failure, author_reads, operator_reads) in [
        (
            "stop",
            "QEMU stopped the machine by itself",
            "processors were stopped by QEMU itself",
            "as at an internal error of KVM",
        ),
        (
            "pause",
            "the host's disk failed or is full",
            "the host's disk failed or is full",
            "the host's disk failed or is full",
        ),
        ("crash", "in the middle of the job", "its process crashed or was killed", "it crashed, or was killed"),
    ] {
        paused(async move {
            let mut world = World::new(1);
            world.expect_trouble(&["no job is asked for", failure, "a machine was stopped"]);
            world.config.concurrent = 1;
            let lost: Vec<JobId> = (0..3).map(|_| world.job(&["print begun", "sleep 5", word])).collect();
            let waits = world.job(&["print well"]);
            world.start().await.unwrap();
            for job in lost {
                world.until_failed(job, "runner_system_failure", author_reads).await;
            }
            let named = |reason: &str| reason.contains("were lost in the middle") && reason.contains(operator_reads);
            world
                .until_status(
                    |status| matches!(&status.runners[0].state, RunnerState::Blocked { reason } if named(reason)),
                )
                .await;
            assert_eq!(world.status().daemon.problems.len(), 1, "health is red");
            let (before, since) = (world.requests(Route::RequestJob).len(), Instant::now());
            sleep(Duration::from_secs(45)).await;
            assert_eq!(world.requests(Route::RequestJob).len(), before);
            assert_eq!(world.found(waits).state, JobState::Pending);
            world.until(waits, JobState::Success).await;
            assert!(since.elapsed() < Duration::from_secs(120), "{:?}", since.elapsed());
            world.until_status(|status| status.daemon.problems.is_empty()).await;
            world.assert_clean().await;
        });
    }
}

/// U50: a machine that QEMU stops while it boots is replaced, as one that dies then, and counts as one that does.
#[tokio::test(start_paused = true)]
async fn a_machine_that_stops_booting_is_replaced_once_and_counts() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "QEMU stopped the machine by itself", "a machine was stopped"]);
    world.config.concurrent = 1;
    world.set_guest(|guest| async move {
        guest.machine.power.pause(Pause::Itself);
        std::future::pending::<()>().await;
    });
    let jobs = [world.job(&["print never"]), world.job(&["print never"])];
    world.start().await.unwrap();
    for job in jobs {
        world
            .until_failed(job, "runner_system_failure", "processors were stopped by QEMU itself. Your job is not")
            .await;
        assert!(world.trace(job).contains("taking another"), "{}", world.trace(job));
    }
    world
        .until_status(|status| {
            matches!(&status.runners[0].state, RunnerState::Blocked { reason }
                if reason.contains("the last 4 machines were lost before they were ready (QEMU stopped"))
        })
        .await;
    world.assert_clean().await;
}

/// U50: `virsh suspend`. The job's deadlines run; let go in time it goes on, else it ends in words of its own.
#[test]
fn a_machine_that_an_operator_pauses_is_waited_for_until_a_deadline() {
    for (pause_s, ends) in [(200, JobState::Success), (900, JobState::Failed)] {
        paused(async move {
            let mut world = World::new(1);
            world.expect_trouble(&[
                "somebody at the host paused the machine",
                "somebody at the host paused the machine for too long",
            ]);
            let job = world.job(&["print begun", "sleep 100", "print ended"]);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            let vm = world.hypervisor.vms()[0].0.id.clone();
            world.hypervisor.pause(&vm, Pause::Operator);
            world
                .until_status(|status| status.jobs.iter().any(|job| job.phase == "paused by somebody at the host"))
                .await;
            let (seen, hypervisor) = (Instant::now(), world.hypervisor.clone());
            let let_go = async {
                sleep(Duration::from_secs(pause_s)).await;
                hypervisor.resume(&vm);
            };
            let over = async {
                world.until(job, ends).await;
                seen.elapsed()
            };
            let (took, ()) = tokio::join!(over, let_go);
            if ends == JobState::Failed {
                assert!((290..=320).contains(&took.as_secs()), "the silence deadline: {took:?}");
                let words = "dayfly: somebody at this runner's host paused the virtual machine for ";
                world.until_failed(job, "runner_system_failure", words).await;
            }
            assert_eq!(blocked(&world), None);
            world.assert_clean().await;
        });
    }
}

/// U48: a runner that does not end its job at the timeout, for a child of it lives on; or ends it and is not heard. The
/// machine is gone by timeout and grace, and the author reads of the timeout, whatever else was silent by then.
#[test]
fn a_runner_that_does_not_end_at_the_timeout_is_gone_by_its_grace() {
    for script in [&["deaf", "print begun", "sleep 9000"][..], &["deaf", "print begun", "sleep 178", "hang"]] {
        for silence_s in [300, 60] {
            paused(async move {
                let mut world = World::new(1);
                world.expect_trouble(&["the job went on beyond its timeout"]);
                world.config.limits.silence_deadline = dayfly::config::Span::from_secs(silence_s);
                let job = world.job_of(JobSpec::script(script.iter().copied()).with_timeout(Duration::from_secs(180)));
                world.start().await.unwrap();
                let words = "the job did not end within its timeout of 3 min. Make the job shorter";
                world.until_failed(job, "job_execution_timeout", words).await;
                assert!(ran_for(&world, job) <= Duration::from_secs(180 + 120 + 10), "{:?}", ran_for(&world, job));
                world.until_idle().await;
                assert!(world.hypervisor.vms().is_empty());
                world.assert_clean().await;
            });
        }
    }
}

/// U10: a runner that cannot decode its job asks for it again and again.
#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_read_its_job_fails_it_within_seconds_and_its_runner_is_quoted() {
    let mut world = World::new(1);
    world.expect_trouble(&["its runner was given the job and did not begin it"]);
    world.set_guest(|mut guest: Guest| async move {
        loop {
            guest.ask_once().await;
            let words =
                "ERROR: Checking for jobs... error  status=Error decoding json payload json: cannot unmarshal\n";
            let _ = guest.machine.console.write_all(words.as_bytes()).await;
            sleep(Duration::from_secs(3)).await;
        }
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    let words = "gitlab-runner was given the job several times and did not begin it. Your job is not the cause";
    world.until_failed(job, "runner_system_failure", words).await;
    let trace = world.trace(job);
    assert!(trace.contains("gitlab-runner says: ERROR: Checking for jobs... error status=Error decoding"), "{trace}");
    assert!(ran_for(&world, job) < Duration::from_secs(25), "{:?}", ran_for(&world, job));
    assert_eq!(blocked(&world), None);
    world.assert_clean().await;
}

/// U51: a machine that ends before its runner has sent a byte of the log leaves its console, without what the log masks.
#[tokio::test(start_paused = true)]
async fn a_machine_that_ends_at_once_leaves_its_consoles_last_lines_in_the_log() {
    let mut world = World::new(1);
    world.expect_trouble(&["in the middle of the job", "that wrote no log"]);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.begin(&payload).await;
        let token = payload["token"].as_str().unwrap();
        let printed = format!("$ make\nhunter2-hunter2 and {token}\n[ 3.3] Kernel panic - not syncing: sysrq\n");
        let _ = guest.machine.console.write_all(printed.as_bytes()).await;
        sleep(Duration::from_secs(1)).await;
        guest.machine.power.panic();
        std::future::pending::<()>().await;
    });
    let job = world.job_of(JobSpec::script(["print never"]).with_variable(Variable::secret("KEY", "hunter2-hunter2")));
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "ended by a panic of its kernel").await;
    let trace = world.trace(job);
    for row in ["  | $ make\n", "  | [MASKED] and [MASKED]\n", "  | [ 3.3] Kernel panic - not syncing: sysrq\n"] {
        assert!(trace.contains(row), "{trace}");
    }
    assert!(!trace.contains("hunter2"), "{trace}");
    world.assert_clean().await;
}

/// What a restarted daemon has lost is told apart from a restart of its host, which was measured.
#[tokio::test(start_paused = true)]
async fn a_job_that_cannot_go_on_after_a_restart_does_not_blame_the_host() {
    let mut world = World::new(1);
    world.expect_trouble(&["what the job needs is lost", "did not survive"]);
    let job = world.job(&["print begun", "sleep 60"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.kill();
    world.files.remove(std::path::Path::new("/run")).await.unwrap();
    world.start().await.unwrap();
    let words = "this runner was restarted, and what it needs to go on with the job was not there any more. Your job";
    world.until_failed(job, "runner_system_failure", words).await;
    world.assert_clean().await;
}
