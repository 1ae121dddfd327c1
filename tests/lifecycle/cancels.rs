//! A job that GitLab no longer wants.

use crate::support::guest::Guest;
use crate::support::world::{LONG, World};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Route};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Final reports that went to GitLab.
fn verdicts_sent(world: &World) -> usize {
    let is_final = |body: &[u8]| {
        let text = String::from_utf8_lossy(body).into_owned();
        text.contains("\"failed\"") || text.contains("\"success\"")
    };
    world.requests(Route::UpdateJob).iter().filter(|request| request.body.as_deref().is_some_and(is_final)).count()
}

/// Requests of the job after the first that GitLab answered 403.
fn requests_after_the_end(world: &World, job: JobId) -> usize {
    let all: Vec<_> = world.standin.requests().into_iter().filter(|request| request.job == Some(job)).collect();
    let end = all.iter().position(|request| request.status.is_some_and(|status| status == 403));
    end.map_or(0, |end| all.len() - end - 1)
}

/// Waits until no VM is left; how long it took.
async fn until_no_vm(world: &World) -> Duration {
    let since = Instant::now();
    let gone = async {
        while !world.hypervisor.vms().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    assert!(timeout(LONG, gone).await.is_ok(), "{}", world.histories());
    since.elapsed()
}

/// G14: GitLab waits for an answer, and gets one.
#[tokio::test(start_paused = true)]
async fn a_graceful_cancel_while_booting_ends_the_job_before_it_starts() {
    let mut world = World::new(1);
    world.expect_trouble(&["canceled while its machine booted"]);
    world.hypervisor.set_guest(|_| std::future::pending());
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_word("booting").await;
    world.standin.cancel(job, true);
    assert_eq!(world.found(job).state, JobState::Canceling);
    world.until(job, JobState::Canceled).await;
    assert!(until_no_vm(&world).await < Duration::from_secs(5));
    let trace = world.trace(job);
    assert!(trace.contains("the job was canceled before it started. Nothing of it has run;"), "{trace}");
    assert_eq!(verdicts_sent(&world), 1);
    world.assert_clean().await;
}

/// G14: nothing more is sent.
#[tokio::test(start_paused = true)]
async fn a_hard_cancel_while_booting_stops_the_boot_and_sends_nothing() {
    let mut world = World::new(1);
    world.hypervisor.set_guest(|_| std::future::pending());
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    world.until_word("booting").await;
    world.standin.cancel(job, false);
    assert!(until_no_vm(&world).await < Duration::from_secs(15), "one keepalive, and the end of the machine");
    assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0));
    world.assert_clean().await;
}

/// G15, K10: nothing of the job runs, so no grace is waited for.
#[tokio::test(start_paused = true)]
async fn a_cancel_before_the_second_ask_of_a_guest_without_its_job_ends_it_at_once() {
    for graceful in [true, false] {
        let mut world = World::new(1);
        world.expect_trouble(&["canceled while its machine booted"]);
        world.set_guest(|guest: Guest| async move {
            loop {
                // The first answer is as good as lost.
                let _ = guest.ask_once().await;
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
        });
        let job = world.job(&["print never"]);
        world.start().await.unwrap();
        world.until_word("running").await;
        world.standin.cancel(job, graceful);
        let took = until_no_vm(&world).await;
        assert!(took < Duration::from_secs(15), "one keepalive, and the next ask: {took:?}\n{}", world.histories());
        world.until(job, JobState::Canceled).await;
        world.assert_clean().await;
    }
}

/// G15: the guest runs its `after_script`.
#[tokio::test(start_paused = true)]
async fn a_graceful_cancel_lets_the_guest_run_its_after_script() {
    let mut world = World::new(1);
    let spec = JobSpec::script(["print begun", "sleep 600", "print never"]).with_after_script([
        "print cleaning",
        "sleep 30",
        "print cleaned",
    ]);
    let job = world.job_of(spec);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.standin.cancel(job, true);
    world.until(job, JobState::Canceled).await;
    let trace = world.trace(job);
    assert!(trace.contains("after_script\ncleaning\ncleaned\n") && !trace.contains("never"), "{trace}");
    world.assert_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_a_graceful_cancel_is_destroyed_after_its_grace() {
    let mut world = World::new(1);
    world.expect_trouble(&["after_script took too long"]);
    let job = world.job(&["deaf", "print begun", "sleep 3000"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.standin.cancel(job, true);
    let since = Instant::now();
    world.until(job, JobState::Canceled).await;
    let took = since.elapsed().as_secs();
    assert!((360..=400).contains(&took), "{took} s");
    assert!(world.trace(job).contains("its after_script did not end within 6 min"), "{}", world.trace(job));
    world.assert_clean().await;
}

/// G16: the guest learns it by a 403, and nothing more goes to GitLab.
#[tokio::test(start_paused = true)]
async fn a_hard_cancel_ends_a_running_job_without_another_word() {
    let mut world = World::new(1);
    let job = world.job(&["print begun", "sleep 600", "print never"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.standin.cancel(job, false);
    let took = until_no_vm(&world).await;
    assert!(took < Duration::from_secs(13), "{took:?}");
    world.until_idle().await;
    assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0), "{}", world.histories());
    assert_eq!(world.found(job).state, JobState::Canceled);
    world.assert_clean().await;
}

/// U13: the machine of a silent job is gone 12 s after a hard cancel, whenever that comes.
#[tokio::test(start_paused = true)]
async fn a_hard_cancel_of_a_silent_job_takes_twelve_seconds_at_most() {
    let mut world = World::new(1);
    world.start().await.unwrap();
    for phase in 0..40 {
        let job = world.job(&["print begun", "sleep 600"]);
        world.until_trace(job, "begun").await;
        tokio::time::sleep(Duration::from_millis(40_000 + 730 * phase)).await;
        world.standin.cancel(job, false);
        let took = until_no_vm(&world).await;
        assert!(took <= Duration::from_secs(12), "{took:?} at phase {phase}");
        world.until_idle().await;
        assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0), "{}", world.histories());
    }
    world.assert_clean().await;
}

/// U13, G16: a guest that has read of it and does not mind is destroyed 10 s later.
#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_a_hard_cancel_is_destroyed_after_its_grace() {
    let mut world = World::new(1);
    let busy = ["print more", "sleep 1"].repeat(600);
    let job = world.job(&[&["deaf", "print begun"], busy.as_slice()].concat());
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.standin.cancel(job, false);
    let took = until_no_vm(&world).await;
    assert!((10..=22).contains(&took.as_secs()), "{took:?}");
    world.until_idle().await;
    assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0), "{}", world.histories());
    world.assert_clean().await;
}

/// G16: likewise when the job is erased under its guest.
#[tokio::test(start_paused = true)]
async fn an_erased_job_ends_like_a_canceled_one() {
    let mut world = World::new(1);
    let job = world.job(&["print begun", "sleep 600"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    world.standin.cancel(job, false);
    world.standin.erase(job);
    until_no_vm(&world).await;
    world.until_idle().await;
    assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0), "{}", world.histories());
    world.assert_clean().await;
}

/// G18: no user code runs.
#[tokio::test(start_paused = true)]
async fn a_job_canceled_before_our_first_word_never_starts() {
    let mut world = World::new(1);
    let job = world.job(&["print never"]);
    world.standin.script(Matcher::on(Route::UpdateJob), Fault::Delay(Duration::from_secs(1)));
    world.start().await.unwrap();
    world.until(job, JobState::Running).await;
    world.standin.cancel(job, false);
    until_no_vm(&world).await;
    world.until_idle().await;
    assert_eq!((verdicts_sent(&world), requests_after_the_end(&world, job)), (0, 0), "{}", world.histories());
    assert_eq!(world.memory.of(world.found(job).token.expose()).runs, 0);
    world.assert_clean().await;
}
