//! The ends that a job comes to by its own doing, by its clock, or by an operator.

use crate::support::guest::Guest;
use crate::support::world::{World, paused};
use dayfly::control::KillOutcome;
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use dayfly_doubles::fake::Timing;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Route};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How long GitLab saw the job run.
fn ran_for(world: &World, job: JobId) -> Duration {
    let found = world.found(job);
    let ran = found.finished_at.unwrap().duration_since(found.started_at.unwrap());
    ran.try_into().unwrap()
}

/// A payload without timeout, failure reasons or anything else that may be missing.
fn bare(id: u64, script: &[&str]) -> JobSpec {
    bare_with(id, script, &serde_json::json!({}))
}

/// The same with other members in it.
fn bare_with(id: u64, script: &[&str], members: &serde_json::Value) -> JobSpec {
    let token = format!("glcbt-64_bare{id}");
    let mut payload = serde_json::json!({
        "id": id, "token": token, "allow_git_fetch": true,
        "job_info": {"id": id, "name": "bare", "stage": "test", "project_id": 1, "project_name": "project"},
        "git_info": {}, "runner_info": {}, "inputs": [], "variables": [],
        "steps": [{"name": "script", "script": script, "timeout": 3600, "when": "on_success", "allow_failure": false}],
        "features": {},
    });
    payload.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    JobSpec::raw(JobId(id), Secret::new(token), payload.to_string())
}

#[tokio::test(start_paused = true)]
async fn a_job_runs_in_a_fresh_vm_and_leaves_nothing() {
    let mut world = World::new(1);
    let job = world.job(&["print hello", "sleep 10"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let trace = world.trace(job);
    assert!(trace.contains("hello\nJob succeeded\n"), "{trace}");
    assert!(trace.lines().next().unwrap().contains("section_start:"), "{trace}");
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failing_script_keeps_its_exit_code() {
    let mut world = World::new(1);
    let job = world.job(&["exit 42"]);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    let found = world.found(job);
    assert_eq!((found.failure_reason.as_deref(), found.exit_code), (Some("script_failure"), Some(42)));
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_job_that_takes_too_long_is_ended_by_its_guest() {
    let mut world = World::new(1);
    let job = world.job_of(JobSpec::script(["print begun", "sleep 600"]).with_timeout(Duration::from_secs(60)));
    world.start().await.unwrap();
    world.until_failed(job, "job_execution_timeout", "begun").await;
    let ran = ran_for(&world, job);
    assert!((60..70).contains(&ran.as_secs()), "the guest counts from its own start: {ran:?}");
    world.assert_clean().await;
}

/// U36: a boot of up to a minute is not charged to the author.
#[test]
fn the_first_minute_of_a_boot_costs_the_job_nothing() {
    for (boot, has) in [(10, 90), (55, 90), (100, 45)] {
        paused(async move {
            let mut world = World::new(1);
            let boot = Duration::from_secs(boot);
            world.hypervisor.set_timing(Timing { boot, ..Timing::default() });
            let job = world.job_of(JobSpec::script(["print begun", "sleep 600"]).with_timeout(Duration::from_secs(90)));
            world.start().await.unwrap();
            world.until_failed(job, "job_execution_timeout", "begun").await;
            let ran = ran_for(&world, job).saturating_sub(boot).as_secs();
            assert!((has..has + 5).contains(&ran), "{has} s after a boot of {boot:?}, not {ran}");
            world.assert_clean().await;
        });
    }
}

/// U9: whatever number GitLab names as a timeout, the job runs.
#[test]
fn no_timeout_is_too_long() {
    for timeout in [u64::MAX, i64::MAX as u64, 366 * 24 * 3600 + 1, 1 << 40] {
        paused(async move {
            let mut world = World::new(1);
            let members = serde_json::json!({"runner_info": {"timeout": timeout}});
            let job = world.job_of(bare_with(7, &["print begun", "sleep 400"], &members));
            world.start().await.unwrap();
            world.until(job, JobState::Success).await;
            world.assert_clean().await;
        });
    }
}

/// U25: a job that asks for containers reads that it gets none.
#[tokio::test(start_paused = true)]
async fn containers_that_a_shell_class_does_not_start_are_named_in_the_log() {
    let mut world = World::new(1);
    let members = serde_json::json!({
        "image": {"name": "alpine:3\u{1b}edge", "entrypoint": null},
        "services": [{"name": "postgres:16"}, {"name": ""}, 3, {"name": "redis"}],
    });
    let asks = world.job_of(bare_with(7, &["print begun"], &members));
    let asks_not =
        world.job_of(bare_with(8, &["print begun"], &serde_json::json!({"image": {"name": ""}, "services": []})));
    world.start().await.unwrap();
    world.until(asks, JobState::Success).await;
    world.until(asks_not, JobState::Success).await;
    let trace = world.trace(asks);
    let line = trace.lines().find(|line| line.contains("has no effect here")).unwrap();
    assert!(line.contains("`image: alpine:3 edge` and `services: postgres:16, redis` has no effect here"), "{line}");
    assert!(trace.find("has no effect") < trace.find("disk ready"), "{trace}");
    assert!(!world.trace(asks_not).contains("has no effect"));
    world.assert_clean().await;
}

/// T13: a guest that never ends is gone at the cap.
#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_its_timeout_is_destroyed_two_minutes_later() {
    let mut world = World::new(1);
    world.expect_trouble(&["the job went on beyond its timeout"]);
    let job =
        world.job_of(JobSpec::script(["deaf", "print begun", "sleep 7000"]).with_timeout(Duration::from_secs(60)));
    world.start().await.unwrap();
    world.until_failed(job, "job_execution_timeout", "did not end within its timeout of 1 min").await;
    let ran = ran_for(&world, job);
    assert!((180..191).contains(&ran.as_secs()), "{ran:?}");
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_job_without_a_timeout_ends_after_an_hour() {
    let mut world = World::new(1);
    world.expect_trouble(&["the job went on beyond its timeout"]);
    // GitLab's own view of such a job is longer.
    world.standin.edit(|m| m.projects.get_mut(&world.project).unwrap().build_timeout = Duration::from_secs(7200));
    let job = world.job_of(bare(7, &["deaf", "print begun", "sleep 9000"]));
    world.start().await.unwrap();
    world.until_failed(job, "job_execution_timeout", "did not end within its timeout of 1 h").await;
    let ran = ran_for(&world, job);
    assert!((3600..3611).contains(&ran.as_secs()), "{ran:?}");
    world.assert_clean().await;
}

/// T12, V4: 100 parallel asks give one 201.
#[tokio::test(start_paused = true)]
async fn a_hundred_asks_at_once_are_given_one_job() {
    let mut world = World::new(1);
    let statuses = Arc::new(Mutex::new(Vec::new()));
    let seen = statuses.clone();
    world.set_guest(move |mut guest: Guest| {
        let seen = seen.clone();
        async move {
            let mut payload: Option<serde_json::Value> = None;
            let asker = Arc::new(guest);
            let mut asks = JoinSet::new();
            for _ in 0..100 {
                let asker = asker.clone();
                asks.spawn(async move {
                    let answer = asker.ask_once().await?;
                    let given = serde_json::from_slice(&answer.body).ok().filter(|_| answer.status == 201);
                    // A runner begins at once, and its other asks are under way still.
                    if let Some(given) = &given {
                        asker.begin(given).await;
                    }
                    Some((answer.status, given))
                });
            }
            while let Some(answer) = asks.join_next().await {
                let Ok(Some((status, given))) = answer else { continue };
                seen.lock().unwrap().push(status);
                payload = given.or(payload);
            }
            guest = Arc::into_inner(asker).unwrap();
            guest.work(&payload.unwrap()).await;
            guest.power_off().await;
        }
    });
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    let statuses = statuses.lock().unwrap();
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| matches!(status, 201 | 204 | 429)) && statuses.len() > 50, "{statuses:?}");
}

/// V5: a 201 that was perhaps never read is given again, until the guest has said anything of its job.
#[tokio::test(start_paused = true)]
async fn a_second_ask_is_given_the_job_again_only_before_the_guest_has_spoken() {
    let mut world = World::new(1);
    let statuses = Arc::new(Mutex::new(Vec::new()));
    let seen = statuses.clone();
    world.set_guest(move |mut guest: Guest| {
        let seen = seen.clone();
        async move {
            let first = guest.ask_once().await.unwrap();
            sleep(Duration::from_secs(3)).await;
            let second = guest.ask_once().await.unwrap();
            assert_eq!(first.body, second.body.clone(), "the job is the same, and so is its time but for what is gone");
            let payload = serde_json::from_slice(&second.body).unwrap();
            guest.work(&payload).await;
            let third = guest.ask_once().await.unwrap();
            seen.lock().unwrap().extend([first.status, second.status, third.status]);
            guest.power_off().await;
        }
    });
    let job = world.job_of(bare(8, &["print hello", "sleep 3"]));
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(*statuses.lock().unwrap(), [201, 201, 204]);
}

/// E2: in GitLab's own word where it has one.
#[tokio::test(start_paused = true)]
async fn an_operator_ends_a_job() {
    for (knows, reason) in [(true, "runner_interrupted"), (false, "runner_system_failure")] {
        let mut world = World::new(1);
        world.expect_trouble(&["the operator ended the job"]);
        let script = ["print begun", "sleep 600"];
        let job = world.job_of(if knows { JobSpec::script(script) } else { bare(9, &script) });
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        assert!(matches!(world.kill_job(job), KillOutcome::Told { .. }));
        world.until_failed(job, reason, "an operator of this runner ended the job").await;
        world.assert_clean().await;
    }
}

/// V9: what GitLab was promised stands, whatever becomes of the machine.
#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_after_its_verdict_costs_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again"]);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        guest.machine.power.crash();
        std::future::pending::<()>().await;
    });
    let job = world.job(&["print hello"]);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1).times(10), Fault::html(503));
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}
