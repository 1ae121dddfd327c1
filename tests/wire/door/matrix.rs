//! Every method, path, token and state: what is answered, and that nothing goes on to GitLab that
//! must not.

use super::support::{DEPENDENCY, DEPENDENCY_TOKEN, Door, GUEST_TOKEN, JOB, JOB_TOKEN, Setup, request};
use dayfly::gitlab::{JobStatus, Verdict};
use dayfly::guest::Limits;

const METHODS: [&str; 12] =
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "LOCK", "M"];

/// Paths that the door does not know, for any method.
const UNKNOWN: [&str; 52] = [
    "/",
    "/api",
    "/api/v4",
    "/api/v4/",
    "/api/v3/jobs/42",
    "/api/v4/user",
    "/api/v4/version",
    "/api/v4/job",
    "/api/v4/jobs",
    "/api/v4/jobs/",
    "/api/v4/jobs/42/",
    "/api/v4/jobs/042",
    "/api/v4/jobs/42.json",
    "/api/v4/jobs/+42",
    "/api/v4/jobs/%34%32",
    "/api/v4/jobs/18446744073709551616",
    "/api/v4/jobs/42/trace/",
    "/api/v4/jobs/42/trace.txt",
    "/api/v4/jobs/42/tracE",
    "/api/v4/jobs/42%2ftrace",
    "/api/v4/jobs/42/../42/trace",
    "/api/v4/jobs/41/../42/artifacts",
    "/api/v4/jobs/42/artifacts/authorize",
    "/api/v4/jobs/42/artifacts/",
    "/api/v4/jobs/1/artifacts/authorize",
    "/api/v4/jobs/42/artifacts/../../../user",
    "/api/v4/jobs/42/retry",
    "/api/v4/jobs/42/play",
    "/api/v4/jobs/42/erase",
    "/api/v4/jobs/42/runtime_environment_keys",
    "/api/v4/jobs//42",
    "/api/v4//jobs/42",
    "//api/v4/jobs/42",
    "/api/v4/./jobs/42",
    "/api/v4/%2e%2e/jobs/42",
    "/api/v4/jobs;a=b/42",
    "/api/v4/jobs/request/",
    "/api/v4/jobs/REQUEST",
    "/API/V4/jobs/request",
    "/gitlab/api/v4/jobs/request",
    "/api/v4/runner",
    "/api/v4/user/runners",
    "/api/v4/projects",
    "/api/v4/projects/1/jobs/42/artifacts",
    "/api/v4/projects/1/variables",
    "/api/v4/groups/1/variables",
    "/api/v4/internal/allowed",
    "/api/graphql",
    "/-/metrics",
    "/-/readiness",
    "/users/sign_in",
    "/root/project.git/info/refs",
];

/// Paths that it knows: one method each, and what that answers to {no, wrong, own} token while the
/// job runs.
const KNOWN: [(&str, &str, [u16; 3]); 14] = [
    ("/api/v4/jobs/request", "POST", [400, 401, 204]),
    ("/api/v4/runners/verify", "POST", [400, 401, 200]),
    ("/api/v4/runners/router/discovery", "GET", [501, 501, 501]),
    ("/api/v4/runners", "DELETE", [403, 403, 403]),
    ("/api/v4/runners/managers", "DELETE", [403, 403, 403]),
    ("/api/v4/runners/reset_authentication_token", "POST", [403, 403, 403]),
    ("/api/v4/runners/7/reset_authentication_token", "POST", [403, 403, 403]),
    ("/api/v4/jobs/42", "PUT", [401, 401, 200]),
    ("/api/v4/jobs/42/trace", "PATCH", [401, 401, 400]),
    ("/api/v4/jobs/7", "PUT", [403, 403, 403]),
    ("/api/v4/jobs/7/trace", "PATCH", [403, 403, 403]),
    ("/api/v4/jobs/7/artifacts", "GET", [403, 403, 403]),
    ("/api/v4/jobs/41/runtime_environment_key", "GET", [403, 403, 403]),
    ("/api/v4/jobs/41/trace", "PATCH", [403, 403, 403]),
];

/// Tokens of a try, as header and in the body.
fn tokens(path: &str) -> [Option<&'static str>; 3] {
    let own = if path.starts_with("/api/v4/jobs/") && path != "/api/v4/jobs/request" { JOB_TOKEN } else { GUEST_TOKEN };
    [None, Some("glcbt-wrong"), Some(own)]
}

async fn status(door: &Door, method: &str, path: &str, token: Option<&str>) -> u16 {
    let body = token.map_or("{}".to_owned(), |token| format!(r#"{{"token":"{token}","state":"running"}}"#));
    let on_job = path.starts_with("/api/v4/jobs/") && path != "/api/v4/jobs/request";
    let header = token.map(|token| if on_job { ("Job-Token", token) } else { ("Runner-Token", token) });
    let headers: Vec<_> = header.into_iter().chain([("Content-Type", "multipart/form-data; boundary=x")]).collect();
    let mut guest = door.guest().await;
    guest.send(request(method, path, &headers, body)).await;
    let line = guest.line().await.unwrap_or_else(|| panic!("no answer to {method} {path}"));
    line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap()
}

async fn open() -> Door {
    let limits = Limits { requests_per_second: 1_000_000, requests_burst: 1_000_000, ..Limits::default() };
    Setup { limits, ..Setup::default() }.open().await
}

/// T2, T3, P9: the route matrix. No upstream contact for anything but the three routes, with the
/// own job's id and token, while the job runs.
#[tokio::test(start_paused = true)]
async fn nothing_but_the_three_routes_reaches_gitlab() {
    let door = open().await;
    door.gitlab.answer_after_body(201, &[], "201");
    let mut combinations = 0;
    for state in ["running", "over", "verdict"] {
        door.set_status(if state == "over" { JobStatus::Over } else { JobStatus::Running });
        let verdict = Verdict { success: true, failure_reason: None, exit_code: None, runtime_environment_key: None };
        door.set_verdict((state == "verdict").then_some(verdict));
        for method in METHODS {
            for path in UNKNOWN {
                for token in tokens(path) {
                    combinations += 1;
                    assert_eq!(status(&door, method, path, token).await, 404, "{method} {path}");
                }
            }
            for (path, own_method, expected) in KNOWN {
                let also = matches!((method, path), ("POST", "/api/v4/runners" | "/api/v4/jobs/7/artifacts"));
                for (token, expected) in tokens(path).into_iter().zip(expected) {
                    combinations += 1;
                    let expected = match (state, path) {
                        _ if method != own_method && !also => 405,
                        // The very first `running` is 200, here as everywhere; this is no longer it.
                        ("over" | "verdict", "/api/v4/jobs/42" | "/api/v4/jobs/42/trace") if expected < 401 => 403,
                        _ => expected,
                    };
                    assert_eq!(status(&door, method, path, token).await, expected, "{state} {method} {path} {token:?}");
                }
            }
            for (path, ours) in [
                (format!("/api/v4/jobs/{JOB}/artifacts"), &["GET", "POST"][..]),
                (format!("/api/v4/jobs/{JOB}/runtime_environment_key"), &["GET"]),
                (format!("/api/v4/jobs/{DEPENDENCY}/artifacts"), &["GET", "POST"]),
            ] {
                let dependency = path.contains("/41/");
                let own = if dependency { DEPENDENCY_TOKEN } else { JOB_TOKEN };
                for token in [None, Some("glcbt-wrong"), Some(own)] {
                    combinations += 1;
                    let before = door.gitlab.contacts();
                    let (status, right) = (status(&door, method, &path, token).await, token == Some(own));
                    let expected = match (method, right, state) {
                        _ if !ours.contains(&method) => 405,
                        ("POST", ..) if dependency => 403,
                        (_, false, _) => 401,
                        (_, true, "running") => 201,
                        _ => 403,
                    };
                    assert_eq!(status, expected, "{state} {method} {path} {token:?}");
                    assert_eq!(
                        door.gitlab.contacts() - before,
                        usize::from(expected == 201),
                        "{state} {method} {path}"
                    );
                }
            }
        }
    }
    // Two of the artifact routes with two tries, one with one: 4 while the job runs.
    assert_eq!(door.gitlab.contacts(), 4);
    assert!(combinations >= 2000, "{combinations}");
    assert!(door.job.lock().unwrap().verdicts.is_empty() && door.guest_bytes().await.is_empty());
    println!("figure door.route_combinations {combinations}");
}

/// T3: another VM's job, with the own token, with the other's, with none; the other's is untouched.
#[tokio::test(start_paused = true)]
async fn another_vms_job_is_out_of_reach() {
    let (own, other) = (open().await, Setup { seed: 2, ..Setup::default() }.open().await);
    for token in [Some(JOB_TOKEN), Some("glcbt-other-job"), None] {
        for (method, below) in [("PUT", ""), ("PATCH", "/trace"), ("POST", "/artifacts"), ("GET", "/artifacts")] {
            assert_eq!(
                status(&own, method, &format!("/api/v4/jobs/43{below}"), token).await,
                403,
                "{method} {token:?}"
            );
        }
    }
    assert_eq!(own.metrics.guest().refused.get("other_job"), 12);
    // T4: and its door is no way around, for there the pass is another.
    let mut guest = other.connect().await;
    guest.send(format!("{}\r\n", dayfly_guest_config::Greeting::opening(&[1; 16]))).await;
    let line = guest.line().await.unwrap();
    assert!(dayfly_guest_config::Greeting::relay(&own.pass, [1; 16], &line).is_err());
    assert!(other.told().is_empty() && other.gitlab.contacts() == 0 && own.gitlab.contacts() == 0);
}
