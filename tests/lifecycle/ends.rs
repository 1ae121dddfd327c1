//! Every way in which one job can end.

use crate::support::world::World;
use dayfly::standin::JobState;

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
}

#[tokio::test(start_paused = true)]
async fn a_failing_script_keeps_its_exit_code() {
    let mut world = World::new(1);
    let job = world.job(&["exit 42"]);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    let found = world.standin.job(job).unwrap();
    assert_eq!((found.failure_reason.as_deref(), found.exit_code), (Some("script_failure"), Some(42)));
    world.assert_clean().await;
}
