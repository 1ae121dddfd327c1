//! Artifacts up and down, and the sources.

use crate::support::{JOB_TOKEN, Request, Stored, World, job, multipart, polite, reply, unzip, zip};
use serde_json::json;
use std::time::Duration;

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
    let rule = |request: &Request, _: usize, _: &mut Stored| {
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
    let rule = |request: &Request, _: usize, _: &mut Stored| (request.class == "upload").then(|| reply(413).early());
    let members =
        json!({"artifacts": [{"name": "big", "paths": ["big"], "artifact_type": "archive", "artifact_format": "zip"}]});
    let mut world = World::new(&[job(&["head -c 30000000 /dev/urandom > big"], &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.requests("upload").len(), 1, "413 is final\n{}", world.trace());
    let verdict = world.verdict();
    assert_eq!((&verdict["failure_reason"], &verdict["exit_code"]), (&json!("script_failure"), &json!(1)));
}

/// Five attempts a try, a pause as it is told before each but the first: by a date, else by seconds, and no seconds are
/// none. Three tries after a 502.
#[test]
fn an_upload_is_tried_as_often_as_by_19_3_and_waits_as_told() {
    let rule = |request: &Request, count: usize, _: &mut Stored| {
        let in_two_seconds = jiff::Timestamp::now() + Duration::from_millis(2999);
        let date = in_two_seconds.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        (request.class == "upload").then(|| match count {
            1 => reply(502).with("Retry-After", "1"),
            2 => reply(502).with("Retry-After", "9").with("RateLimit-ResetTime", date),
            _ => reply(502).with("Retry-After", "0"),
        })
    };
    let members =
        json!({"artifacts": [{"name": "x", "paths": ["x"], "artifact_type": "archive", "artifact_format": "zip"}]});
    let mut world = World::new(&[job(&["echo x > x"], &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    let at: Vec<f64> = world.requests("upload").into_iter().map(|request| request.at).collect();
    assert_eq!(at.len(), 15, "{}", world.trace());
    let gaps: Vec<f64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((1.0..1.9).contains(&gaps[0]) && (1.9..4.0).contains(&gaps[1]), "{gaps:?}");
    assert!(gaps[2] < 0.9 && gaps[3] < 0.9 && gaps[4] >= 1.0 && gaps[9] >= 2.0, "{gaps:?}");
}

#[test]
fn a_redirected_download_is_asked_for_twice_and_then_followed() {
    let rule = |request: &Request, _: usize, _: &mut Stored| match (request.class, request.target.as_str()) {
        ("download", _) => Some(reply(302).with("Location", "/storage")),
        ("other", "/storage") => Some(reply(200).body(zip(&[("dep.txt", "from the storage\n")]))),
        _ => None,
    };
    let members =
        json!({"dependencies": [{"id": 4100, "name": "prep", "token": "t", "artifacts_file": {"filename": "a.zip"}}]});
    let mut world = World::new(&[job(&["cat dep.txt"], &members)], Box::new(rule));
    world.start("", 0);
    assert_eq!(world.wait(), 0);
    assert_eq!(world.verdict()["state"], "success", "{}", world.trace());
    assert!(world.trace().contains("01O from the storage\n"));
    let targets: Vec<String> = world.requests("download").into_iter().map(|request| request.target).collect();
    assert_eq!(targets, ["/api/v4/jobs/4100/artifacts?direct_download=true"; 2]);
}

#[test]
fn a_download_that_fails_is_repeated_without_the_direct_way() {
    let rule = |request: &Request, count: usize, _: &mut Stored| match (request.class, count) {
        ("download", 1) => Some(reply(400)),
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
