//! A host whose clock somebody sets, or that slept.

use crate::support::world::{World, paused};
use dayfly_doubles::fake::GuestMachine;
use dayfly_exec::standin::{JobSpec, JobState, Route};
use dayfly_guest_config::{ClockAnswer, ClockQuestion, GuestConfig};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Forward or back, and how far.
const JUMPS: [(bool, Duration); 4] =
    [(true, HOUR), (false, HOUR), (true, YEAR.saturating_mul(10)), (false, YEAR.saturating_mul(10))];

/// E9: the wall clock is set under running and booting jobs: deadlines come when they come.
#[test]
fn a_clock_that_is_set_ends_no_job_and_delays_no_deadline() {
    for (forward, by) in JUMPS {
        paused(async {
            let mut world = World::new(1);
            let job = world.job(&["print one", "sleep 200", "print two"]);
            let late =
                world.job_of(JobSpec::script(["print begun", "sleep 600"]).with_timeout(Duration::from_secs(60)));
            world.start().await.unwrap();
            let since = Instant::now();
            sleep(Duration::from_secs(2)).await;
            world.clock.jump(forward, by);
            world.until_trace(job, "one").await;
            world.clock.jump(!forward, by / 2);
            world.until_failed(late, "job_execution_timeout", "begun").await;
            assert!((50..=70).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
            world.until(job, JobState::Success).await;
            assert!(since.elapsed() < Duration::from_secs(240), "{:?}", since.elapsed());
            world.assert_clean().await;
        });
    }
}

/// E9: likewise between two daemons: the next one knows how long each job has run.
#[test]
fn a_clock_that_is_set_between_two_daemons_ends_no_job() {
    for (forward, by) in JUMPS {
        for begun in [false, true] {
            paused(async {
                let mut world = World::new(1);
                world.expect_trouble(&["the job went on beyond its timeout", "did not let go in time"]);
                let script = ["deaf", "print begun", "sleep 150", "print ended"];
                let job = world.job_of(JobSpec::script(script).with_timeout(Duration::from_secs(600)));
                let endless = JobSpec::script(["deaf", "print begun", "sleep 7000"]);
                let late = world.job_of(endless.with_timeout(Duration::from_secs(60)));
                world.start().await.unwrap();
                let since = Instant::now();
                if begun {
                    world.until_trace(job, "begun").await;
                } else {
                    sleep(Duration::from_secs(2)).await;
                }
                world.hand_over().await;
                world.clock.jump(forward, by);
                world.start().await.unwrap();
                world.until_failed(late, "job_execution_timeout", "did not end within its timeout of 1 min").await;
                assert!((180..=192).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
                world.until(job, JobState::Success).await;
                world.assert_clean().await;
                assert_eq!(world.machines_started(), 2);
            });
        }
    }
}

/// E9: the host slept for two hours, its machines with it; GitLab has given the job up meanwhile.
#[tokio::test(start_paused = true)]
async fn a_job_that_gitlab_dropped_while_the_host_slept_ends_like_a_canceled_one() {
    let mut world = World::new(1);
    let job = world.job(&["print begun", "sleep 600", "print never"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    // No timer of ours counts the time of a suspended host; its wall clock does.
    world.clock.jump(true, HOUR.saturating_mul(2));
    world.standin.cancel(job, false);
    let since = Instant::now();
    world.until_idle().await;
    assert!(since.elapsed() < Duration::from_secs(120), "{:?}", since.elapsed());
    assert!(!world.trace(job).contains("never"));
    let calls = world.requests(Route::UpdateJob);
    let verdicts = calls.iter().filter(|call| {
        let body = String::from_utf8_lossy(call.body.as_deref().unwrap_or_default()).into_owned();
        body.contains("\"success\"") || body.contains("\"failed\"")
    });
    assert_eq!(verdicts.count(), 0);
    world.assert_clean().await;
}

/// U7: a daemon that was stopped for longer than each of its deadlines (SIGSTOP, a frozen cgroup) ends no job that is well.
#[test]
fn a_daemon_that_slept_blames_no_guest_for_its_own_silence() {
    let stopped = Duration::from_secs(500);
    let slept = &["did not run for a while"];
    // Silent when it stopped, and after it woke.
    paused(async move {
        let mut world = World::new(1);
        world.expect_trouble(slept);
        let job = world.job(&["print begun", "sleep 700", "print ended"]);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        sleep(Duration::from_secs(20)).await;
        tokio::time::advance(stopped).await;
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).contains("ended"));
        world.assert_clean().await;
    });
    // While it boots.
    paused(async move {
        let mut world = World::new(1);
        world.expect_trouble(slept);
        let job = world.job(&["print begun"]);
        world.start().await.unwrap();
        world.until_word("booting").await;
        sleep(Duration::from_secs(1)).await;
        tokio::time::advance(stopped).await;
        world.until(job, JobState::Success).await;
        assert_eq!(world.machines_started(), 1);
        world.assert_clean().await;
    });
    // In the grace of a cancel.
    paused(async move {
        let mut world = World::new(1);
        world.expect_trouble(slept);
        let spec = JobSpec::script(["print begun", "sleep 6000"]).with_after_script(["sleep 30", "print cleaned"]);
        let job = world.job_of(spec);
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        world.standin.cancel(job, true);
        world.until_word("canceling").await;
        sleep(Duration::from_secs(5)).await;
        tokio::time::advance(stopped).await;
        world.until(job, JobState::Canceled).await;
        assert!(world.trace(job).contains("cleaned"), "{}", world.trace(job));
        world.assert_clean().await;
    });
    // Its verdict waits at the door when the cap has passed.
    paused(async move {
        let mut world = World::new(1);
        world.expect_trouble(slept);
        let spec = JobSpec::script(["deaf", "print begun", "sleep 30", "print ended"]);
        let job = world.job_of(spec.with_timeout(Duration::from_secs(60)));
        world.start().await.unwrap();
        world.until_trace(job, "begun").await;
        // GitLab itself ends the job five minutes after its timeout.
        tokio::time::advance(stopped / 2).await;
        world.until(job, JobState::Success).await;
        world.assert_clean().await;
    });
}

/// U24: a guest is told the time of the moment at which it asks, however old its config is by then and whoever has set
/// the host's clock since; what is no question is not answered.
#[tokio::test(start_paused = true)]
async fn a_guest_that_asks_is_told_what_time_it_is_now() {
    let mut world = World::new(1);
    let (lines_out, mut lines) = mpsc::channel(8);
    world.hypervisor.set_guest(move |mut machine: GuestMachine| {
        let lines_out = lines_out.clone();
        async move {
            let mut port = BufReader::new(&mut machine.channel);
            for asked_us in [0, 17, 18] {
                if asked_us != 0 {
                    let question = ClockQuestion { asked_us };
                    let text = format!("clock soon\n{question}\n{question} 1\n");
                    port.get_mut().write_all(text.as_bytes()).await.unwrap();
                }
                let mut line = Vec::new();
                while !line.ends_with(b"\n") {
                    // Nobody is connected at first: read again.
                    port.read_until(b'\n', &mut line).await.unwrap();
                    sleep(Duration::from_millis(20)).await;
                }
                lines_out.send(line).await.unwrap();
                sleep(Duration::from_secs(40)).await;
            }
        }
    });
    let job = world.job(&["print never"]);
    world.start().await.unwrap();
    let written_us = GuestConfig::from_line(&lines.recv().await.unwrap()).unwrap().clock_us;
    let now_us = || world.clock.now().as_microsecond();
    let mut asked_at_us = written_us;
    for asked_us in [17, 18] {
        world.clock.jump(asked_us == 17, HOUR);
        let line = timeout(Duration::from_secs(60), lines.recv()).await.expect("an answer").unwrap();
        let answer = ClockAnswer::parse(line.trim_ascii_end()).unwrap();
        assert_eq!(answer.asked_us, asked_us);
        assert!((0..=100_000).contains(&(now_us() - answer.host_us)), "{} {}", now_us(), answer.host_us);
        assert!((answer.host_us - asked_at_us).abs() > 30_000_000, "the answer is as old as its config");
        asked_at_us = answer.host_us;
    }
    world.standin.cancel(job, false);
    world.until_idle().await;
    world.assert_clean().await;
}
