//! The stand-in against a scripted GitLab, over a socket.
//!
//! With `DAYFLY_GITLAB_RUNNER=/path/to/gitlab-runner` the same tests run the official program (19.3): what they
//! expect is its behaviour, not an opinion about it.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a blocking test of a blocking program: it starts processes and has no Tokio"
)]

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::{JOB_TOKEN, Reply, Request, World, is_stand_in, job, multipart, reply, unzip, zip};

/// A script that goes on only when a file is there.
fn until(file: &std::path::Path) -> String {
    format!("until [ -e {} ]; do sleep 0.05; done", file.display())
}

fn after_script(script: &[&str]) -> serde_json::Value {
    json!({"steps": [{"name": "after_script", "script": script, "timeout": 3600, "when": "always"}]})
}

fn polite() -> support::Rule {
    Box::new(|_, _, _| None)
}

/// A world whose rule may leave a file behind, for the job to see.
fn world_with_file(
    make_job: impl Fn(&str) -> serde_json::Value,
    rule: impl Fn(&Request, usize, &mut support::Stored, &std::path::Path) -> Option<Reply> + Send + Sync + 'static,
) -> (World, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("go-on");
    let job = make_job(&until(&file));
    let world = World::new(&[job], Box::new(move |request, count, stored| rule(request, count, stored, &file)));
    (world, directory)
}

fn canceling() -> Reply {
    reply(202).with("Job-Status", "canceling")
}

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
fn a_403_aborts_the_job_without_after_script() {
    let rule = |request: &Request, _: usize, _: &mut support::Stored| {
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
    let rule = |request: &Request, _: usize, stored: &mut support::Stored| {
        (request.class == "patch").then(|| {
            stored.trace.extend_from_slice(&request.body);
            canceling()
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
    let rule = |request: &Request, _: usize, _: &mut support::Stored| (request.class == "put").then(|| reply(403));
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
    let rule = |request: &Request, _: usize, _: &mut support::Stored| {
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
fn a_503_is_retried_with_the_same_body_and_request_id() {
    let rule = |request: &Request, count: usize, _: &mut support::Stored| {
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
    let rule = |request: &Request, count: usize, _: &mut support::Stored| {
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
    let rule = |request: &Request, count: usize, _: &mut support::Stored| {
        (request.class == "put" && count > 1).then(|| reply(400))
    };
    let mut world = World::new(&[job(&["echo ran"], &json!({}))], Box::new(rule));
    world.start("job_status_final_update_retry_limit = 2", 0);
    assert_eq!(world.wait(), 0, "also when the result was never delivered");
    let puts = world.requests("put");
    assert_eq!(puts.len(), 3, "{}", world.history());
    let pause = puts[2].at - puts[1].at;
    assert!((3.9..5.5).contains(&pause), "three seconds and the first of the doubling pauses, not {pause}");
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

#[test]
fn artifacts_go_up_and_come_down() {
    let members = json!({
        "dependencies": [
            {"id": 4100, "name": "prep", "token": "glcbt-dependency", "artifacts_file": {"filename": "a.zip", "size": 9}},
            {"id": 4101, "name": "none", "token": "glcbt-dependency"},
        ],
        "artifacts": [
            {"name": "mybuild", "paths": ["out/"], "exclude": ["out/skip*"], "when": "on_success", "artifact_type": "archive",
             "artifact_format": "zip", "expire_in": "1 week"},
            {"name": "junit.xml", "paths": ["junit.xml"], "when": "always", "artifact_type": "junit", "artifact_format": "gzip"},
            {"name": "x", "paths": ["out/"], "when": "on_failure", "artifact_type": "archive", "artifact_format": "zip"},
        ],
    });
    let script =
        ["cat dep/hello.txt", "mkdir out; echo data > out/a.txt; echo skip > out/skip.txt; printf '<x/>' > junit.xml"];
    let rule = |request: &Request, _: usize, _: &mut support::Stored| {
        (request.class == "download").then(|| {
            reply(200).with("Content-Type", "application/zip").body(zip(&[("dep/hello.txt", "hello from dep\n")]))
        })
    };
    let mut world = World::new(&[job(&script, &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success", "{}", world.trace());
    assert!(world.trace().contains("01O hello from dep\n"));

    let downloads = world.requests("download");
    assert_eq!(downloads.len(), 1);
    assert_eq!(downloads[0].target, "/api/v4/jobs/4100/artifacts?direct_download=true");
    assert_eq!(downloads[0].header("Job-Token"), "glcbt-dependency");

    let uploads = world.requests("upload");
    assert_eq!(uploads.len(), 2, "{}", world.history());
    assert_eq!(
        uploads[0].target,
        "/api/v4/jobs/4242/artifacts?artifact_format=zip&artifact_type=archive&expire_in=1+week"
    );
    assert_eq!((uploads[0].header("Job-Token"), uploads[0].header("Transfer-Encoding")), (JOB_TOKEN, "chunked"));
    assert_ne!(uploads[0].connection, uploads[1].connection, "each transfer is a process with a connection of its own");
    let (head, archive) = multipart(&uploads[0]);
    assert!(head.contains("Content-Disposition: form-data; name=\"file\"; filename=\"mybuild.zip\""), "{head}");
    assert!(head.contains("Content-Type: application/octet-stream"), "{head}");
    let entries = unzip(&archive);
    assert_eq!(entries.get("out/a.txt").map(String::as_str), Some("data\n"));
    assert!(!entries.contains_key("out/skip.txt"), "{entries:?}");

    let (head, report) = multipart(&uploads[1]);
    assert!(head.contains("filename=\"junit.xml.gz\""), "{head}");
    let mut text = String::new();
    let mut member = flate2::read::GzDecoder::new(&report[..]);
    std::io::Read::read_to_string(&mut member, &mut text).expect("gzip");
    assert_eq!(text, "<x/>");
    assert_eq!(member.header().expect("a header").filename(), Some(&b"junit.xml"[..]));
}

#[test]
fn an_upload_refused_before_its_body_is_read_is_not_repeated() {
    let rule =
        |request: &Request, _: usize, _: &mut support::Stored| (request.class == "upload").then(|| reply(413).early());
    let members =
        json!({"artifacts": [{"name": "big", "paths": ["big"], "artifact_type": "archive", "artifact_format": "zip"}]});
    let mut world = World::new(&[job(&["head -c 30000000 /dev/urandom > big"], &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.requests("upload").len(), 1, "413 is final\n{}", world.trace());
    let verdict = world.verdict();
    assert_eq!((&verdict["failure_reason"], &verdict["exit_code"]), (&json!("script_failure"), &json!(1)));
}

#[test]
fn a_redirected_download_is_asked_for_twice() {
    let rule = |request: &Request, _: usize, _: &mut support::Stored| match (request.class, request.target.as_str()) {
        ("download", target) if target.ends_with("direct_download=true") => {
            Some(reply(302).with("Location", "http://127.0.0.1:1/storage"))
        }
        ("download", _) => Some(reply(200).body(zip(&[("dep.txt", "from GitLab\n")]))),
        _ => None,
    };
    let members =
        json!({"dependencies": [{"id": 4100, "name": "prep", "token": "t", "artifacts_file": {"filename": "a.zip"}}]});
    let mut world = World::new(&[job(&["cat dep.txt"], &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success", "{}", world.trace());
    let targets: Vec<String> = world.requests("download").into_iter().map(|request| request.target).collect();
    assert_eq!(targets, ["/api/v4/jobs/4100/artifacts?direct_download=true", "/api/v4/jobs/4100/artifacts?"]);
}

#[test]
fn the_sources_are_fetched_and_the_commit_checked_out() {
    let repository = tempfile::tempdir().expect("a directory");
    let git = |arguments: &[&str]| {
        let output = std::process::Command::new("git")
            .current_dir(repository.path())
            .args(["-c", "user.name=n", "-c", "user.email=e@invalid"])
            .args(arguments)
            .output()
            .expect("git");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    git(&["init", "-q", "-b", "main"]);
    std::fs::write(repository.path().join("README"), "hi\n").expect("written");
    git(&["add", "README"]);
    git(&["commit", "-q", "-m", "one"]);
    let sha = git(&["rev-parse", "HEAD"]);
    let members = json!({
        "git_info": {"repo_url": format!("file://{}", repository.path().display()), "ref": "main", "sha": sha,
            "refspecs": ["+refs/heads/main:refs/remotes/origin/main"], "depth": 20},
        "variables": [{"key": "GIT_STRATEGY", "value": "fetch"}],
    });
    let mut world = World::new(&[job(&["cat README", "git rev-parse HEAD"], &members)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success", "{}", world.trace());
    let trace = world.trace();
    assert!(trace.contains("01O hi\n") && trace.contains(&format!("01O {sha}\n")), "{trace}");
    assert!(trace.contains("Fetching changes with git depth set to 20..."), "{trace}");
    assert!(trace.contains(&format!("Checking out {} as detached HEAD (ref is main)...", &sha[..8])), "{trace}");
}

#[test]
fn a_repository_that_is_not_there_fails_the_job_by_gits_exit_code() {
    let url = World::new(&[], polite()).url().to_owned();
    let members = json!({
        "git_info": {"repo_url": format!("{url}/grp/none.git"), "ref": "main", "sha": "0123456789012345678901234567890123456789",
            "refspecs": ["+refs/heads/main:refs/remotes/origin/main"], "depth": 20},
        "variables": [{"key": "GIT_STRATEGY", "value": "clone"}],
    });
    let mut world = World::new(&[job(&["echo never-reached"], &members)], polite());
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let verdict = world.verdict();
    assert_eq!((&verdict["failure_reason"], &verdict["exit_code"]), (&json!("script_failure"), &json!(128)));
    assert!(!world.trace().contains("01O never-reached"), "{}", world.trace());
}
