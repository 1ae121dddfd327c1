//! GitLab that fails, limits, forgets and repeats itself; and two of them.

use crate::support::world::World;
use dayfly::gitlab::JobId;
use dayfly::secret::Secret;
use dayfly::status::RunnerState;
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Persist, Recorded, Route};
use std::time::Duration;
use tokio::time::sleep;

/// Seconds between the polls of a list.
fn gaps(polls: &[Recorded]) -> Vec<i64> {
    polls.windows(2).map(|pair| pair[1].at.duration_since(pair[0].at).as_secs()).collect()
}

/// G12, G1, B9: ten minutes without GitLab cost none of twenty jobs anything.
#[tokio::test(start_paused = true)]
async fn an_outage_of_gitlab_costs_no_running_job_anything() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again", "GitLab has not answered for 1 min"]);
    world.config.concurrent = 21;
    let jobs: Vec<JobId> =
        (0..20).map(|n| world.job(&["print begun", &format!("sleep {}", 60 * n), "print ended"])).collect();
    world.start().await.unwrap();
    for job in &jobs {
        world.until_trace(*job, "begun").await;
    }
    world.standin.script(Matcher::any().always(), Fault::html(502));
    sleep(Duration::from_secs(600)).await;
    world.standin.behave();
    let recovered = world.clock.now();
    for job in &jobs {
        world.until(*job, JobState::Success).await;
        assert!(world.trace(*job).ends_with("ended\nJob succeeded\n"), "{}", world.trace(*job));
    }
    let polls = world.requests(Route::RequestJob);
    let first = polls.iter().find(|poll| poll.at >= recovered).unwrap();
    assert!(first.at.duration_since(recovered).as_secs() <= 15, "{first:?}");
    let of_outage = polls.iter().filter(|poll| poll.faulted).count();
    assert!((100..400).contains(&of_outage), "{of_outage} polls in ten minutes of outage");
    world.assert_clean().await;
}

/// G3: no poll before the time that GitLab named.
#[tokio::test(start_paused = true)]
async fn a_limited_runner_asks_again_when_it_may() {
    let mut world = World::new(1);
    world.expect_trouble(&["no answer to a poll"]);
    world.standin.script(Matcher::on(Route::RequestJob), Fault::status_with(429, &[("Retry-After", "30")]));
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let gap = gaps(&world.requests(Route::RequestJob))[0];
    assert!((30..=31).contains(&gap), "{gap} s");
    world.assert_clean().await;
}

/// G4: one poll in five minutes, a red status, and running jobs finish.
#[tokio::test(start_paused = true)]
async fn a_refused_runner_slows_down_and_finishes_its_jobs() {
    let mut world = World::new(1);
    world.expect_trouble(&["GitLab refuses this runner"]);
    let job = world.job(&["print begun", "sleep 200"]);
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    let before = world.requests(Route::RequestJob).len();
    world.standin.script(Matcher::on(Route::RequestJob).always(), Fault::status(403));
    // A poll that was held when the token was revoked still ends well.
    world.until_status(|status| matches!(status.runners[0].state, RunnerState::Refused { .. })).await;
    assert_eq!(world.status().daemon.problems.len(), 1);
    world.until(job, JobState::Success).await;
    sleep(Duration::from_secs(1800)).await;
    let polls = world.requests(Route::RequestJob);
    let refused: Vec<_> = polls[before - 1..].iter().filter(|poll| poll.faulted).cloned().collect();
    assert!(gaps(&refused).iter().all(|gap| *gap >= 300) && refused.len() >= 5, "{refused:?}");
    world.standin.behave();
    world.assert_clean().await;
}

/// G5: asked again at once, and once only.
#[tokio::test(start_paused = true)]
async fn a_conflict_is_asked_again_at_once_but_only_once() {
    let mut world = World::new(1);
    world.standin.script(Matcher::on(Route::RequestJob).times(4), Fault::status(409));
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert_eq!(gaps(&world.requests(Route::RequestJob))[..4], [0, 3, 3, 3]);
    world.assert_clean().await;
}

/// G6: with id and token in what arrived, the job fails at once and says why.
#[tokio::test(start_paused = true)]
async fn a_payload_that_breaks_off_fails_its_job_at_once() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read"]);
    // GitLab sends both first.
    let payload = format!(r#"{{"id":5,"token":"glcbt-64_cut","job_info":{{"name":"{}"}}}}"#, "x".repeat(1000));
    world.standin.script(Matcher::on(Route::RequestJob), Fault::TruncateBody(400));
    let job = world.job_of(JobSpec::raw(JobId(5), Secret::new("glcbt-64_cut"), payload));
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "could not be read").await;
    let found = world.found(job);
    assert!(found.finished_at.unwrap().duration_since(found.started_at.unwrap()).as_secs() <= 10);
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 0);
}

/// G6: without them GitLab fails it, and the daemon goes on.
#[tokio::test(start_paused = true)]
async fn a_payload_without_sense_starts_no_machine() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read"]);
    world.standin.script(Matcher::on(Route::RequestJob), Fault::ReplaceBody(b"{\"id\": 1, ".as_slice().into()));
    let (job, next) = (world.job(&["print never"]), world.job(&["print hello"]));
    world.start().await.unwrap();
    world.until(next, JobState::Success).await;
    world.until(job, JobState::Failed).await;
    assert_eq!(world.found(job).failure_reason.as_deref(), Some("no_updates_running"));
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// R8: 202 while GitLab stores the log; the machine has gone by then.
#[tokio::test(start_paused = true)]
async fn a_verdict_that_gitlab_is_still_storing_is_asked_for_again() {
    for persist in [Persist::AfterReports(5), Persist::Never] {
        let mut world = World::new(1);
        world.standin.configure(|settings| {
            settings.live_trace = true;
            settings.live_trace_persist_after = persist;
        });
        let job = world.job(&["print hello"]);
        world.start().await.unwrap();
        world.until_word("releasing").await;
        world.until(job, JobState::Success).await;
        let accepted = world.requests(Route::UpdateJob).iter().filter(|r| r.status.is_some_and(|s| s == 202)).count();
        assert!((4..30).contains(&accepted), "{accepted}");
        world.assert_clean().await;
    }
}

/// R9: the whole trace again, then the verdict.
#[tokio::test(start_paused = true)]
async fn a_verdict_refused_for_its_trace_goes_after_the_trace_again() {
    let mut world = World::new(1);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1), Fault::status(412));
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let from_the_start = |r: &&Recorded| r.headers["content-range"].to_str().unwrap().starts_with("0-");
    assert_eq!(world.requests(Route::AppendTrace).iter().filter(from_the_start).count(), 2, "{}", world.histories());
    world.assert_clean().await;
}

/// R10, K15: the same again, and GitLab's "it is over" is as good as a 200.
#[tokio::test(start_paused = true)]
async fn a_verdict_whose_answer_is_lost_is_sent_again() {
    let mut world = World::new(1);
    world.expect_trouble(&["it will be sent again"]);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1), Fault::ApplyThenDrop);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.found(job).state, JobState::Success);
}

/// R1, R2: cut before and after GitLab has it.
#[tokio::test(start_paused = true)]
async fn a_trace_stays_exact_over_lost_pieces_and_lost_answers() {
    for fault in
        [Fault::DropBeforeApply, Fault::ApplyThenDrop, Fault::DropInBody(7), Fault::html(500), Fault::status(404)]
    {
        let mut world = World::new(1);
        world.expect_trouble(&["it will be sent again"]);
        for skip in [0, 1, 3] {
            world.standin.script(Matcher::on(Route::AppendTrace).after(skip).times(2), fault.clone());
        }
        let job = world.job(&["print one", "sleep 5", "print two", "sleep 5", "print three", "sleep 70", "print four"]);
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).ends_with("one\ntwo\nthree\nfour\nJob succeeded\n"), "{}", world.trace(job));
        world.assert_clean().await;
    }
}

/// R3, R5: GitLab forgets a part of the trace, or all of it.
#[tokio::test(start_paused = true)]
async fn a_trace_stays_exact_when_gitlab_loses_a_part_of_it() {
    for left in [0, 100] {
        let mut world = World::new(1);
        let job = world.job(&["print one", "sleep 100", "print two", "sleep 100", "print three"]);
        world.start().await.unwrap();
        world.until_trace(job, "one\n").await;
        world.standin.edit(|m| m.jobs.get_mut(&job).unwrap().trace.bytes.truncate(left));
        world.until_trace(job, "two\n").await;
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).ends_with("one\ntwo\nthree\nJob succeeded\n"), "{}", world.trace(job));
        world.assert_clean().await;
    }
}

/// R4: GitLab holds more than was ever sent; the job goes on.
#[tokio::test(start_paused = true)]
async fn a_trace_longer_than_ours_at_gitlab_does_not_stop_the_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["GitLab holds more of the trace"]);
    let job = world.job(&["print one", "sleep 100", "print two", "sleep 100", "print three"]);
    world.start().await.unwrap();
    world.until_trace(job, "one\n").await;
    world.standin.edit(|m| m.jobs.get_mut(&job).unwrap().trace.bytes.extend([b'?'; 10_000]));
    world.until(job, JobState::Success).await;
    // What somebody else has written cannot be held to what the guest printed.
    world.standin.erase(job);
    world.assert_clean().await;
}

/// Two GitLabs may both have a job 42.
#[tokio::test(start_paused = true)]
async fn jobs_of_one_number_of_two_gitlabs_are_two_jobs() {
    let mut world = World::new(1);
    let (second, project) = world.second_gitlab("other");
    let spec =
        |text: &str| JobSpec { id: Some(JobId(42)), ..JobSpec::script([format!("print {text}"), "sleep 20".into()]) };
    let job = world.job_of(spec("from the first"));
    assert_eq!(second.enqueue(project, spec("from the second")), job);
    world.start().await.unwrap();
    world.until_status(|status| status.jobs.len() == 2).await;
    world.until(job, JobState::Success).await;
    let ended = second.wait_for(|m| m.jobs[&job].state == JobState::Success, Duration::from_secs(600)).await;
    assert!(ended.is_ok(), "{}", world.histories());
    let other = String::from_utf8_lossy(&second.job(job).unwrap().trace.bytes).into_owned();
    assert!(world.trace(job).contains("from the first") && other.contains("from the second"));
    world.assert_clean().await;
}

/// G20: a server that still waits for our first word.
#[tokio::test(start_paused = true)]
async fn a_server_that_waits_for_our_first_word_gets_it_within_a_second() {
    let mut world = World::new(1);
    world.standin.configure(|settings| settings.two_phase = true);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let poll = world.requests(Route::RequestJob)[0].at;
    let word = world.requests(Route::UpdateJob)[0].at;
    assert!(word.duration_since(poll).as_millis() <= 1000);
    world.assert_clean().await;
}
