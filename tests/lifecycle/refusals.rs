//! Jobs that are not run: each ends as others do, once and with its line, whatever comes between.

use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Route};
use std::io;
use std::time::Duration;
use tokio::time::sleep;

const UNREAD: &str = "what GitLab sent of this job could not be read";
const NOT_KEPT: &str = "this runner's host could not write the job down";

/// A job whose 201 breaks off behind its id and token.
fn cut_job(world: &World) -> JobId {
    let payload = format!(r#"{{"id":5,"token":"glcbt-64_cut","job_info":{{"name":"{}"}}}}"#, "x".repeat(1000));
    world.standin.script(Matcher::on(Route::RequestJob), Fault::TruncateBody(400));
    world.job_of(JobSpec::raw(JobId(5), Secret::new("glcbt-64_cut"), payload))
}

fn record_was_written(world: &World) -> bool {
    world.files.history().iter().any(|line| line.starts_with("replace ") && line.ends_with("record.json ok"))
}

/// G6, E4: whatever call a daemon is killed at that refuses a job, the next one reports it, once and with its line.
#[test]
fn a_refused_job_is_reported_once_wherever_the_daemon_is_killed() {
    for (seam, when) in [
        (Seam::Files, When::Before),
        (Seam::Files, When::After),
        (Seam::GitLab, When::Before),
        (Seam::GitLab, When::After),
    ] {
        let mut reported = 0;
        for call in 1..100 {
            let mut died = false;
            paused(async {
                let mut world = World::new(1);
                world.expect_trouble(&["assigned a job that cannot be read"]);
                let job = cut_job(&world);
                // Killed in its start, perhaps.
                let _ = world.live(Some(End { seam, call, when })).await;
                world.until_dead_or(job, &[JobState::Failed]).await;
                if !world.is_dead() {
                    world.settle().await;
                }
                died = world.is_dead();
                let written = record_was_written(&world);
                if died {
                    world.start().await.unwrap();
                }
                world.until(job, JobState::Failed).await;
                world.settle().await;
                let (trace, reason) = (world.trace(job), world.found(job).failure_reason);
                if written {
                    assert_eq!(reason.as_deref(), Some("runner_system_failure"), "{seam:?} {call}: {trace}");
                    assert_eq!(trace.matches("dayfly: for your operators").count(), 1, "{seam:?} {call}: {trace}");
                    assert!(trace.contains(UNREAD), "{seam:?} {call}: {trace}");
                    reported += 1;
                }
                world.assert_clean().await;
            });
            if !died {
                assert!(reported > 2, "{seam:?} {when:?}: {reported} of {call} calls");
                break;
            }
        }
    }
}

/// H6, H8: a disk that takes nothing of a job, and holds nothing of it, keeps its end from nobody.
#[tokio::test(start_paused = true)]
async fn a_job_that_no_disk_takes_is_told_of_from_memory() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "write an assigned job down",
        "write down that a job is not run",
        "sent again",
    ]);
    world.start().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    world.files.fail_replaces(Some(io::ErrorKind::StorageFull));
    // GitLab does not hear of it at once either.
    world.standin.script(Matcher::on(Route::AppendTrace).times(5), Fault::status(502));
    let job = world.job(&["print hello"]);
    world.until_failed(job, "runner_system_failure", NOT_KEPT).await;
    let found = world.found(job);
    assert!(found.finished_at.unwrap().duration_since(found.started_at.unwrap()).as_secs() <= 60);
    assert_eq!(world.trace(job).matches("dayfly: for your operators").count(), 1, "{}", world.trace(job));
    world.until_idle().await;
    world.files.fail_replaces(None);
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 0);
}

/// G6, G18: a refused job that is over at GitLab, or unknown there, ends here too.
#[tokio::test(start_paused = true)]
async fn a_refused_job_that_is_over_at_gitlab_ends_here_too() {
    for (answer, within) in [(403, 10), (404, 900)] {
        let mut world = World::new(1);
        world.expect_trouble(&["assigned a job that cannot be read", "sent again"]);
        for route in [Route::AppendTrace, Route::UpdateJob] {
            world
                .standin
                .script(Matcher::on(route).always(), Fault::status_with(answer, &[("Job-Status", "canceled")]));
        }
        let _ = cut_job(&world);
        world.start().await.unwrap();
        sleep(Duration::from_secs(within)).await;
        assert!(!world.requests(Route::AppendTrace).is_empty(), "{}", world.histories());
        assert!(world.status().jobs.is_empty(), "{answer}: {:?}", world.status().jobs);
        world.standin.behave();
        world.standin.edit(|model| model.jobs.clear());
        world.assert_clean().await;
    }
}

/// R4, G17: what GitLab has of such a job from before stays, and the line stands behind it; its size is not ours to say.
#[tokio::test(start_paused = true)]
async fn a_refused_job_s_line_stands_behind_what_gitlab_has_of_before() {
    // Less than the line has, and more.
    for length in [34, 5000] {
        let mut world = World::new(1);
        world.expect_trouble(&["assigned a job that cannot be read"]);
        let job = cut_job(&world);
        let before = format!("2026-01-01T00:00:00.000000Z 00O {}\n", "x".repeat(length - 33));
        world.standin.edit(|model| model.jobs.get_mut(&job).unwrap().trace.bytes.extend(before.bytes()));
        world.start().await.unwrap();
        world.until_failed(job, "runner_system_failure", UNREAD).await;
        let trace = world.trace(job);
        let line = trace.strip_prefix(&before).unwrap_or_else(|| panic!("what was there is gone: {trace}"));
        assert!(line.contains(UNREAD) && line.ends_with("Z\n"), "{trace}");
        world.assert_clean().await;
    }
}
