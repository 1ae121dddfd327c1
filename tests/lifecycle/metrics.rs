//! What a daemon counts while jobs run, and how it shows them.

use crate::support::world::World;
use dayfly::status::RunnerState;
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use std::time::Duration;
use tokio::time::sleep;

/// The value of a sample, by its name and labels.
pub(crate) fn value(metrics: &str, sample: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
}

/// A job's time, verdict and calls are all in the metrics; nothing is left of it when it is over.
#[tokio::test(start_paused = true)]
async fn a_job_is_counted_phase_by_phase() {
    let mut world = World::new(1);
    let job = world.job(&["print hello", "sleep 20"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    let metrics = world.metrics();
    for (sample, wanted) in [
        ("dayfly_jobs{runner=\"runner\",state=\"running\"}", 1.0),
        ("dayfly_room_jobs_promised", 1.0),
        ("dayfly_room_jobs_bound", 4.0),
        ("dayfly_room_disk_promised_bytes", f64::from(10 << 20) * 1024.0),
        ("dayfly_draining", 0.0),
        ("dayfly_problems", 0.0),
    ] {
        assert_eq!(value(&metrics, sample), Some(wanted), "{sample}: {metrics}");
    }
    sleep(Duration::from_secs(5)).await;
    assert_eq!(value(&world.metrics(), "dayfly_machines{state=\"running\"}"), Some(1.0));
    world.until(job, JobState::Success).await;
    world.until_idle().await;
    let metrics = world.metrics();
    for phase in ["overlay", "create", "boot", "pick-up", "run", "flush", "clean-up"] {
        let sample = format!("dayfly_job_phase_seconds_count{{phase=\"{phase}\"}}");
        assert_eq!(value(&metrics, &sample), Some(1.0), "{sample}: {metrics}");
    }
    assert!(value(&metrics, "dayfly_job_phase_seconds_count{phase=\"reserve\"}").unwrap() >= 1.0);
    let run = value(&metrics, "dayfly_job_phase_seconds_sum{phase=\"run\"}").unwrap();
    assert!((20.0..30.0).contains(&run), "{run}");
    for (sample, wanted) in [
        ("dayfly_jobs_ended_total{runner=\"runner\",verdict=\"success\"}", Some(1.0)),
        ("dayfly_jobs_ended_total{runner=\"runner\",verdict=\"failed\"}", Some(0.0)),
        ("dayfly_gitlab_requests_total{runner=\"runner\",status=\"201\"}", Some(1.0)),
        ("dayfly_gitlab_unanswered_seconds{runner=\"runner\"}", Some(0.0)),
        ("dayfly_uploader_backlog_bytes", Some(0.0)),
        ("dayfly_machines{state=\"running\"}", Some(0.0)),
        ("dayfly_jobs{runner=\"runner\",state=\"running\"}", None),
        ("dayfly_room_jobs_promised", Some(0.0)),
    ] {
        assert_eq!(value(&metrics, sample), wanted, "{sample}: {metrics}");
    }
    world.assert_clean().await;
}

/// U20: room that a poll holds while GitLab thinks is no job's; it does not flicker.
#[tokio::test(start_paused = true)]
async fn a_poll_under_way_is_no_job() {
    let mut world = World::new(1);
    let held = Fault::DelayAnswer(Duration::from_secs(5));
    world.standin.script(Matcher::on(Route::RequestJob).always(), held);
    world.start().await.unwrap();
    let mut asking = 0;
    for _ in 0..600 {
        let status = world.status();
        assert_eq!(
            (status.capacity.jobs, status.capacity.cpus, status.capacity.memory_mib, status.runners[0].jobs),
            (0, 0, 0, 0)
        );
        asking += status.capacity.asking;
        sleep(Duration::from_millis(100)).await;
    }
    assert!(asking > 300, "{asking} looks of 600 saw a poll");
    world.assert_clean().await;
}

/// U20: a runner that waits names the limit that it waits for.
#[tokio::test(start_paused = true)]
async fn what_a_runner_waits_for_is_named() {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    let job = world.job(&["print begun", "sleep 100"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world
        .until_status(|status| {
            let expected = RunnerState::WaitingForRoom { missing: "`concurrent`, 1 jobs at once".into() };
            status.runners[0].state == expected
        })
        .await;
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// U20: a job's age and phase go on over a restart, and its machine has the name that libvirt knows.
#[tokio::test(start_paused = true)]
async fn age_and_phase_of_a_job_go_on_over_a_restart() {
    let mut world = World::new(1);
    let job = world.job(&["print begun", "sleep 300"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    sleep(Duration::from_secs(100)).await;
    let before = world.status().jobs.remove(0);
    world.hand_over().await;
    world.start().await.unwrap();
    let after = world.status().jobs.remove(0);
    assert!(before.age_s >= 100 && after.age_s >= before.age_s, "{before:?} {after:?}");
    assert_eq!((&after.phase, &after.state, &after.vm), (&before.phase, &before.state, &before.vm));
    let vm = world.hypervisor.vms()[0].0.id.clone();
    assert_eq!(after.vm, Some(dayfly::vm::VmName::from(vm).to_string()));
    assert!(!after.phase.is_empty());
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// U38: who ends a job says why, and its author reads that; GitLab is told that it was interrupted.
#[tokio::test(start_paused = true)]
async fn the_author_of_a_killed_job_reads_the_operators_reason() {
    let mut world = World::new(1);
    world.expect_trouble(&["the operator ended the job"]);
    let job = world.job(&["print begun", "sleep 900"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    let _ = world.kill_job_for(job, "the host is taken down");
    world.until(job, JobState::Failed).await;
    let (found, trace) = (world.found(job), world.trace(job));
    assert_eq!(found.failure_reason.as_deref(), Some("runner_interrupted"), "{trace}");
    assert!(
        trace.contains("an operator of this runner ended the job")
            && trace.contains("dayfly: the operator says: the host is taken down\n"),
        "{trace}"
    );
    world.assert_clean().await;
}
