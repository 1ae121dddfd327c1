//! GitLab gives one job out twice.

use crate::support::guest::Guest;
use crate::support::world::World;
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use dayfly_doubles::fake::{self, Op};
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Route, Trace};
use std::time::Duration;
use tokio::time::sleep;

const ID: u64 = 7;
const FIRST: &str = "glcbt-64_first";
const NEWEST: &str = "glcbt-64_newest";

fn payload(token: &str, script: &[&str]) -> String {
    let payload = serde_json::json!({
        "id": ID, "token": token, "job_info": {"id": ID, "name": "twice", "project_id": 1, "project_name": "project"},
        "git_info": {}, "runner_info": {"timeout": 3600}, "inputs": [], "variables": [], "features": {},
        "steps": [{"name": "script", "script": script, "timeout": 3600, "when": "on_success", "allow_failure": false}],
    });
    payload.to_string()
}

fn first(world: &World, script: &[&str]) -> JobId {
    world.job_of(JobSpec::raw(JobId(ID), Secret::new(FIRST), payload(FIRST, script)))
}

/// The next 201 says the job again, with this token, which is GitLab's word from that moment on.
/// (What it meant to say was another job, which fails as stuck.)
async fn give_again(world: &World, token: &str, script: &[&str]) {
    world.standin.script(Matcher::on(Route::RequestJob), Fault::ReplaceBody(payload(token, script).into()));
    let other = world.job(&["print never"]);
    world.until(other, JobState::Running).await;
    world.standin.edit(|model| {
        let job = model.jobs.get_mut(&JobId(ID)).unwrap();
        job.token = Secret::new(token);
    });
    world.standin.edit(|model| model.jobs.remove(&other));
}

/// GitLab puts the job that runs back into its queue, and gives it out anew while the first still ends here.
async fn given_anew_while_the_first_ends(world: &World, job: JobId) {
    world.standin.edit(|model| {
        // The token of before is worth nothing.
        let job = model.jobs.get_mut(&job).unwrap();
        (job.state, job.queued, job.token) = (JobState::Pending, false, Secret::new(NEWEST));
    });
    world.until_word("releasing").await;
    world.standin.edit(|model| {
        let job = model.jobs.get_mut(&job).unwrap();
        (job.state, job.trace) = (JobState::Running, Trace::default());
    });
    give_again(world, NEWEST, &["print newest", "sleep 5"]).await;
}

/// For the general check of the trace: the job at GitLab is that of the guest with the first token.
fn same_guest(world: &World) {
    world.standin.edit(|model| model.jobs.get_mut(&JobId(ID)).unwrap().token = Secret::new(FIRST));
}

/// G17: before the first has started, the newest is run, on the one machine.
#[tokio::test(start_paused = true)]
async fn a_job_given_out_anew_while_it_boots_is_run_once_as_the_newest() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned this job anew before it has started"]);
    let job = first(&world, &["print first"]);
    world.start().await.unwrap();
    world.until_word("booting").await;
    give_again(&world, NEWEST, &["print newest", "sleep 5", "upload 1000"]).await;
    world.until(job, JobState::Success).await;
    let trace = world.trace(job);
    assert!(trace.contains("newest") && trace.contains("upload: Some(201)") && !trace.contains("first"), "{trace}");
    assert_eq!((world.memory.of(FIRST).runs, world.memory.of(NEWEST).runs), (0, 1));
    assert_eq!(world.machines_started(), 1);
    world.assert_clean().await;
}

/// G17: the second time with the same token it is logged, and nothing else.
#[tokio::test(start_paused = true)]
async fn the_same_job_given_out_again_is_run_once() {
    for word in ["booting", "running"] {
        let mut world = World::new(1);
        world.expect_trouble(&["assigned this job again"]);
        let script = ["print hello", "sleep 20"];
        let job = first(&world, &script);
        world.start().await.unwrap();
        world.until_word(word).await;
        give_again(&world, FIRST, &script).await;
        world.until(job, JobState::Success).await;
        assert_eq!((world.memory.of(FIRST).runs, world.machines_started()), (1, 1));
        assert!(world.log.text().contains("assigned this job again"));
        world.assert_clean().await;
    }
}

/// G17: once it has started, the first goes on; GitLab, which knows the newest token only, hears of it by that.
#[tokio::test(start_paused = true)]
async fn a_job_given_out_anew_while_it_runs_goes_on_and_ends_once() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned this job anew after it has started", "refuses the job's token"]);
    let job = first(&world, &["print begun", "sleep 40", "upload 1000", "print ended"]);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(4)).await;
    give_again(&world, NEWEST, &["print newest"]).await;
    world.until(job, JobState::Success).await;
    let trace = world.trace(job);
    assert!(trace.contains("upload: Some(201)") && trace.ends_with("ended\nJob succeeded\n"), "{trace}");
    assert_eq!((world.memory.of(FIRST).runs, world.memory.of(NEWEST).runs), (1, 0));
    assert_eq!(world.machines_started(), 1);
    same_guest(&world);
    world.assert_clean().await;
}

/// G17: the same, with a restart of the daemon before GitLab could refuse the first token.
#[tokio::test(start_paused = true)]
async fn a_newer_token_survives_a_restart() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned this job anew after it has started", "refuses the job's token", "sent again"]);
    let job = first(&world, &["print begun", "sleep 40", "print ended"]);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(4)).await;
    for route in [Route::UpdateJob, Route::AppendTrace] {
        world.standin.script(Matcher::on(route).always(), Fault::status(502));
    }
    give_again(&world, NEWEST, &["print newest"]).await;
    sleep(Duration::from_millis(500)).await;
    world.kill();
    world.standin.behave();
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).ends_with("ended\nJob succeeded\n"), "{}", world.trace(job));
    assert_eq!(world.machines_started(), 1, "{}", world.histories());
    same_guest(&world);
    world.assert_clean().await;
}

/// G17: a job whose first life is over at GitLab is begun again, when that one's machine has gone.
#[tokio::test(start_paused = true)]
async fn a_job_given_out_anew_while_it_ends_is_begun_when_the_first_has_gone() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned this job anew when it had ended here"]);
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        sleep(Duration::from_secs(20)).await;
        guest.power_off().await;
    });
    let job = first(&world, &["print begun", "sleep 40", "print ended"]);
    world.start().await.unwrap();
    world.until_word("running").await;
    sleep(Duration::from_secs(4)).await;
    given_anew_while_the_first_ends(&world, job).await;
    world.until(job, JobState::Success).await;
    assert_eq!((world.machines_started(), world.machines_at_once()), (2, 1));
    assert_eq!((world.memory.of(FIRST).runs, world.memory.of(NEWEST).runs), (1, 1));
    // The trace is that of two guests, which the general check does not know.
    world.standin.edit(|model| model.jobs.clear());
    world.assert_clean().await;
}

/// G17: a job that is given out anew while the one before does not end is not run, and its record stays that one's.
#[tokio::test(start_paused = true)]
async fn a_job_given_out_anew_while_the_first_does_not_end_is_refused() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "assigned this job anew when it had ended here",
        "is not run: the one of before",
        "destroy",
    ]);
    world.hypervisor.fail_always(Op::Destroy, fake::Fault::Refused("injected"));
    world.set_guest(|mut guest: Guest| async move {
        let payload = guest.ask().await.unwrap();
        guest.work(&payload).await;
        std::future::pending().await
    });
    let job = first(&world, &["print begun", "sleep 400", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    given_anew_while_the_first_ends(&world, job).await;
    world.until_failed(job, "runner_system_failure", "gave this job out again while this runner was ending it").await;
    assert_eq!(world.status().jobs.len(), 1, "the first goes on to end");
    let paths = world.files.paths_below("/state/jobs".as_ref());
    assert!(paths.iter().any(|path| path.ends_with("record.json")), "{paths:?}");
    world.hypervisor.heal();
    world.until_idle().await;
    assert_eq!((world.machines_started(), world.memory.of(NEWEST).runs), (1, 0));
    world.standin.edit(|model| model.jobs.clear());
    world.assert_clean().await;
}
