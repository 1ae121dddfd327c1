//! A bug of ours: a task dies. It costs one job, honestly, and nothing else.

use crate::support::world::World;
use dayfly::gitlab::JobId;
use dayfly_doubles::fake::{Op, Timing};
use dayfly_exec::standin::{JobState, Recorded, Route};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// What the author of a job reads whose task died.
const READS: &str = "this runner made a mistake of its own, a bug in dayfly. Your job is not the cause";

/// Lets this many calls of the file layer about the job panic from now on: those that `matches`.
fn plan(world: &mut World, matches: impl Fn(&str, &Path) -> bool + Send + Sync + 'static) -> Arc<AtomicU32> {
    let armed = Arc::new(AtomicU32::new(0));
    let left = armed.clone();
    world.look = Some(Arc::new(move |what: &str, path: &Path| {
        let now = matches(what, path) && left.load(Ordering::SeqCst) > 0;
        assert!(!(now && left.fetch_sub(1, Ordering::SeqCst) > 0), "injected");
    }));
    armed
}

fn record_of(job: JobId) -> impl Fn(&str, &Path) -> bool {
    let record = format!("-{job}/record.json");
    move |what, path| what == "replace" && path.to_string_lossy().ends_with(&record)
}

/// The job has failed, once, with one line that says why; its neighbour goes on.
async fn fails_alone(world: &mut World, job: JobId, other: JobId, author_reads: &str) {
    world.until_failed(job, "runner_system_failure", author_reads).await;
    let trace = world.trace(job);
    assert_eq!(trace.matches("dayfly: for your operators").count(), 1, "{trace}");
    world.until(other, JobState::Success).await;
    assert!(!world.is_dead());
    world.assert_clean().await;
}

/// E5: a panic costs its own job and no other.
#[tokio::test(start_paused = true)]
async fn a_panic_in_one_jobs_task_fails_that_job_only() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let other = world.job(&["print other", "sleep 600"]);
    let job = world.job(&["print begun", "sleep 200"]);
    let armed = plan(&mut world, record_of(job));
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    armed.store(1, Ordering::SeqCst);
    fails_alone(&mut world, job, other, READS).await;
}

/// E5: also a job of a runner that is not configured any more.
#[tokio::test(start_paused = true)]
async fn a_panic_fails_a_job_of_a_runner_that_is_gone() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let job = world.job(&["print begun", "sleep 200"]);
    let armed = plan(&mut world, record_of(job));
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.hand_over().await;
    world.config.runner[0].name = "another".into();
    world.start().await.unwrap();
    let other = world.job(&["print other"]);
    armed.store(1, Ordering::SeqCst);
    fails_alone(&mut world, job, other, READS).await;
}

/// E5: a bug that meets the job's next task too does not go round for ever.
#[tokio::test(start_paused = true)]
async fn a_job_whose_task_panics_again_and_again_is_given_up() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let job = world.job(&["print begun", "sleep 200"]);
    let armed = plan(&mut world, record_of(job));
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    armed.store(u32::MAX, Ordering::SeqCst);
    let other = world.job(&["print other"]);
    fails_alone(&mut world, job, other, "a mistake of its own, twice, a bug in dayfly").await;
    assert!(armed.load(Ordering::SeqCst) >= u32::MAX - 3, "two tasks and the giving up, and no third task");
}

/// E5: a verdict that is known stands, whatever happens to the job's task.
#[tokio::test(start_paused = true)]
async fn a_panic_after_the_verdict_changes_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked"]);
    let job = world.job(&["print hello"]);
    let name = format!("-{job}");
    // The end of the spool's verdict: its record is kept by then.
    let armed = plan(&mut world, move |what, path| {
        what == "remove"
            && path.parent().is_some_and(|dir| dir.ends_with("jobs"))
            && path.to_string_lossy().ends_with(&name)
    });
    armed.store(1, Ordering::SeqCst);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(armed.load(Ordering::SeqCst), 0);
}

/// E5: the uploader's panic is its job's.
#[tokio::test(start_paused = true)]
async fn a_panic_of_the_uploader_fails_its_job_only() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let other = world.job(&["print other", "sleep 60"]);
    let job = world.job(&["print begun", "sleep 20", "print more", "sleep 200"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    let armed = AtomicBool::new(true);
    world.standin.hook(Arc::new(move |request: &Recorded| {
        let its = request.route == Route::AppendTrace && request.job == Some(job);
        assert!(!(its && armed.swap(false, Ordering::SeqCst)), "injected");
        Vec::new()
    }));
    fails_alone(&mut world, job, other, READS).await;
}

/// E5: so is that of the task of its machine, in whatever call.
#[tokio::test(start_paused = true)]
async fn a_panic_of_the_machines_task_fails_its_job_only() {
    for panics in [Op::CreateOverlay, Op::Start, Op::State] {
        let mut world = World::new(1);
        world.expect_trouble(&["panicked", "a bug of dayfly"]);
        let armed = AtomicBool::new(true);
        world.hypervisor.judge_calls(move |op, _| {
            assert!(!(op == panics && armed.swap(false, Ordering::SeqCst)), "injected");
            None
        });
        let job = world.job(&["print never", "sleep 200"]);
        world.start().await.unwrap();
        world.until(job, JobState::Failed).await;
        let other = world.job(&["print other"]);
        fails_alone(&mut world, job, other, READS).await;
    }
}

/// E5: one that dies while it takes the machine down has a successor.
#[tokio::test(start_paused = true)]
async fn a_panic_while_a_machine_is_taken_down_leaves_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked"]);
    let left = AtomicU32::new(3);
    world.hypervisor.judge_calls(move |op, _| {
        let panics = op == Op::Destroy && left.load(Ordering::SeqCst) > 0;
        assert!(!(panics && left.fetch_sub(1, Ordering::SeqCst) > 0), "injected");
        None
    });
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// E5, V1: a call that a dead task had begun takes effect before its successor takes down what there is.
#[tokio::test(start_paused = true)]
async fn a_disk_that_is_being_made_as_a_task_dies_is_not_left() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    world.hypervisor.set_timing(Timing { overlay: Duration::from_secs(20), ..Timing::default() });
    let armed = AtomicBool::new(true);
    world.standin.hook(Arc::new(move |request: &Recorded| {
        let appends = request.route == Route::AppendTrace;
        assert!(!(appends && armed.swap(false, Ordering::SeqCst)), "injected");
        Vec::new()
    }));
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    world.until_status(|status| status.jobs.is_empty()).await;
    // Not yet time for a sweep.
    tokio::time::sleep(Duration::from_secs(25)).await;
    assert_eq!(world.hypervisor.counts().overlays, 0, "{}", world.histories());
    world.assert_clean().await;
}

/// E5: and the door's.
#[tokio::test(start_paused = true)]
async fn a_panic_of_a_door_fails_its_job_only() {
    let mut world = World::new(1);
    world.by_port();
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let armed = plan(&mut world, |what, _| what == "accept");
    let job = world.job(&["print begun", "sleep 200"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    armed.store(1, Ordering::SeqCst);
    world.until(job, JobState::Failed).await;
    let other = world.job(&["print other"]);
    fails_alone(&mut world, job, other, READS).await;
}

/// E5: likewise where the door is behind a wire.
#[tokio::test(start_paused = true)]
async fn a_panic_of_a_door_behind_a_wire_fails_its_job_only() {
    let mut world = World::new(1);
    world.expect_trouble(&["panicked", "a bug of dayfly"]);
    let job = world.job(&["print begun", "sleep 200"]);
    let armed = AtomicBool::new(true);
    world.hypervisor.judge_calls(move |op, _| {
        assert!(!(op == Op::OpenDoor && armed.swap(false, Ordering::SeqCst)), "injected");
        None
    });
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    let other = world.job(&["print other"]);
    fails_alone(&mut world, job, other, READS).await;
}

/// A long-lived task of the daemon's own: it ends, and the next start goes on with the jobs.
#[tokio::test(start_paused = true)]
async fn a_panic_of_the_daemons_own_tasks_is_a_hand_over() {
    for panics in [Op::List, Op::ListOverlays] {
        let mut world = World::new(1);
        world.expect_trouble(&["died", "let go in time"]);
        let job = world.job(&["print begun", "sleep 200", "print ended"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        let armed = AtomicBool::new(true);
        world.hypervisor.judge_calls(move |op, _| {
            assert!(!(op == panics && armed.swap(false, Ordering::SeqCst)), "injected");
            None
        });
        // Nobody told it to end.
        world.ended().await;
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
        assert_eq!(world.machines_started(), 1);
    }
}
