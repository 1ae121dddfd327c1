//! What is polled, logged and reported, and how often it is tried again.

use crate::support::{
    JOB_TOKEN, Request, Stored, World, after_script, is_stand_in, job, polite, reply, world_with_file,
};
use serde_json::json;

#[test]
fn a_job_is_polled_announced_run_and_reported_in_two_patches() {
    let (mut world, _file) = world_with_file(
        |until| job(&["echo first", until, "echo second"], &json!({})),
        |request, count, _, file| {
            if (request.class, count) == ("patch", 1) {
                std::fs::write(file, "").expect("written");
            }
            None
        },
    );
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.classes(), ["poll", "put", "patch", "patch", "put"], "{}", world.history());

    let poll = &world.requests("poll")[0];
    assert_eq!(poll.target, "/api/v4/jobs/request");
    assert_eq!(poll.header("Runner-Token"), "glrt-t1_FAKErunner0123456789");
    assert_eq!((poll.header("Accept"), poll.header("Content-Type")), ("application/json", "application/json"));
    let body = poll.json();
    assert_eq!(body["token"], "glrt-t1_FAKErunner0123456789");
    assert_eq!(body["info"]["features"].as_object().expect("features").len(), 31);
    assert!(body["system_id"].as_str().expect("an id").starts_with("s_"), "{body}");

    let early = &world.requests("put")[0];
    assert_eq!((early.target.as_str(), early.header("Job-Token")), ("/api/v4/jobs/4242", JOB_TOKEN));
    let body = early.json();
    assert_eq!((&body["state"], &body["output"], &body["token"]), (&json!("running"), &json!({}), &json!(JOB_TOKEN)));

    let patches = world.requests("patch");
    assert_eq!(patches[0].target, "/api/v4/jobs/4242/trace?debug_trace=false");
    assert_eq!((patches[0].header("Content-Type"), patches[0].header("Job-Token")), ("text/plain", JOB_TOKEN));
    assert_eq!(patches[0].header("Content-Range"), format!("0-{}", patches[0].body.len() - 1));
    assert!(patches[0].at - early.at > 2.5, "the first tick comes after three seconds\n{}", world.history());

    let ids: std::collections::BTreeSet<String> = ["poll", "put", "patch"]
        .iter()
        .flat_map(|class| world.requests(class))
        .map(|r| r.header("X-Request-Id").to_owned())
        .collect();
    assert_eq!(ids.len(), 5, "each call has an id of its own");
    assert!(ids.iter().all(|id| id.len() == 32), "{ids:?}");

    let verdict = world.verdict();
    assert_eq!(
        (&verdict["state"], verdict.get("failure_reason"), verdict.get("exit_code")),
        (&json!("success"), None, None)
    );
    assert_eq!(verdict["checksum"], verdict["output"]["checksum"]);
}

#[test]
fn the_log_looks_as_the_official_runners() {
    let script = ["echo one", "printf 'two\\nthree'", "echo to-stderr >&2"];
    let mut world = World::new(&[job(&script, &after_script(&["echo status $CI_JOB_STATUS"]))], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    world.verdict();
    let trace = world.trace();
    let lines: Vec<&str> = trace.lines().collect();
    for line in &lines {
        let (time, rest) = line.split_at(27);
        assert!(time.ends_with('Z') && time.as_bytes()[19] == b'.', "{line}");
        assert!([" 00O ", " 00O+", " 01O ", " 01E "].contains(&&rest[..5]), "{line}");
    }
    let texts: Vec<&str> = lines.iter().map(|line| &line[28..]).collect();
    assert!(texts[0].starts_with("00O \x1b[0KRunning with gitlab-runner 19.3.0"), "{trace}");
    assert_eq!(texts[0].contains("standin"), is_stand_in(), "a stand-in says so");
    assert!(texts[1].starts_with("00O \x1b[0K  on vmrunner FAKErunne, system ID: s_"), "{trace}");
    for expected in [
        "00O+\x1b[0K\x1b[36;1mPreparing the \"shell\" executor\x1b[0;m\x1b[0;m",
        "00O+\x1b[0K\x1b[36;1mGetting source from Git repository\x1b[0;m\x1b[0;m",
        "01O \x1b[32;1mSkipping Git repository setup\x1b[0;m",
        "00O+\x1b[0K\x1b[36;1mExecuting \"step_script\" stage of the job script\x1b[0;m\x1b[0;m",
        "01O \x1b[32;1m$ echo one\x1b[0;m",
        "01O one",
        "01O two",
        "01E to-stderr",
        "00O+\x1b[0K\x1b[36;1mRunning after_script\x1b[0;m\x1b[0;m",
        "01O status success",
        "00O+\x1b[0K\x1b[36;1mCleaning up project directory and file based variables\x1b[0;m\x1b[0;m",
    ] {
        assert!(texts.contains(&expected), "{expected:?} in\n{trace:?}");
    }
    let sections = |kind: &str| texts.iter().filter(|text| text[4..].starts_with(kind)).count();
    assert_eq!(sections("section_start:"), sections("section_end:"));
    assert_eq!(sections("section_start:"), 6, "{trace}");
    assert_eq!(texts.last(), Some(&"00O \x1b[32;1mJob succeeded\x1b[0;m"));
}

#[test]
fn without_timestamps_the_log_is_as_the_job_wrote_it() {
    let mut world = World::new(&[job(&["printf 'a\\rb\\n'"], &json!({}))], polite());
    world.start("[runners.feature_flags]\nFF_TIMESTAMPS = false", 0);
    assert_eq!(world.wait(), 0);
    world.verdict();
    let trace = world.trace();
    assert!(trace.starts_with("\x1b[0KRunning with gitlab-runner 19.3.0"), "{trace}");
    assert!(trace.contains("\n\x1b[0K  feature flags: FF_TIMESTAMPS:false\x1b[0;m\n"), "{trace}");
    assert!(trace.contains("\na\rb\n"), "{trace}");
}

#[test]
fn the_exit_code_is_reported_and_after_script_still_runs() {
    let steps = after_script(&["echo status $CI_JOB_STATUS"]);
    let mut world = World::new(&[job(&["exit 3", "echo never-reached"], &steps)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0, "the job's result is not the runner's");
    let verdict = world.verdict();
    assert_eq!(
        (&verdict["state"], &verdict["failure_reason"], &verdict["exit_code"]),
        (&json!("failed"), &json!("script_failure"), &json!(3))
    );
    let trace = world.trace();
    assert!(trace.contains("01O status failed\n"), "{trace}");
    assert!(!trace.contains("01O never-reached"), "{trace}");
    assert!(trace.ends_with("00O \x1b[31;1mERROR: Job failed: exit status 3\x1b[0;m\n"), "{trace}");
}

#[test]
fn variables_arrive_expanded_filed_and_masked() {
    let variables = json!({"variables": [
        {"key": "SECRET", "value": "s3cr3tvalue", "masked": true},
        {"key": "RAWV", "value": "$CI_JOB_ID", "raw": true},
        {"key": "EXPV", "value": "x-$CI_JOB_ID"},
        {"key": "QUOTED", "value": "it's \"a\" `b` $$(c)\nline two"},
        {"key": "FILEVAR", "value": "file content\n", "file": true},
    ]});
    let script = [
        "echo secret=$SECRET raw=$RAWV exp=$EXPV",
        "echo \"$QUOTED\"",
        "cat \"$FILEVAR\"; ls -l \"$FILEVAR\" | cut -c1-10",
        "printf 's3cr3t'; printf 'value\\n'; echo glpat-ABCDEFGHIJKLMNOPQRST",
        "echo dir=$CI_PROJECT_DIR pwd=$PWD server=$CI_SERVER timeout=$CI_JOB_TIMEOUT",
        "echo LATER=yes >> $GITLAB_ENV",
    ];
    let mut members = variables;
    members["steps"] = after_script(&["echo later=$LATER"])["steps"].clone();
    let mut world = World::new(&[job(&script, &members)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success", "{}", world.trace());
    let trace = world.trace();
    let project = world.path("builds").join("FAKErunne/0/grp/proj");
    let project = project.display();
    for expected in [
        "secret=[MASKED] raw=$CI_JOB_ID exp=x-4242",
        "it's \"a\" `b` $(c)",
        "line two",
        "file content",
        "[MASKED]",
        "glpat-[MASKED]",
        &format!("dir={project} pwd={project} server=yes timeout=3600"),
        "later=yes",
    ] {
        assert!(trace.lines().any(|line| line.get(32..) == Some(expected)), "{expected:?} in\n{trace}");
    }
    assert!(!trace.contains("s3cr3tvalue"), "{trace}");
    assert!(!world.path("builds/FAKErunne/0/grp/proj.tmp/FILEVAR").exists(), "file variables are removed");
}

#[test]
fn a_416_rewinds_the_log_to_where_gitlab_is() {
    let (mut world, _file) = world_with_file(
        |until| job(&["echo first", until, "echo second"], &json!({})),
        |request, count, stored, file| {
            if (request.class, count) != ("patch", 1) {
                return None;
            }
            // All is taken, then all but ten bytes is lost.
            stored.trace = request.body[..10].to_vec();
            std::fs::write(file, "").expect("written");
            Some(reply(202).with("Range", format!("0-{}", request.body.len())))
        },
    );
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let starts: Vec<String> = world
        .requests("patch")
        .iter()
        .map(|patch| patch.header("Content-Range").split('-').next().unwrap_or("").to_owned())
        .collect();
    let first = world.requests("patch")[0].body.len().to_string();
    assert_eq!(starts, ["0", &first, "10"], "{}", world.history());
    assert_eq!(world.verdict()["state"], "success");
    assert!(world.trace().contains("01O second\n"));
}

#[test]
fn a_503_is_retried_with_the_same_body_and_request_id() {
    let rule = |request: &Request, count: usize, _: &mut Stored| {
        (request.class != "poll" && count <= 2).then(|| reply(503).with("Retry-After", "1"))
    };
    let mut world = World::new(&[job(&["echo ran"], &json!({}))], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success");
    for class in ["put", "patch"] {
        let calls = world.requests(class);
        assert!(calls.len() >= 3, "{}", world.history());
        for call in &calls[1..3] {
            assert_eq!(call.header("X-Request-Id"), calls[0].header("X-Request-Id"), "{}", world.history());
            assert_eq!(call.body, calls[0].body);
        }
        assert!(calls[1].at - calls[0].at > 0.9, "Retry-After is obeyed\n{}", world.history());
    }
}

#[test]
fn a_final_202_is_asked_again_after_gitlabs_interval() {
    let rule = |request: &Request, count: usize, _: &mut Stored| {
        (request.class == "put" && (2..=3).contains(&count))
            .then(|| reply(202).with("X-GitLab-Trace-Update-Interval", "1"))
    };
    let mut world = World::new(&[job(&["echo ran"], &json!({}))], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let puts = world.requests("put");
    assert_eq!(puts.len(), 4, "running, twice 202, then 200\n{}", world.history());
    assert!(puts[2].at - puts[1].at > 0.9 && puts[3].at - puts[2].at < 2.5, "{}", world.history());
    assert_eq!(puts[1].body, puts[3].body);
    assert_eq!(world.verdict()["state"], "success");
}

#[test]
fn only_200_ends_the_final_update_and_tries_are_counted() {
    let rule =
        |request: &Request, count: usize, _: &mut Stored| (request.class == "put" && count > 1).then(|| reply(400));
    let mut world = World::new(&[job(&["echo ran"], &json!({}))], Box::new(rule));
    world.start("job_status_final_update_retry_limit = 2", 0);
    assert_eq!(world.wait(), 0, "also when the result was never delivered");
    let puts = world.requests("put");
    assert_eq!(puts.len(), 3, "{}", world.history());
    let pause = puts[2].at - puts[1].at;
    assert!((3.9..5.5).contains(&pause), "three seconds and the first of the doubling pauses, not {pause}");
}
