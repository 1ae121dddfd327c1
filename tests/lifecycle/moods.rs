//! GitLab's moods in the middle of a job: limits, pages where answers should be, lost first words, clocks.

use crate::support::world::{LONG, World, paused};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Recorded, Route};
use jiff::Timestamp;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// All that GitLab heard of this job, but the poll that gave it out.
fn calls_of(world: &World, job: JobId) -> Vec<Recorded> {
    world.standin.requests().into_iter().filter(|request| request.job == Some(job)).collect()
}

fn seconds_between(a: Timestamp, b: Timestamp) -> i64 {
    b.duration_since(a).as_secs()
}

fn http_date(at: Timestamp) -> String {
    at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

async fn until_no_vm(world: &World) {
    let gone = async {
        while !world.hypervisor.vms().is_empty() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    assert!(timeout(LONG, gone).await.is_ok(), "{}", world.histories());
}

/// G3: a running job's trace obeys a 429, to the second, and loses nothing.
#[test]
fn the_trace_of_a_running_job_waits_when_gitlab_says_so() {
    for header in ["Retry-After", "RateLimit-ResetTime"] {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["it will be sent again"]);
            let now = world.clock.now();
            let when = if header == "Retry-After" { "30".into() } else { http_date(now + Duration::from_secs(30)) };
            let answer = Fault::status_with(429, &[("Date", &http_date(now)), (header, &when)]);
            world.standin.script(Matcher::on(Route::AppendTrace).after(1), answer);
            let job = world.job(&["print one", "sleep 6", "print two", "sleep 60", "print three"]);
            world.start().await.unwrap();
            world.until(job, JobState::Success).await;
            let calls = calls_of(&world, job);
            let limited = calls.iter().position(|call| call.status.is_some_and(|status| status == 429)).unwrap();
            let waited = seconds_between(calls[limited].at, calls[limited + 1].at);
            assert!((30..=31).contains(&waited), "{header}: {waited} s\n{}", world.histories());
            assert!(world.trace(job).ends_with("one\ntwo\nthree\nJob succeeded\n"), "{}", world.trace(job));
            world.assert_clean().await;
        });
    }
}

/// G13: GitLab assigns a job while its poll is awaited at a hand-over: it is written down, and the next process's.
#[tokio::test(start_paused = true)]
async fn a_job_assigned_during_a_hand_over_is_run_by_the_next_daemon() {
    let mut world = World::new(1);
    let job = world.job(&["print hello"]);
    world.standin.script(Matcher::on(Route::RequestJob), Fault::DelayAnswer(Duration::from_secs(3)));
    world.start().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let since = Instant::now();
    world.hand_over().await;
    assert!((1..=5).contains(&since.elapsed().as_secs()), "{:?}", since.elapsed());
    assert_eq!((world.found(job).state, world.machines_started()), (JobState::Running, 0));
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// G19: GitLab has taken our first word, and its answer is lost.
#[tokio::test(start_paused = true)]
async fn a_first_word_without_an_answer_is_said_again_and_starts_one_machine() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again"]);
    world.standin.configure(|settings| settings.two_phase = true);
    world.standin.script(Matcher::on(Route::UpdateJob), Fault::ApplyThenDrop);
    let job = world.job(&["print hello", "sleep 20"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let words = world.requests(Route::UpdateJob);
    assert!(words[0].faulted && words[1].status.is_some_and(|status| status == 200), "{}", world.histories());
    assert!(seconds_between(words[0].at, words[1].at) <= 5, "{}", world.histories());
    assert_eq!((world.machines_started(), world.memory.of(world.found(job).token.expose()).runs), (1, 1));
    world.assert_clean().await;
}

/// G21: GitLab's clock is two hours off, either way: what it names as a time is meant by its own clock, and nothing
/// else of ours looks at it.
#[test]
fn a_gitlab_whose_clock_is_hours_off_changes_nothing() {
    for hours in [-2, 2] {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["no answer to a poll"]);
            let theirs = world.clock.now() + jiff::SignedDuration::from_hours(hours);
            let (date, reset) = (http_date(theirs), http_date(theirs + Duration::from_secs(30)));
            let limited = Fault::status_with(429, &[("Date", &date), ("RateLimit-ResetTime", &reset)]);
            world.standin.script(Matcher::on(Route::RequestJob), limited);
            let always = Fault::AnswerHeaders(vec![("Date".into(), date)]);
            world.standin.script(Matcher::any().always(), always);
            let job = world.job_of(JobSpec::script(["print begun", "sleep 600"]).with_timeout(Duration::from_secs(60)));
            world.start().await.unwrap();
            world.until_failed(job, "job_execution_timeout", "begun").await;
            let polls = world.requests(Route::RequestJob);
            let waited = seconds_between(polls[0].at, polls[1].at);
            assert!((30..=31).contains(&waited), "{waited} s");
            let found = world.found(job);
            let ran = seconds_between(found.started_at.unwrap(), found.finished_at.unwrap());
            assert!((50..70).contains(&ran), "{ran} s");
            world.assert_clean().await;
        });
    }
}

/// G22: a maintenance page with 404 for five minutes costs nothing; after ten minutes of it the job is over.
#[test]
fn a_404_is_an_outage_for_ten_minutes_and_then_the_end() {
    for (minutes, survives) in [(5, true), (15, false)] {
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["it will be sent again", "404"]);
            let job = world.job(&["print begun", "sleep 420", "print ended"]);
            world.start().await.unwrap();
            world.until_trace(job, "begun").await;
            for route in [Route::AppendTrace, Route::UpdateJob] {
                world.standin.script(Matcher::on(route).of_job(job).always(), Fault::html(404));
            }
            let since = Instant::now();
            if survives {
                sleep(Duration::from_secs(60 * minutes)).await;
                world.standin.behave();
                world.until(job, JobState::Success).await;
                assert!(world.trace(job).ends_with("begun\nended\nJob succeeded\n"), "{}", world.trace(job));
            } else {
                world.until_idle().await;
                let took = since.elapsed().as_secs();
                assert!((600..=720).contains(&took), "{took} s");
                let before = calls_of(&world, job).len();
                sleep(Duration::from_secs(60 * minutes)).await;
                assert_eq!(calls_of(&world, job).len(), before, "nothing more goes to GitLab");
                // Which gives it up by itself.
                world.standin.behave();
                world.until(job, JobState::Failed).await;
            }
            world.assert_clean().await;
        });
    }
}

/// R12: a trace beyond GitLab's limit ends the job there, and here.
#[tokio::test(start_paused = true)]
async fn a_trace_that_is_too_long_for_gitlab_ends_the_job_like_a_hard_cancel() {
    let mut world = World::new(1);
    world.standin.edit(|m| m.projects.get_mut(&world.project).unwrap().trace_size_limit_mib = Some(1));
    let line = format!("print {}", "x".repeat(300 << 10));
    let mut script = [line.as_str(), "sleep 5"].repeat(6);
    script.push("sleep 600");
    let job = world.job(&script);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    let since = Instant::now();
    assert_eq!(world.found(job).failure_reason.as_deref(), Some("trace_size_exceeded"));
    until_no_vm(&world).await;
    assert!(since.elapsed() <= Duration::from_secs(40), "the guest has heard it: {:?}", since.elapsed());
    world.until_idle().await;
    let calls = calls_of(&world, job);
    let end = calls.iter().position(|call| call.status.is_some_and(|status| status == 403)).unwrap();
    assert_eq!(calls.len(), end + 1, "no retry storm\n{}", world.histories());
    world.assert_clean().await;
}

/// R13: the verdict carries checksum and size of what GitLab holds, our own lines included.
#[tokio::test(start_paused = true)]
async fn a_verdict_carries_checksum_and_size_of_the_whole_trace() {
    for script in [["print hello", "exit 0"], ["print a longer one", "exit 3"]] {
        let mut world = World::new(1);
        let job = world.job(&script);
        world.start().await.unwrap();
        let over = |m: &dayfly_exec::standin::Model| m.jobs[&job].state.is_over();
        assert!(world.standin.wait_for(over, LONG).await.is_ok());
        world.until_idle().await;
        let held = world.found(job).trace.bytes;
        let verdict = world.requests(Route::UpdateJob).pop().unwrap().body.unwrap();
        let verdict: serde_json::Value = serde_json::from_slice(&verdict).unwrap();
        let checksum = format!("crc32:{:08x}", crc32fast::hash(&held));
        assert_eq!(verdict["output"]["checksum"].as_str(), Some(checksum.as_str()), "{verdict}");
        assert_eq!(verdict["output"]["bytesize"].as_u64(), Some(held.len() as u64), "{verdict}");
        assert!(String::from_utf8_lossy(&held).contains("section_start"), "our lines are counted");
        world.assert_clean().await;
    }
}

/// U11: GitLab fails, or is not there, for 20 s and for 3 min while an artifact is uploaded: the build is not lost.
#[test]
fn an_outage_while_artifacts_are_uploaded_costs_no_finished_build() {
    for (fault, seconds) in [
        (Fault::html(502), 20),
        (Fault::html(502), 180),
        (Fault::status_with(503, &[("Retry-After", "1")]), 20),
        (Fault::status_with(503, &[("Retry-After", "0")]), 180),
        (Fault::DropBeforeApply, 180),
    ] {
        paused(async {
            let mut world = World::new(1);
            world.standin.script(Matcher::on(Route::UploadArtifacts).always(), fault);
            let job = world.job(&["print built", "upload 1000000", "print ended"]);
            world.start().await.unwrap();
            while world.requests(Route::UploadArtifacts).is_empty() {
                sleep(Duration::from_secs(1)).await;
            }
            sleep(Duration::from_secs(seconds)).await;
            world.standin.behave();
            let since = Instant::now();
            world.until(job, JobState::Success).await;
            assert_eq!(world.found(job).artifacts.len(), 1);
            // Not much later than GitLab is back, and without a storm of calls until then.
            assert!(since.elapsed() <= Duration::from_secs(75), "{:?}", since.elapsed());
            let calls = world.requests(Route::UploadArtifacts).len();
            assert!((4..=10).contains(&calls), "{calls} calls in {seconds} s");
            world.assert_clean().await;
        });
    }
}
