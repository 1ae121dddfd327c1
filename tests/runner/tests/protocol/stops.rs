//! Who may end a job or the runner, and what is reported then.

use crate::support::{Request, Stored, World, after_script, job, polite, reply, world_with_file};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_403_aborts_the_job_without_after_script() {
    let rule = |request: &Request, _: usize, _: &mut Stored| {
        let dead = matches!(request.class, "patch") || (request.class == "put" && request.json()["state"] == "failed");
        dead.then(|| reply(403).with("Job-Status", "canceled"))
    };
    let mut world =
        World::new(&[job(&["echo started", "sleep 100"], &after_script(&["echo in-after-script"]))], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.classes(), ["poll", "put", "patch", "patch", "put"], "{}", world.history());
    let patches = world.requests("patch");
    assert!(patches[1].header("Content-Range").starts_with("0-"), "the refused bytes come again, once");
    let log = String::from_utf8(patches[1].body.clone()).expect("UTF-8");
    assert!(log.ends_with("ERROR: Job failed: canceled\x1b[0;m\n") && !log.contains("in-after-script"), "{log}");
    let last = world.requests("put").pop().expect("a PUT").json();
    assert_eq!((&last["state"], &last["failure_reason"]), (&json!("failed"), &json!("unknown_failure")));
}

#[test]
fn canceling_ends_the_script_and_runs_after_script() {
    let rule = |request: &Request, _: usize, stored: &mut Stored| {
        (request.class == "patch").then(|| {
            stored.trace.extend_from_slice(&request.body);
            reply(202).with("Job-Status", "canceling")
        })
    };
    let mut world = World::new(
        &[job(&["echo started", "sleep 100", "echo never-reached"], &after_script(&["echo status $CI_JOB_STATUS"]))],
        Box::new(rule),
    );
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let verdict = world.verdict();
    assert_eq!(
        (&verdict["state"], &verdict["failure_reason"], verdict.get("exit_code")),
        (&json!("failed"), &json!("unknown_failure"), None)
    );
    let trace = world.trace();
    assert!(trace.contains("01O status canceled\n"), "{trace}");
    assert!(trace.contains("WARNING: script canceled externally (UI, API)"), "{trace}");
    assert!(!trace.contains("01O never-reached"), "{trace}");
    assert!(trace.ends_with("ERROR: Job failed: canceled\x1b[0;m\n"), "{trace}");
}

#[test]
fn a_job_taken_back_by_the_first_answer_is_not_run() {
    let rule = |request: &Request, _: usize, _: &mut Stored| (request.class == "put").then(|| reply(403));
    let mut world = World::new(&[job(&["echo never"], &json!({}))], Box::new(rule));
    world.start("", 1);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.classes()[..3], ["poll", "put", "poll"], "polls again at once\n{}", world.history());
    assert!(world.requests("patch").is_empty() && world.requests("put").len() == 1, "{}", world.history());
    let polls = world.requests("poll");
    assert!(polls[1].at - polls[0].at < 2.0, "{}", world.history());
}

#[test]
fn a_job_canceled_before_it_began_is_reported_as_canceled() {
    let rule = |request: &Request, _: usize, _: &mut Stored| {
        (request.class == "put").then(|| reply(200).with("Job-Status", "canceling"))
    };
    let mut world = World::new(&[job(&["echo never"], &json!({}))], Box::new(rule));
    world.start("", 1);
    assert_eq!(world.wait(), 0);
    let last = world.requests("put").pop().expect("a PUT").json();
    assert_eq!((&last["state"], &last["failure_reason"]), (&json!("failed"), &json!("job_canceled")));
    assert_eq!(last["output"], json!({"checksum": "crc32:00000000"}), "an empty log has no size");
    assert!(world.requests("patch").is_empty(), "{}", world.history());
}

#[test]
fn the_jobs_timeout_ends_it() {
    let members = json!({"runner_info": {"timeout": 2}});
    let mut world = World::new(&[job(&["echo started; sleep 100"], &members)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let verdict = world.verdict();
    assert_eq!((&verdict["state"], &verdict["failure_reason"]), (&json!("failed"), &json!("job_execution_timeout")));
    let trace = world.trace();
    assert!(
        trace.contains("WARNING: step_script could not run to completion because the timeout was exceeded."),
        "{trace}"
    );
    assert!(trace.ends_with("ERROR: Job failed: execution took longer than 2s seconds\x1b[0;m\n"), "{trace}");
}

#[test]
fn the_scripts_own_timeout_leaves_after_script_its_time() {
    let mut members = after_script(&["echo status $CI_JOB_STATUS"]);
    members["variables"] = json!([{"key": "RUNNER_SCRIPT_TIMEOUT", "value": "1s"}]);
    let mut world = World::new(&[job(&["sleep 100"], &members)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["failure_reason"], "job_execution_timeout");
    let trace = world.trace();
    assert!(trace.contains("01O status timedout\n"), "{trace}");
    assert!(trace.ends_with("ERROR: Job failed: script timeout: context deadline exceeded\x1b[0;m\n"), "{trace}");
}

#[test]
fn sigterm_aborts_the_job_and_reports_it() {
    let mut world =
        World::new(&[job(&["echo started; sleep 100"], &after_script(&["echo in-after-script"]))], polite());
    world.start("", 0);
    world.wait_for("patch", 1);
    world.signal(Signal::TERM);
    assert_eq!(world.wait(), 0);
    let verdict = world.verdict();
    assert_eq!((&verdict["state"], &verdict["failure_reason"]), (&json!("failed"), &json!("runner_interrupted")));
    let trace = world.trace();
    assert!(trace.ends_with("ERROR: Job failed: aborted: terminated\x1b[0;m\n"), "{trace}");
    assert!(!trace.contains("01O in-after-script"), "{trace}");
}

#[test]
fn a_second_sigterm_ends_the_runner_without_a_report() {
    let script = "bash -c 'trap \"\" TERM; echo deaf; while [ -d $CI_PROJECT_DIR ]; do sleep 0.1; done'";
    let mut world = World::new(&[job(&[script], &json!({}))], polite());
    world.start("", 0);
    world.wait_for("patch", 1);
    world.signal(Signal::TERM);
    // The first is noted once the log of the runner says so.
    let noted = || std::fs::read_to_string(world.path("runner.log")).unwrap_or_default().contains("terminated");
    let began = std::time::Instant::now();
    while !noted() {
        assert!(began.elapsed().as_secs() < 20, "{}", world.history());
        std::thread::park_timeout(std::time::Duration::from_millis(10));
    }
    world.signal(Signal::TERM);
    assert_eq!(world.wait(), 1);
    assert_eq!(world.requests("put").len(), 1, "only the early one\n{}", world.history());
}

#[test]
fn sigquit_lets_the_job_finish_and_asks_for_no_other() {
    let (mut world, directory) =
        world_with_file(|until| job(&["echo started", until, "echo finished"], &json!({})), |_, _, _, _| None);
    world.start("", 0);
    world.wait_for("patch", 1);
    world.signal(Signal::QUIT);
    std::fs::write(directory.path().join("go-on"), "").expect("written");
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success");
    assert_eq!(world.requests("poll").len(), 1);
}

#[test]
fn sigterm_between_two_polls_ends_the_runner_at_once() {
    let mut world = World::new(&[], polite());
    world.start("", 0);
    world.wait_for("poll", 2);
    let began = std::time::Instant::now();
    world.signal(Signal::TERM);
    assert_eq!(world.wait(), 0);
    assert!(began.elapsed().as_secs_f64() < 2.0, "without the pause's rest");
    let polls = world.requests("poll");
    assert_eq!(polls.len(), 2);
    assert_eq!(polls[1].json()["last_update"], "v1", "what the 204 said is echoed");
    assert!((2.5..5.0).contains(&(polls[1].at - polls[0].at)), "{}", world.history());
}
