//! SIGKILL at each named point of a job's life, K0 to K18, and again and again.
//!
//! What a life without trouble calls, and in which order, is learnt first; the same seed calls the
//! same again, so that a point is the n-th call of a seam, and the end comes before or after it.

use crate::support::guest::Guest;
use crate::support::mortal::{End, Life, Seam, When};
use crate::support::world::{World, paused};
use dayfly::gitlab::JobId;
use dayfly_doubles::fake::Op;
use dayfly_exec::standin::{Fault, JobState, Matcher, Route};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::sleep;

const SCRIPT: &[&str] = &["print one", "sleep 4", "print two", "upload 1000", "sleep 4", "print three"];

/// The calls of a whole life, by seam, in order.
#[derive(Default)]
struct Calls {
    files: Vec<String>,
    hypervisor: Vec<Op>,
    gitlab: Vec<(Route, Vec<u8>)>,
}

/// What a life of this one job calls.
fn life() -> Calls {
    life_in(|| World::new(1))
}

/// A world whose guests have their doors at ports.
fn by_port() -> World {
    let mut world = World::new(1);
    world.by_port();
    world
}

fn life_in(world: fn() -> World) -> Calls {
    let mut calls = Calls::default();
    paused(async {
        let mut world = world();
        let job = world.job(SCRIPT);
        world.start().await.unwrap();
        world.until(job, JobState::Success).await;
        world.until_idle().await;
        calls.files = world.files.history();
        calls.hypervisor = world.hypervisor.history().iter().filter_map(|entry| entry.op).collect();
        let requests = world.standin.requests().into_iter();
        calls.gitlab = requests.map(|r| (r.route, r.body.map(|b| b.to_vec()).unwrap_or_default())).collect();
        world.assert_clean().await;
    });
    calls
}

impl Calls {
    /// Numbers of the file layer's calls that begin and end so.
    fn files(&self, begins: &str, ends: &str) -> Vec<(Seam, u64)> {
        let met = |line: &String| line.starts_with(begins) && line.trim_end_matches(" ok").ends_with(ends);
        numbers(Seam::Files, &self.files, met, 1)
    }

    /// Those of the hypervisor's and beside it. The first two, which make directories, are in no history.
    fn hypervisor(&self, op: Op) -> Vec<(Seam, u64)> {
        numbers(Seam::Hypervisor, &self.hypervisor, |called| *called == op, 3)
    }

    fn gitlab(&self, route: Route) -> Vec<(Seam, u64)> {
        numbers(Seam::GitLab, &self.gitlab, |(called, _)| *called == route, 1)
    }

    /// The verdict.
    fn verdict(&self) -> Vec<(Seam, u64)> {
        let is_final = |(route, body): &(Route, Vec<u8>)| {
            *route == Route::UpdateJob && String::from_utf8_lossy(body).contains("\"success\"")
        };
        numbers(Seam::GitLab, &self.gitlab, is_final, 1)
    }
}

fn numbers<T>(seam: Seam, all: &[T], met: impl Fn(&T) -> bool, first: u64) -> Vec<(Seam, u64)> {
    let all = (first..).zip(all).filter(|(_, call)| met(call));
    all.map(|(number, _)| (seam, number)).collect()
}

/// Kills a daemon at this point, starts the next, and holds the job to its green end: one machine, one run, its trace
/// whole, nothing left. A job that was not written down yet is GitLab's to give up.
async fn killed(mut world: World, end: End, may_be_lost: bool) {
    world.expect_trouble(&["belongs to no job"]);
    let job = world.job(SCRIPT);
    world.live(Some(end)).await.unwrap();
    world.until_dead_or(job, &[JobState::Success, JobState::Failed]).await;
    world.settle().await;
    assert!(world.is_dead(), "the end came at {end:?}");
    world.start().await.unwrap();
    judge(&mut world, job, may_be_lost, &format!("{end:?}")).await;
}

async fn judge(world: &mut World, job: JobId, may_be_lost: bool, what: &str) {
    world.until_over(job).await;
    let found = world.found(job);
    if may_be_lost && found.failure_reason.as_deref() == Some("no_updates_running") {
        assert_eq!(world.machines_started(), 0, "{what}: nothing was begun\n{}", world.histories());
        let next = world.job(SCRIPT);
        world.until(next, JobState::Success).await;
    } else {
        assert_eq!(found.state, JobState::Success, "{what}: {:?}\n{}", found.failure_reason, world.histories());
        assert!(world.trace(job).ends_with("three\nJob succeeded\n"), "{what}: {}", world.trace(job));
    }
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 1, "{what}: never two\n{}", world.histories());
}

/// At each of these calls, before and after its effect.
fn killed_at(points: &[(Seam, u64)], whens: &[When], may_be_lost: bool) {
    killed_in(|| World::new(1), points, whens, may_be_lost);
}

fn killed_in(world: fn() -> World, points: &[(Seam, u64)], whens: &[When], may_be_lost: bool) {
    assert!(!points.is_empty(), "a life has this point");
    for (seam, call) in points {
        for when in whens {
            paused(async { killed(world(), End { seam: *seam, call: *call, when: *when }, may_be_lost).await });
        }
    }
}

const BOTH: &[When] = &[When::Before, When::After];

/// Kills by hand, at a moment of the story.
async fn killed_when(world: &mut World, job: JobId, may_be_lost: bool, what: &str) {
    world.kill();
    // What was under way at GitLab comes to its end there.
    sleep(Duration::from_secs(2)).await;
    world.standin.behave();
    world.start().await.unwrap();
    judge(world, job, may_be_lost, what).await;
}

/// K0: nothing is under way.
#[tokio::test(start_paused = true)]
async fn a_daemon_killed_when_idle_leaves_nothing() {
    let mut world = World::new(1);
    world.start().await.unwrap();
    sleep(Duration::from_secs(10)).await;
    world.kill();
    assert!(world.hypervisor.counts().is_clean());
    world.start().await.unwrap();
    let job = world.job(SCRIPT);
    judge(&mut world, job, false, "K0").await;
}

/// K1: a poll is under way; whether GitLab has answered it or not.
#[test]
fn a_daemon_killed_with_a_poll_under_way_leaves_nothing() {
    killed_at(&life().gitlab(Route::RequestJob)[..1], BOTH, true);
}

/// K2: the answer is read in part.
#[tokio::test(start_paused = true)]
async fn a_daemon_killed_in_the_middle_of_an_answer_leaves_nothing() {
    let mut world = World::new(1);
    let slowly = Fault::DribbleBody { piece: 200, every: Duration::from_millis(500) };
    world.standin.script(Matcher::on(Route::RequestJob), slowly);
    let job = world.job(SCRIPT);
    world.start().await.unwrap();
    sleep(Duration::from_secs(2)).await;
    assert_eq!(world.found(job).state, JobState::Running, "GitLab counts on us");
    killed_when(&mut world, job, true, "K2").await;
    assert_eq!(world.found(job).failure_reason.as_deref(), Some("no_updates_running"));
}

/// K3: the payload is read, and not written down.
#[test]
fn a_daemon_killed_between_answer_and_record_leaves_nothing() {
    let calls = life();
    killed_at(&calls.files("replace ", "/payload"), BOTH, true);
    killed_at(&calls.files("replace ", "/record.json")[..1], &[When::Before], true);
}

/// K4: there is the record, and nothing else.
#[test]
fn a_daemon_killed_after_the_first_record_has_its_job_booted_by_the_next() {
    killed_at(&life().files("replace ", "/record.json")[..1], &[When::After], false);
}

/// K5: around the overlay.
#[test]
fn a_daemon_killed_around_the_overlay_has_its_job_booted_by_the_next() {
    killed_at(&life().hypervisor(Op::CreateOverlay), BOTH, false);
}

/// K6: around the guest's config.
#[test]
fn a_daemon_killed_around_the_guest_config_has_its_job_booted_by_the_next() {
    killed_at(&life().files("replace ", "/guest"), BOTH, false);
}

/// K7: around the door, which is at a port, or behind a wire that is looked for until it is there.
#[test]
fn a_daemon_killed_around_the_door_has_its_job_booted_by_the_next() {
    killed_in(by_port, &life_in(by_port).hypervisor(Op::Listen), BOTH, false);
    killed_at(&life().hypervisor(Op::OpenDoor), BOTH, false);
}

/// E4, U5: the doors of guests of the contract before are taken up again at their ports.
#[test]
fn a_daemon_killed_at_any_call_for_a_guest_of_the_contract_before_loses_nothing() {
    let calls = life_in(by_port);
    for op in [Op::CreateOverlay, Op::Start, Op::OpenChannel, Op::RemoveOverlay] {
        killed_in(by_port, &calls.hypervisor(op), BOTH, false);
    }
    killed_in(by_port, &calls.gitlab(Route::AppendTrace), BOTH, false);
    killed_in(by_port, &calls.verdict(), BOTH, false);
}

/// K8: the machine is being created; it is adopted or created, never two.
#[test]
fn a_daemon_killed_while_it_creates_the_machine_has_one_in_the_end() {
    killed_at(&life().hypervisor(Op::Start), BOTH, false);
}

/// K9: the machine boots; until its guest has greeted, the config is written again.
#[test]
fn a_daemon_killed_while_the_guest_boots_is_found_again_by_it() {
    for millis in [400, 2000, 5000, 5400] {
        paused(async {
            let mut world = World::new(1);
            let job = world.job(SCRIPT);
            world.start().await.unwrap();
            sleep(Duration::from_millis(millis)).await;
            assert_eq!(world.hypervisor.vms().len(), 1);
            killed_when(&mut world, job, false, &format!("K9 after {millis} ms")).await;
        });
    }
    killed_at(&life().hypervisor(Op::OpenChannel), BOTH, false);
}

/// K10: the guest has its job, whatever the record says of it: it runs once.
#[test]
fn a_daemon_killed_around_the_hand_out_has_its_job_run_once() {
    // The records of the hand-out, and all others: before and after each.
    killed_at(&life().files("replace ", "/record.json")[1..], BOTH, false);
    // And with the payload in the guest's hand, before it has said a word of it.
    paused(async {
        let mut world = World::new(1);
        let daemon: Arc<Mutex<Option<Life>>> = Arc::default();
        let kills = daemon.clone();
        world.set_guest(move |mut guest: Guest| {
            let kills = kills.clone();
            async move {
                let payload = guest.ask().await.unwrap();
                if let Some(life) = kills.lock().unwrap().take() {
                    life.kill();
                }
                guest.work(&payload).await;
                guest.power_off().await;
            }
        });
        let job = world.job(SCRIPT);
        world.start().await.unwrap();
        *daemon.lock().unwrap() = Some(world.life());
        world.life().over().await;
        world.start().await.unwrap();
        judge(&mut world, job, false, "K10 in the guest's hand").await;
    });
}

/// K11: our first word to GitLab is under way.
#[test]
fn a_daemon_killed_around_its_first_word_starts_one_machine() {
    killed_at(&life().gitlab(Route::UpdateJob)[..1], BOTH, false);
}

/// K12: a piece of the trace is under way, from the guest to the spool, and from the spool to GitLab.
#[test]
fn a_daemon_killed_in_the_middle_of_the_trace_keeps_it_exact() {
    let calls = life();
    killed_at(&calls.gitlab(Route::AppendTrace), BOTH, false);
    killed_at(&calls.files("write_at ", "/trace"), BOTH, false);
}

/// K13: an artifact is uploading; the guest's next try waits for the door, and the job is green.
#[test]
fn a_daemon_killed_while_an_artifact_uploads_costs_no_job() {
    killed_at(&life().gitlab(Route::UploadArtifacts), BOTH, false);
    paused(async {
        let mut world = World::new(1);
        world.standin.script(Matcher::on(Route::UploadArtifacts), Fault::Delay(Duration::from_secs(20)));
        let job = world.job(SCRIPT);
        world.start().await.unwrap();
        world.until_trace(job, "two").await;
        sleep(Duration::from_secs(2)).await;
        killed_when(&mut world, job, false, "K13").await;
        assert_eq!(world.found(job).artifacts.len(), 1);
    });
}

/// K14: the verdict is under way, from the guest to the outbox, and from there to GitLab.
#[test]
fn a_daemon_killed_around_the_verdict_says_the_same_again() {
    let calls = life();
    killed_at(&calls.files("sync ", "/trace"), BOTH, false);
    killed_at(&calls.verdict(), &[When::Before], false);
}

/// K15: GitLab has the verdict, and nobody here knows it.
#[test]
fn a_daemon_killed_when_gitlab_has_the_verdict_asks_and_cleans() {
    killed_at(&life().verdict(), &[When::After], false);
}

/// K16: the machine is gone, and its overlay is there.
#[test]
fn a_daemon_killed_before_the_overlay_is_removed_has_it_removed_by_the_next() {
    killed_at(&life().hypervisor(Op::RemoveOverlay), &[When::Before], false);
}

/// K17: the overlay is gone, and the record is there.
#[test]
fn a_daemon_killed_after_the_overlay_is_removed_has_the_record_removed_by_the_next() {
    let calls = life();
    killed_at(&calls.hypervisor(Op::RemoveOverlay), &[When::After], false);
    killed_at(&calls.hypervisor(Op::RemoveSockets)[1..], BOTH, false);
}

/// K18: all of the job is gone.
#[test]
fn a_daemon_killed_after_the_record_is_removed_leaves_nothing() {
    let calls = life();
    let removes = calls.files("remove /state/jobs/", "");
    killed_at(&removes[removes.len() - 1..], BOTH, false);
}

/// E15: twenty kills within a minute, wherever each comes.
/// E8: whoever sends them: the kernel, for want of memory, gives no more warning than this.
#[tokio::test(start_paused = true)]
async fn twenty_kills_in_a_minute_cost_no_job() {
    let mut world = World::new(1);
    // A killed daemon's calls hang here.
    world.expect_trouble(&["read the trace's spool error=\"timed out\""]);
    let jobs = [world.job(&["print one", "sleep 45", "print two", "upload 1000", "sleep 30", "print three"]); 1];
    let others: Vec<JobId> = (0..2).map(|_| world.job(&["print one", "sleep 20", "print three"])).collect();
    world.start().await.unwrap();
    for n in 0..20_u64 {
        // Every few seconds, and never twice at the same place of a start.
        sleep(Duration::from_millis(1800 + 137 * n)).await;
        world.kill();
        sleep(Duration::from_millis(200)).await;
        world.start().await.unwrap();
    }
    for job in jobs.into_iter().chain(others) {
        world.until(job, JobState::Success).await;
        assert!(world.trace(job).ends_with("three\nJob succeeded\n"), "{}", world.trace(job));
    }
    world.assert_clean().await;
    assert_eq!(world.machines_started(), 3);
}
