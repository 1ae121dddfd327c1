//! A new configuration under running jobs.

use crate::support::world::World;
use dayfly::config::Limits;
use dayfly::config::{Config, Span};
use dayfly::daemon::ReloadError;
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{JobState, Route};
use std::time::Duration;
use tokio::time::sleep;

/// E10: whatever is wrong with the new one, that of before stays, and no job notices.
#[tokio::test(start_paused = true)]
async fn a_reload_that_fails_changes_nothing() {
    type Change = fn(&mut Config);
    let mistakes: [(&str, Change); 6] = [
        ("token", |c| c.runner[0].token_file = "/nowhere/token".into()),
        ("certificate", |c| c.runner[0].tls_ca_file = Some("/nowhere/ca.pem".into())),
        ("state_directory", |c| c.state_directory = "/elsewhere".into()),
        ("runtime_directory", |c| c.runtime_directory = "/elsewhere".into()),
        ("hypervisor", |c| c.hypervisor.uri = "qemu:///other".into()),
        ("image_directory", |c| c.image_directory = "/elsewhere".into()),
    ];
    let mut world = World::new(1);
    world.expect_trouble(&["reload the configuration"]);
    let running = world.job(&["print begun", "sleep 300", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(running, "begun").await;
    let good = world.config.clone();
    for (what, mistake) in mistakes {
        // Whatever else is in it does not come into force either.
        world.config.class[0].memory_mib = 4096;
        mistake(&mut world.config);
        let error = world.reload().await.unwrap_err();
        let named = match &error {
            ReloadError::Fixed(key) => *key == what,
            ReloadError::Unusable(_) => what == "token" || what == "certificate",
            ReloadError::Busy => false,
        };
        assert!(named, "{what}: {error:?}");
        world.config = good.clone();
        let job = world.job(&["print hello", "sleep 5"]);
        world.until_trace(job, "hello").await;
        assert!(world.hypervisor.vms().iter().all(|(spec, _)| spec.memory_mib == 512), "{what}");
        world.until(job, JobState::Success).await;
    }
    world.until(running, JobState::Success).await;
    world.assert_clean().await;
}

/// E10: a runner that is gone finishes its jobs and gets no more; another begins.
#[tokio::test(start_paused = true)]
async fn a_removed_runner_finishes_its_jobs_and_asks_for_none() {
    let mut world = World::new(1);
    let (second, project) = world.second_gitlab("second");
    let entries = world.config.runner.clone();
    world.config.runner.truncate(1);
    let running = world.job(&["print begun", "sleep 300", "upload 1000", "print ended"]);
    world.start().await.unwrap();
    world.until_trace(running, "begun").await;
    world.config.runner = entries[1..].to_vec();
    world.reload().await.unwrap();
    assert_eq!(world.status().runners.iter().map(|runner| runner.name.as_str()).collect::<Vec<_>>(), ["second"]);
    // What was under way may still bring one; after that nobody asks.
    sleep(Duration::from_secs(60)).await;
    let before = world.requests(Route::RequestJob).len();
    let (never, other) = (world.job(&["print never"]), spec_of(&second, project));
    world.until(running, JobState::Success).await;
    assert!(world.trace(running).ends_with("ended\nJob succeeded\n"), "{}", world.trace(running));
    let ended = second.wait_for(|m| m.jobs[&other].state == JobState::Success, Duration::from_secs(600)).await;
    assert!(ended.is_ok(), "{}", world.histories());
    assert_eq!(world.requests(Route::RequestJob).len(), before);
    assert_eq!(world.found(never).state, JobState::Pending);
    // And back again.
    world.config.runner = entries;
    world.reload().await.unwrap();
    world.until(never, JobState::Success).await;
    world.assert_clean().await;
}

fn spec_of(gitlab: &dayfly_exec::standin::Standin, project: dayfly_exec::standin::ProjectId) -> JobId {
    gitlab.enqueue(project, dayfly_exec::standin::JobSpec::script(["print other", "sleep 20"]))
}

/// E10: image, class, network, limits and capacity hold for the next machine; the one that runs keeps its own.
#[tokio::test(start_paused = true)]
async fn what_is_changed_holds_for_the_next_machine() {
    let mut world = World::new(1);
    world.expect_trouble(&["the guest went silent"]);
    world.config.concurrent = 2;
    world.by_port();
    let running = world.job(&["print begun", "sleep 60", "hang"]);
    world.start().await.unwrap();
    world.until_trace(running, "begun").await;
    world.config.class[0].memory_mib = 2048;
    world.config.class[0].cpus = 3;
    world.config.network.guest_ports = "30000-30009".parse().unwrap();
    world.config.limits = Limits { silence_deadline: Span::from_secs(60), ..Limits::default() };
    world.config.concurrent = 3;
    world.reload().await.unwrap();
    let next = [world.job(&["print next", "sleep 400"]), world.job(&["print next", "sleep 5", "hang"])];
    for job in next {
        world.until_trace(job, "next").await;
    }
    let mut machines: Vec<_> =
        world.hypervisor.vms().into_iter().map(|(spec, _)| (spec.memory_mib, spec.cpus)).collect();
    machines.sort_unstable();
    assert_eq!(machines, [(512, 1), (2048, 3), (2048, 3)]);
    let mut doors: Vec<u16> = world.hypervisor.doors().into_iter().map(|door| door.port()).collect();
    doors.sort_unstable();
    assert_eq!(doors, [20_000, 30_000, 30_001]);
    world.until_failed(next[1], "runner_system_failure", "said nothing for 1 min").await;
    world.until_failed(running, "runner_system_failure", "said nothing for 5 min").await;
    world.until(next[0], JobState::Success).await;
    world.assert_clean().await;
}

/// E10: again and again, under load: no job is lost, none is taken twice, and the room stays what it is.
#[tokio::test(start_paused = true)]
async fn fifty_reloads_under_load_cost_no_job() {
    let mut world = World::new(1);
    world.standin.configure(|settings| settings.long_poll = Duration::from_secs(20));
    world.config.concurrent = 3;
    let jobs: Vec<JobId> = (0..40).map(|_| world.job(&["print hello", "sleep 7"])).collect();
    world.start().await.unwrap();
    for n in 0..50_u64 {
        sleep(Duration::from_millis(900 + 37 * n)).await;
        world.config.class[0].memory_mib = 512 + n;
        world.reload().await.unwrap();
    }
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    assert!(world.machines_at_once() <= 3);
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 40);
}
