//! Machines of jobs that have failed, kept for an operator: as long as was said, counted, ended by a word, and never unseen.

use crate::support::world::World;
use dayfly::config::Span;
use dayfly::gitlab::JobId;
use dayfly::history::Outcome;
use dayfly_exec::standin::{JobSpec, JobState};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const KEEP: Duration = Duration::from_secs(1800);

fn world() -> World {
    let mut world = World::new(1);
    let class = &mut world.config.class[0];
    (class.keep_failed, class.keep_failed_projects) = (Some(Span::from_secs(1800)), vec!["group/**".into()]);
    world.expect_trouble(&["its machine is kept"]);
    world
}

/// Waits until the machine of this job is kept, or not: until it is gone.
async fn until_kept(world: &World, job: JobId) -> bool {
    world.until(job, JobState::Failed).await;
    sleep(Duration::from_secs(30)).await;
    world.status().jobs.iter().any(|found| found.id == job && found.state == "kept")
}

/// All of a job's life but its machine goes on to its end: GitLab has log and verdict, the author reads what can be done,
/// the room stays taken, status and log say so; and when the time is over nothing is left.
#[tokio::test(start_paused = true)]
async fn the_machine_of_a_job_that_failed_is_kept_for_its_time() {
    let mut world = world();
    let job = world.job(&["print begun", "exit 3"]);
    world.start().await.unwrap();
    world.until_failed(job, "script_failure", "its machine is kept for 30 min").await;
    let failed = Instant::now();
    assert!(world.trace(job).contains(&format!("`dayfly shell {job}`")), "{}", world.trace(job));
    assert!(until_kept(&world, job).await);
    let status = world.status();
    assert!(status.jobs[0].phase.contains(&format!("dayfly shell {job}")), "{:?}", status.jobs);
    assert_eq!((status.capacity.jobs, status.capacity.cpus, status.capacity.memory_mib > 512), (1, 1, true));
    assert!(world.metrics().contains("dayfly_jobs{runner=\"runner\",state=\"kept\"} 1"), "{}", world.metrics());
    assert!(world.ended_jobs().is_empty(), "it has not ended here");
    // What it sends out is carried no longer, and its door is closed.
    let counts = world.hypervisor.counts();
    assert_eq!((counts.vms, counts.carriers), (1, 0), "{counts:?}");
    world.until_idle().await;
    let kept = failed.elapsed();
    assert!(kept >= KEEP - Duration::from_secs(5) && kept < KEEP + Duration::from_secs(60), "{kept:?}");
    let ended = world.ended_jobs();
    assert_eq!((ended[0].verdict, ended[0].exit_code), (Outcome::Failed, Some(3)));
    assert!(ended[0].steps.iter().any(|step| step.what.contains("kept for an operator")), "{:?}", ended[0].steps);
    world.assert_clean().await;
}

/// Neither a hand-over nor a kill makes its time longer, and the next daemon neither asks its guest anything nor lets it
/// speak.
#[tokio::test(start_paused = true)]
async fn a_kept_machine_survives_restarts_by_its_record_and_ends_when_it_should() {
    for killed in [false, true] {
        let mut world = world();
        let job = world.job(&["exit 1"]);
        world.start().await.unwrap();
        assert!(until_kept(&world, job).await);
        let since = Instant::now();
        sleep(Duration::from_secs(600)).await;
        if killed {
            world.kill();
        } else {
            world.hand_over().await;
        }
        sleep(Duration::from_secs(60)).await;
        assert_eq!(world.hypervisor.counts().vms, 1);
        world.start().await.unwrap();
        sleep(Duration::from_secs(5)).await;
        let status = world.status();
        assert_eq!((status.jobs[0].state.as_str(), status.capacity.jobs), ("kept", 1), "{:?}", status.jobs);
        world.until_idle().await;
        let kept = since.elapsed();
        assert!(kept > KEEP - Duration::from_secs(120) && kept < KEEP + Duration::from_secs(60), "{kept:?}");
        assert_eq!(world.found(job).verdicts, 1);
        world.assert_clean().await;
    }
}

/// `dayfly kill` ends it, a drain ends it, its own end ends it; each at once.
#[tokio::test(start_paused = true)]
async fn a_kept_machine_is_ended_by_a_word() {
    for how in ["kill", "drain", "crash"] {
        let mut world = world();
        let job = world.job(&["exit 1"]);
        world.start().await.unwrap();
        assert!(until_kept(&world, job).await);
        let since = Instant::now();
        match how {
            "kill" => drop(world.kill_job(job)),
            "drain" => world.shutdown().drain(),
            _ => world.hypervisor.crash(&world.hypervisor.vms()[0].0.id),
        }
        world.until_idle().await;
        assert!(since.elapsed() < Duration::from_secs(30), "{how}: {:?}", since.elapsed());
        assert_eq!(world.found(job).state, JobState::Failed);
        world.assert_clean().await;
    }
}

/// What did not fail, was canceled, is of another project, of a drain, or beyond the number that may be, is not kept.
#[tokio::test(start_paused = true)]
async fn no_other_machine_is_kept() {
    let mut world = world();
    let well = world.job(&["print well"]);
    world.start().await.unwrap();
    world.until(well, JobState::Success).await;
    let since = Instant::now();
    world.until_idle().await;
    // It does not wait for its guest to hear that it need not stay.
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());

    let canceled = world.job(&["sleep 600"]);
    world.until(canceled, JobState::Running).await;
    sleep(Duration::from_secs(20)).await;
    world.standin.cancel(canceled, true);
    world.until(canceled, JobState::Canceled).await;
    world.until_idle().await;

    let (first, second) = (world.job(&["exit 1"]), world.job(&["sleep 10", "exit 1"]));
    assert!(until_kept(&world, first).await);
    assert!(!until_kept(&world, second).await, "one at once");
    assert!(!world.trace(second).contains("is kept"), "{}", world.trace(second));
    drop(world.kill_job(first));
    world.until_idle().await;

    let other = world.standin.add_project("elsewhere/project");
    world.standin.edit(|model| {
        for runner in model.runners.values_mut() {
            runner.projects.insert(other);
        }
    });
    let elsewhere = world.standin.enqueue(other, JobSpec::script(["exit 1"]));
    assert!(!until_kept(&world, elsewhere).await);
    world.assert_clean().await;
}

/// A guest that hangs is what somebody will want to look at: silence and timeout keep it, too.
#[tokio::test(start_paused = true)]
async fn a_guest_that_hung_is_kept() {
    let mut world = world();
    world.config.concurrent = 1;
    world.expect_trouble(&["the job ends without a verdict of its guest"]);
    let silent = world.job(&["print begun", "hang"]);
    world.start().await.unwrap();
    world.until_failed(silent, "runner_system_failure", "its machine is kept for 30 min").await;
    assert!(until_kept(&world, silent).await);
    drop(world.kill_job(silent));
    world.until_idle().await;
    world.assert_clean().await;
}
