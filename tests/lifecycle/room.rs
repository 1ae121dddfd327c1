//! Jobs are asked for only where there is room for them.

use crate::support::world::World;
use dayfly::status::RunnerState;
use dayfly_doubles::fake::Timing;
use dayfly_exec::standin::{JobSpec, JobState, Route};
use std::time::Duration;
use tokio::time::sleep;

/// Invariant 14: never more machines than `concurrent`, and all room is used.
#[tokio::test(start_paused = true)]
async fn no_more_jobs_run_at_once_than_there_is_room_for() {
    let mut world = World::new(1);
    world.config.concurrent = 3;
    world.add_runner("second");
    let jobs: Vec<_> = (0..12).map(|_| world.job(&["print hello", "sleep 60"])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(world.machines_at_once(), 3);
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_runners_own_limit_holds() {
    let mut world = World::new(1);
    world.config.runner[0].limit = Some(1);
    let jobs: Vec<_> = (0..3).map(|_| world.job(&["print hello", "sleep 60"])).collect();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert_eq!(world.machines_at_once(), 1);
    world.assert_clean().await;
}

/// H10: nothing is asked for, and the status says why.
#[tokio::test(start_paused = true)]
async fn without_its_image_a_runner_asks_for_nothing() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for"]);
    world.config.class[0].image = "missing".into();
    let _never = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_status(|status| status.daemon.problems.iter().any(|problem| problem.contains("missing"))).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), 0);
    world.assert_clean().await;
}

/// H6: no poll while less disk is free than the reserve; then the job comes.
#[tokio::test(start_paused = true)]
async fn without_free_disk_nothing_is_asked_for() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for"]);
    world.config.capacity.disk_gib = Some(1000);
    world.config.capacity.disk_reserve_gib = 20;
    world.files.set_free_bytes(19 << 30);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world
        .until_status(
            |status| matches!(&status.runners[0].state, RunnerState::Blocked { reason } if reason.contains("are free")),
        )
        .await;
    assert_eq!(world.status().daemon.problems.len(), 1);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), 0);
    world.files.set_free_bytes(100 << 30);
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_class_larger_than_the_host_takes_no_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["can never take a job here"]);
    world.config.capacity.memory_mib = Some(500);
    let _never = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_status(|status| status.daemon.problems.len() == 1).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), 0);
    world.assert_clean().await;
}

/// Invariant 19: with room for one, a poll that the one GitLab holds does not keep the other waiting.
#[tokio::test(start_paused = true)]
async fn a_held_poll_of_one_runner_keeps_no_other_waiting() {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    let (second, project) = world.second_gitlab("second");
    for standin in [&world.standin, &second] {
        standin.configure(|settings| settings.long_poll = Duration::from_secs(50));
    }
    world.start().await.unwrap();
    sleep(Duration::from_secs(100)).await;
    for _ in 0..5 {
        let job = second.enqueue(project, JobSpec::script(["print hello"]));
        second.wait_for(|m| m.jobs[&job].state == JobState::Running, Duration::from_secs(10)).await.unwrap();
        second.wait_for(|m| m.jobs[&job].state == JobState::Success, Duration::from_secs(60)).await.unwrap();
        sleep(Duration::from_secs(37)).await;
    }
    world.assert_clean().await;
}

/// Invariant 19: a poll is held where that keeps nobody from asking.
#[tokio::test(start_paused = true)]
async fn with_room_for_both_each_runner_lets_its_poll_be_held() {
    let mut world = World::new(1);
    world.config.concurrent = 2;
    let (second, _) = world.second_gitlab("second");
    for standin in [&world.standin, &second] {
        standin.configure(|settings| settings.long_poll = Duration::from_secs(50));
    }
    world.start().await.unwrap();
    sleep(Duration::from_secs(600)).await;
    let polls = world.requests(Route::RequestJob).len();
    assert!((10..20).contains(&polls), "{polls} polls in ten minutes");
    world.assert_clean().await;
}

/// Invariant 19: with three runners always ready and room for one, a thousand grants differ by one at most.
#[tokio::test(start_paused = true)]
async fn a_thousand_grants_go_round() {
    let mut world = World::new(1);
    world.config.concurrent = 1;
    world.hypervisor.set_timing(Timing { boot: Duration::from_millis(100), ..Timing::default() });
    for name in ["second", "third"] {
        world.add_runner(name);
    }
    for _ in 0..1010 {
        world.job(&["print hello"]);
    }
    world.start().await.unwrap();
    let granted = |world: &World| world.standin.read(|m| m.jobs.values().filter(|job| job.runner.is_some()).count());
    while granted(&world) < 1000 {
        sleep(Duration::from_secs(1)).await;
    }
    let mut grants = std::collections::BTreeMap::<_, i32>::new();
    for runner in world.standin.read(|m| m.jobs.values().filter_map(|job| job.runner).collect::<Vec<_>>()) {
        *grants.entry(runner).or_default() += 1;
    }
    assert_eq!(grants.len(), 3);
    let (least, most) = (grants.values().min().unwrap(), grants.values().max().unwrap());
    assert!(most - least <= 1, "{grants:?}");
}
