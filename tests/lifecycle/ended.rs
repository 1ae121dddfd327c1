//! What is kept of jobs that have ended, and what can be looked at while they run: `dayfly jobs`, `job show`, `console`.

use crate::support::guest::Guest;
use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::config::Span;
use dayfly::history::{AtGitlab, Outcome};
use dayfly::status::{ConsoleFound, JobFound};
use dayfly_exec::standin::{JobSpec, JobState, Variable};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::sleep;

/// A guest that prints rows on its console, one of them with a secret of the job's, and runs its job.
fn talks(world: &World) {
    world.set_guest(|mut guest: Guest| async move {
        let _ = guest.machine.console.write_all(b"booting\r\n").await;
        let Some(payload) = guest.ask().await else { return };
        guest.begin(&payload).await;
        for row in ["hunter2-hunter2 \x1b[2J", "second", "third"] {
            let _ = guest.machine.console.write_all(format!("{row}\n").as_bytes()).await;
            sleep(Duration::from_secs(10)).await;
        }
        guest.work(&payload).await;
        guest.power_off().await;
    });
}

fn secretive(world: &World) -> dayfly::gitlab::JobId {
    world.job_of(JobSpec::script(["print done"]).with_variable(Variable::secret("KEY", "hunter2-hunter2")))
}

async fn rows(world: &World, job: dayfly::gitlab::JobId, from: Option<u64>) -> dayfly::vm::console::Rows {
    match world.console(job, from).await {
        ConsoleFound::Running { rows } => rows,
        other => panic!("{other:?}"),
    }
}

/// A job's steps and console while it runs, and all of it when it has ended; over a hand-over, too.
#[tokio::test(start_paused = true)]
async fn a_job_can_be_looked_at_while_it_runs_and_when_it_has_ended() {
    let mut world = World::new(1);
    talks(&world);
    let job = secretive(&world);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(1)).await;
    let JobFound::Running { job: detail } = world.job_shown(job).await else { panic!("it runs") };
    let steps: Vec<&str> = detail.steps.iter().map(|step| step.what.as_str()).collect();
    assert_eq!((steps[0], *steps.last().unwrap()), ("disk ready", "its guest has the job"), "{steps:?}");
    assert_eq!((detail.gitlab.as_str(), detail.machine.as_ref().unwrap().cpus), ("running", 1));
    let first = rows(&world, job, None).await;
    assert_eq!(first.text, "booting\n[MASKED] \\u{1b}[2J\n");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(rows(&world, job, Some(first.next)).await.text, "second\n");
    assert!(world.ended_jobs().is_empty());

    world.hand_over().await;
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.until_idle().await;
    let JobFound::Ended { end } = world.job_shown(job).await else { panic!("it has ended") };
    assert_eq!((end.verdict, end.at_gitlab.clone(), end.why.clone()), (Outcome::Success, AtGitlab::All, None));
    assert_eq!((end.project.as_str(), end.runner.as_str(), end.class.as_str()), ("group/project", "runner", "small"));
    let machine = end.machine.as_ref().unwrap();
    assert_eq!((machine.image.as_str(), machine.digest.len()), ("test", 64));
    assert!(machine.vm.as_ref().unwrap().starts_with("df-"));
    let steps: Vec<&str> = end.steps.iter().map(|step| step.what.as_str()).collect();
    for step in ["disk ready", "its guest has the job", "the machine is gone", "nothing waits for GitLab any more"] {
        assert_eq!(steps.iter().filter(|what| **what == step).count(), 1, "{step}: {steps:?}");
    }
    assert!(end.steps.windows(2).all(|pair| pair[0].at_ms <= pair[1].at_ms), "{:?}", end.steps);
    assert_eq!(end.console.as_deref(), Some("booting\n[MASKED] \\u{1b}[2J\nsecond\nthird\n"));
    assert_eq!(world.ended_jobs().len(), 1);
    assert!(matches!(world.console(job, Some(9)).await, ConsoleFound::Ended { rows: 4, .. }));
    world.assert_clean().await;
}

/// What this daemon saw stands beside GitLab's reason; a job that GitLab had ended is told as such.
#[tokio::test(start_paused = true)]
async fn ends_say_how_they_came() {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    world.expect_trouble(&["in the middle of the job"]);
    let jobs = [world.job(&["print begun", "sleep 5", "panic"]), world.job(&["exit 3"]), world.job(&["sleep 600"])];
    world.start().await.unwrap();
    world.until(jobs[0], JobState::Failed).await;
    world.until(jobs[1], JobState::Failed).await;
    world.until(jobs[2], JobState::Running).await;
    sleep(Duration::from_secs(20)).await;
    world.standin.cancel(jobs[2], false);
    world.until_idle().await;
    let ended = world.ended_jobs();
    let found = |job| ended.iter().find(|end| end.id == job).unwrap();
    assert!(found(jobs[0]).why.as_deref().unwrap().contains("panic"), "{:?}", found(jobs[0]));
    assert_eq!(found(jobs[0]).failure_reason.as_deref(), Some("runner_system_failure"));
    assert_eq!((found(jobs[1]).exit_code, found(jobs[1]).why.clone()), (Some(3), None));
    assert_eq!((found(jobs[2]).verdict, &found(jobs[2]).at_gitlab), (Outcome::Over, &AtGitlab::OverBefore));
    world.assert_clean().await;
}

/// What is kept is bounded, and none of it outlives its time, whether jobs come or not.
#[tokio::test(start_paused = true)]
async fn what_is_kept_goes_when_its_time_is_over() {
    let mut world = World::new(1);
    world.config.history.jobs = 2;
    world.config.history.keep = Span::from_secs(3600);
    let jobs: Vec<_> = (0..4).map(|n| world.job(&[&format!("print {n}")])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    world.until_idle().await;
    assert_eq!((world.ended_jobs().len(), world.files.paths_below("/state/ended".as_ref()).len()), (2, 2));
    // The wall clock is what counts, and the sweep is what looks.
    world.clock.jump(true, Duration::from_secs(2 * 3600));
    sleep(Duration::from_secs(61)).await;
    assert_eq!((world.ended_jobs().len(), world.files.paths_below("/state/ended".as_ref()).len()), (0, 0));
    world.assert_clean().await;
}

/// E15: killed at any call that its end makes of the disk, a job is kept once.
#[test]
fn a_daemon_that_is_killed_at_a_jobs_end_keeps_it_once() {
    for call in 1.. {
        let mut survived = false;
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["it will be sent again"]);
            let job = world.job(&["print done"]);
            world.live(Some(End { seam: Seam::Files, call, when: When::Before })).await.unwrap();
            world.until_dead_or(job, &[JobState::Success]).await;
            world.settle().await;
            survived = !world.is_dead();
            if !survived {
                world.start().await.unwrap();
            }
            if world.until_over(job).await {
                world.until_idle().await;
                assert_eq!(world.ended_jobs().iter().filter(|end| end.id == job).count(), 1, "call {call}");
            }
        });
        if survived {
            assert!(call > 10, "only {call} calls");
            return;
        }
    }
}
