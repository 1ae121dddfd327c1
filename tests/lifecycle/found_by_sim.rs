//! Bugs that the simulation found, each told alone.

use crate::support::guest::Guest;
use crate::support::mortal::{End, Seam, When};
use crate::support::world::{World, paused};
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly::job::journal::JobKey;
use dayfly::network::Listen as _;
use dayfly::secret::Secret;
use dayfly_doubles::fake::{self, Op, Timing};
use dayfly_exec::standin::{Fault, JobSpec, JobState, Matcher, Persist, Route};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::sleep;

/// A job whose 201 breaks off behind its id and token.
fn cut_job(world: &World) -> JobId {
    let payload = format!(r#"{{"id":5,"token":"glcbt-64_cut","job_info":{{"name":"{}"}}}}"#, "x".repeat(1000));
    world.standin.script(Matcher::on(Route::RequestJob), Fault::TruncateBody(400));
    world.job_of(JobSpec::raw(JobId(5), Secret::new("glcbt-64_cut"), payload))
}

/// R8, G6: GitLab answers the verdict of a refused job with 202 until it has stored the trace.
#[tokio::test(start_paused = true)]
async fn a_refused_job_is_told_of_until_gitlab_has_taken_it() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read"]);
    world.standin.configure(|settings| settings.live_trace_persist_after = Persist::AfterReports(4));
    let job = cut_job(&world);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "could not be read").await;
    world.assert_clean().await;
}

/// R9, G6: or with 412.
#[tokio::test(start_paused = true)]
async fn a_refused_job_whose_trace_gitlab_wants_again_gets_it() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read"]);
    world.standin.script(Matcher::on(Route::UpdateJob), Fault::status(412));
    let job = cut_job(&world);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "could not be read").await;
    world.assert_clean().await;
}

/// R3, R10, G6: GitLab loses the end of a refused job's only line, and takes its verdict later.
#[tokio::test(start_paused = true)]
async fn a_refused_job_s_line_that_gitlab_lost_in_part_is_completed() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read", "it will be sent again"]);
    world.standin.script(Matcher::on(Route::UpdateJob), Fault::DropBeforeApply);
    let job = cut_job(&world);
    world.start().await.unwrap();
    world.until_trace(job, "could not be read").await;
    let whole = world.trace(job);
    world.standin.edit(|model| {
        let bytes = &mut model.jobs.get_mut(&job).unwrap().trace.bytes;
        bytes.truncate(bytes.len() - 20);
    });
    world.until_failed(job, "runner_system_failure", "could not be read").await;
    assert_eq!(world.trace(job), whole);
    world.assert_clean().await;
}

/// R4, G6: GitLab takes a refused job's only line, wholly or in part, and nobody hears of it.
#[tokio::test(start_paused = true)]
async fn a_refused_job_s_line_of_which_no_answer_came_is_not_said_twice() {
    for lost in [0, 40] {
        let mut world = World::new(1);
        world.expect_trouble(&["assigned a job that cannot be read", "it will be sent again"]);
        world.standin.script(Matcher::on(Route::AppendTrace), Fault::ApplyThenDrop);
        let job = cut_job(&world);
        world.start().await.unwrap();
        world.until_trace(job, "could not be read").await;
        let whole = world.trace(job);
        world.standin.edit(|model| {
            let bytes = &mut model.jobs.get_mut(&job).unwrap().trace.bytes;
            bytes.truncate(bytes.len() - lost);
        });
        world.until_failed(job, "runner_system_failure", "could not be read").await;
        assert_eq!(world.trace(job), whole);
        world.assert_clean().await;
    }
}

/// G3: a refusal waits as everything else does.
#[tokio::test(start_paused = true)]
async fn a_refusal_obeys_the_time_that_gitlab_names() {
    let mut world = World::new(1);
    world.expect_trouble(&["assigned a job that cannot be read", "it will be sent again"]);
    world.standin.script(Matcher::on(Route::AppendTrace), Fault::status_with(429, &[("Retry-After", "40")]));
    let job = cut_job(&world);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "could not be read").await;
    let pieces = world.requests(Route::AppendTrace);
    assert!(pieces[1].at.duration_since(pieces[0].at).as_secs() >= 40, "{pieces:?}");
    world.assert_clean().await;
}

/// R9: a GitLab that is never content is not flooded with the trace.
#[tokio::test(start_paused = true)]
async fn a_verdict_refused_again_and_again_is_sent_with_pauses() {
    let mut world = World::new(1);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1).times(6), Fault::status(412));
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    let verdicts: Vec<_> = world.requests(Route::UpdateJob).into_iter().skip(1).map(|r| r.at).collect();
    let pauses: Vec<_> = verdicts.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_millis()).collect();
    assert!(pauses[1..].iter().all(|pause| *pause >= 900), "{pauses:?}");
    assert!(pauses[5] > 10_000, "{pauses:?}");
    world.assert_clean().await;
}

/// E9: deadlines go on with the host's uptime over a restart, whatever somebody does to the clock meanwhile.
#[tokio::test(start_paused = true)]
async fn a_clock_set_ahead_before_a_restart_ends_no_job() {
    let mut world = World::new(1);
    let job = world.job(&["print hello", "sleep 60", "print done"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.clock.jump(true, Duration::from_secs(10 * 365 * 86_400));
    world.hand_over().await;
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
}

/// H8: a disk that is read-only when a job ends is written to when it can be.
#[tokio::test(start_paused = true)]
async fn what_is_kept_of_a_job_goes_once_the_disk_lets_it() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "remove a job's record",
        "not on disk",
        "write the job's record",
        "durable",
    ]);
    let job = world.job(&["print hello"]);
    world.standin.script(Matcher::on(Route::UpdateJob).after(1), Fault::Delay(Duration::from_secs(10)));
    world.start().await.unwrap();
    world.until_status(|status| status.jobs.iter().any(|job| job.state == "releasing" && job.vm.is_none())).await;
    world.files.fail_writes(Some(std::io::ErrorKind::ReadOnlyFilesystem));
    world.until(job, JobState::Success).await;
    sleep(Duration::from_secs(60)).await;
    world.files.fail_writes(None);
    world.assert_clean().await;
}

/// H8: a state that the disk did not take is written down once it does.
#[tokio::test(start_paused = true)]
async fn a_record_that_is_behind_catches_up() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "write the job's record", "not on disk"]);
    let job = world.job(&["print hello", "sleep 100"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.standin.script(Matcher::any().always(), Fault::html(502));
    world.expect_trouble(&["sent again", "no answer to a poll"]);
    world.files.fail_writes(Some(std::io::ErrorKind::ReadOnlyFilesystem));
    // The guest's verdict is not taken while it cannot be kept; an operator's word is.
    let _ = world.kill_job(job);
    world.expect_trouble(&["last lines", "ends without a verdict", "durable", "line of ours"]);
    sleep(Duration::from_secs(20)).await;
    world.files.fail_writes(None);
    sleep(Duration::from_secs(5)).await;
    let paths = world.files.paths_below("/state/jobs".as_ref());
    let record = paths.iter().find(|path| path.ends_with("record.json")).unwrap();
    let bytes = world.files.read(record, 1 << 20).await.unwrap();
    assert!(String::from_utf8_lossy(&bytes).contains("releasing"), "{}", String::from_utf8_lossy(&bytes));
    world.standin.behave();
    world.until(job, JobState::Failed).await;
    world.settle().await;
    world.assert_clean().await;
}

/// H8, V14: the next process makes the machine of a record that is behind anew, so its room is kept.
#[tokio::test(start_paused = true)]
async fn the_room_of_a_job_whose_end_is_not_on_disk_is_kept() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "write the job's record",
        "not on disk",
        "sent again",
        "no answer to a poll",
    ]);
    world.expect_trouble(&["last lines", "ends without a verdict", "durable", "line of ours"]);
    let job = world.job(&["print hello", "sleep 100"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.standin.script(Matcher::any().always(), Fault::html(502));
    world.files.fail_writes(Some(std::io::ErrorKind::ReadOnlyFilesystem));
    let _ = world.kill_job(job);
    world.until_status(|status| status.jobs.iter().all(|job| job.vm.is_none())).await;
    assert_eq!(world.hypervisor.doors(), [], "the door goes with its machine");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(world.status().capacity.jobs, 1, "{}", world.histories());
    world.files.fail_writes(None);
    world.until_status(|status| status.capacity.jobs == 0).await;
    world.standin.behave();
    world.until(job, JobState::Failed).await;
    world.settle().await;
    world.assert_clean().await;
}

/// A world whose job, under way, was ended by its operator just when the disk takes no record any more.
async fn ended_by_its_operator_on_a_full_disk() -> (World, JobId) {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "no job is asked for",
        "write the job's record",
        "not on disk",
        "last lines",
        "ends without a verdict",
    ]);
    let job = world.job(&["print hello", "sleep 100"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.files.fail_replaces(Some(std::io::ErrorKind::StorageFull));
    let _ = world.kill_job(job);
    (world, job)
}

/// H8, H6: GitLab is told no verdict, and a trace no last line, of which a daemon that is killed would leave no record.
#[tokio::test(start_paused = true)]
async fn an_end_that_is_not_on_disk_is_told_to_nobody() {
    let (mut world, job) = ended_by_its_operator_on_a_full_disk().await;
    world.until_status(|status| status.jobs.iter().all(|job| job.vm.is_none())).await;
    sleep(Duration::from_secs(20)).await;
    assert_eq!(world.found(job).state, JobState::Running, "{}", world.histories());
    world.kill();
    world.files.fail_replaces(None);
    world.start().await.unwrap();
    world.until(job, JobState::Failed).await;
    assert_eq!(world.found(job).verdicts, 1, "{}", world.histories());
    assert_eq!(world.trace(job).matches("for your operators").count(), 1, "{}", world.trace(job));
    world.settle().await;
    world.assert_clean().await;
}

/// H8: a disk that never takes the end of a job does not keep it from GitLab for ever.
#[tokio::test(start_paused = true)]
async fn an_end_that_the_disk_refuses_for_long_is_told_without_it() {
    let (mut world, job) = ended_by_its_operator_on_a_full_disk().await;
    world.until(job, JobState::Failed).await;
    world.files.fail_replaces(None);
    world.settle().await;
    world.assert_clean().await;
}

/// G17, G6: what cannot be read is a job that runs here already.
#[tokio::test(start_paused = true)]
async fn a_job_given_out_again_unreadably_goes_on() {
    let mut world = World::new(1);
    world.expect_trouble(&[
        "assigned a job that cannot be read",
        "under way here, unreadably",
        "it will be sent again",
    ]);
    let job = world.job(&["print hello", "sleep 100", "print done"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.standin.script(Matcher::on(Route::RequestJob), Fault::TruncateBody(1500));
    world.standin.edit(|model| {
        let again = model.jobs.get_mut(&job).unwrap();
        (again.state, again.queued) = (JobState::Pending, true);
        model.tick_queues(job);
    });
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).contains("done"), "{}", world.trace(job));
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// V1: a machine that comes up while it is being replaced is not given the job.
#[tokio::test(start_paused = true)]
async fn a_machine_on_its_way_out_is_not_given_the_job() {
    let mut world = World::new(1);
    world.expect_trouble(&["the machine could not be made"]);
    let timing = Timing { boot: Duration::from_secs(5), destroy: Duration::from_secs(20), ..Timing::default() };
    world.hypervisor.set_timing(timing);
    let job = world.job(&["print hello"]);
    world.start().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    world.hand_over().await;
    // Its VM cannot be looked at just now.
    world.hypervisor.fail_nth(Op::State, 1, fake::Fault::Refused("injected"));
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 2);
}

/// V1: while the hypervisor does not say whether a VM of the last daemon runs, its guest asks for the job.
#[tokio::test(start_paused = true)]
async fn a_machine_whose_guest_works_already_is_not_lost_with_an_answer_about_it() {
    let mut world = World::new(1);
    world.expect_trouble(&["make a VM that runs already"]);
    let job = world.job(&["print hello", "sleep 100", "print done"]);
    world.start().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    world.hand_over().await;
    world.hypervisor.fail_nth(Op::State, 1, fake::Fault::Hangs);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
    assert!(world.log.text().contains("make a VM that runs already"), "{}", world.histories());
}

/// H15, E3: a job that waits for a port names none in its record: its neighbour gets it, and both outlive a restart.
#[tokio::test(start_paused = true)]
async fn a_job_that_waits_for_a_port_takes_none_from_its_neighbour_after_a_restart() {
    let mut world = World::new(1);
    world.expect_trouble(&["the job waits for one", "the guest went silent"]);
    world.by_port();
    world.config.network.guest_ports = "20000-20000".parse().unwrap();
    let held = world.hypervisor.listen("127.0.0.1:20000".parse().unwrap()).await.unwrap();
    let jobs = [(); 2].map(|()| world.job(&["print begun", "sleep 60"]));
    world.start().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    drop(held);
    world.until_status(|status| status.jobs.iter().any(|job| job.state == "running")).await;
    world.kill();
    world.start().await.unwrap();
    for job in jobs {
        world.until(job, JobState::Success).await;
    }
    world.assert_clean().await;
}

/// H8, E4: a refusal that the disk does not take is told to nobody: the next daemon would run its job.
#[tokio::test(start_paused = true)]
async fn a_refusal_that_is_not_on_disk_is_told_to_nobody() {
    let mut world = World::new(1);
    world.expect_trouble(&["no job is asked for", "open the job's spool", "write the job's record", "not on disk"]);
    world.start().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let job = world.job(&["print hello"]);
    let key = JobKey { runner: world.config.runner[0].name.clone(), id: job };
    let directory = Path::new("/state/jobs").join(key.directory());
    for directory in [directory.clone(), directory.join("trace")] {
        world.files.create_dir(&directory).await.unwrap();
    }
    world.until_status(|status| !status.jobs.is_empty()).await;
    world.files.fail_replaces(Some(std::io::ErrorKind::StorageFull));
    sleep(Duration::from_secs(30)).await;
    assert_eq!(world.found(job).state, JobState::Running, "{}", world.histories());
    world.kill();
    world.files.fail_replaces(None);
    world.files.meddle(&directory.join("trace"), None);
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert_eq!(world.found(job).verdicts, 1, "{}", world.histories());
    world.settle().await;
    world.assert_clean().await;
}

/// E13, K17: what is left of a machine is found although its record is lost, wherever its removal was interrupted.
#[test]
fn a_damaged_record_leaves_nothing_of_a_machine_half_taken_down() {
    for call in 1..100 {
        let mut died = false;
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&[
                "a damaged record was set aside",
                "belongs to no job",
                "without a verdict of its guest",
                "never asked",
            ]);
            let job = world.job(&["print hello"]);
            world.live(Some(End { seam: Seam::Hypervisor, call, when: When::After })).await.unwrap();
            world.until_dead_or(job, &[JobState::Success]).await;
            if !world.is_dead() {
                world.settle().await;
            }
            died = world.is_dead();
            let records = world.files.paths_below(Path::new("/state/jobs"));
            for record in records.iter().filter(|path| path.ends_with("record.json")) {
                world.files.replace(record, Vec::new()).await.unwrap();
            }
            world.start().await.unwrap();
            world.until_over(job).await;
            world.files.remove(Path::new("/state/set-aside")).await.unwrap();
            world.assert_clean().await;
        });
        if !died {
            assert!(call > 10, "a life of {call} calls");
            return;
        }
    }
    panic!("a life of a hundred calls");
}

/// E1: a hand-over that comes while a door of before cannot be opened yet leaves it to the next process.
#[tokio::test(start_paused = true)]
async fn a_hand_over_fails_no_job_whose_door_is_not_open_yet() {
    let mut world = World::new(1);
    let job = world.job(&["print hello", "sleep 100", "print done"]);
    world.start().await.unwrap();
    world.until_trace(job, "hello").await;
    world.hand_over().await;
    world.hypervisor.fail_always(Op::Listen, fake::Fault::Refused("injected"));
    world.start().await.unwrap();
    sleep(Duration::from_millis(100)).await;
    world.hand_over().await;
    world.hypervisor.heal();
    world.start().await.unwrap();
    world.until(job, JobState::Success).await;
    assert!(world.trace(job).contains("done"), "{}", world.trace(job));
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1);
}

/// H6, E4: a daemon that is killed while it refuses a job leaves none that the next one would run.
#[tokio::test(start_paused = true)]
async fn a_job_that_was_being_refused_is_not_begun_by_the_next_daemon() {
    let mut world = World::new(1);
    world.expect_trouble(&["open the job's spool"]);
    // GitLab has heard that it failed, and is not through with it.
    world.standin.configure(|settings| settings.live_trace_persist_after = Persist::AfterReports(6));
    world.start().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    // It asks again later than now.
    let job = world.job(&["print hello"]);
    let key = JobKey { runner: world.config.runner[0].name.clone(), id: job };
    let directory = Path::new("/state/jobs").join(key.directory());
    for directory in [directory.clone(), directory.join("trace")] {
        world.files.create_dir(&directory).await.unwrap();
    }
    world.until_trace(job, "could not write the job down").await;
    let said = world.trace(job);
    world.kill();
    world.files.meddle(&directory.join("trace"), None);
    world.start().await.unwrap();
    world.until_failed(job, "runner_system_failure", "could not write the job down").await;
    assert_eq!(world.trace(job), said);
    assert_eq!(world.machines_started(), 0);
    world.assert_clean().await;
}

/// K6, V1: a machine that replaces another never gets that one's config, wherever in between the daemon was killed.
#[test]
fn each_machine_has_a_config_of_its_own_whatever_write_the_daemon_was_killed_at() {
    for call in 1..500 {
        let mut died = false;
        paused(async {
            let mut world = World::new(1);
            world.expect_trouble(&["the machine could not be made"]);
            world.hypervisor.fail_nth(Op::Start, 1, fake::Fault::Refused("injected"));
            let seen = Arc::new(Mutex::new(Vec::new()));
            let see = seen.clone();
            world.set_guest(move |mut guest: Guest| {
                see.lock().unwrap().push((guest.machine.spec.id.to_string(), guest.config.vm.clone()));
                async move {
                    if let Some(payload) = guest.ask().await {
                        guest.work(&payload).await;
                    }
                    guest.power_off().await;
                }
            });
            let job = world.job(&["print hello"]);
            world.live(Some(End { seam: Seam::Files, call, when: When::After })).await.unwrap();
            world.until_dead_or(job, &[JobState::Success]).await;
            if !world.is_dead() {
                world.settle().await;
            }
            died = world.is_dead();
            if died {
                world.start().await.unwrap();
            }
            world.until_over(job).await;
            for (machine, told) in seen.lock().unwrap().iter() {
                assert_eq!(machine, told, "killed after call {call}");
            }
            world.assert_clean().await;
        });
        if !died {
            assert!(call > 10, "a life of {call} calls");
            return;
        }
    }
    panic!("a life of five hundred calls");
}
