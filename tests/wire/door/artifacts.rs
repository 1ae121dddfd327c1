//! What goes on to GitLab, and what comes back.

use super::support::{DEPENDENCY, DEPENDENCY_TOKEN, Door, Feed, JOB, JOB_TOKEN, LIMIT, Setup, request};
use crate::support::log::Log;
use dayfly::gitlab::JobStatus;
use dayfly::gitlab::transport::TransportError;
use http_body_util::BodyExt as _;
use std::sync::Mutex;

const MULTIPART: (&str, &str) = ("Content-Type", "multipart/form-data; boundary=x");
const TOKEN: (&str, &str) = ("Job-Token", JOB_TOKEN);

fn artifacts(id: u64) -> String {
    format!("/api/v4/jobs/{id}/artifacts")
}

fn upload_head(query: &str) -> String {
    format!(
        "POST {}{query} HTTP/1.1\r\nHost: 192.0.2.1\r\nTransfer-Encoding: chunked\r\n{}: {}\r\nJob-Token: {JOB_TOKEN}\r\nUser-Agent: gitlab-runner 19.3.0\r\n\r\n",
        artifacts(JOB),
        MULTIPART.0,
        MULTIPART.1
    )
}

/// T5: whatever else the guest sends, GitLab sees one credential, ours.
#[tokio::test(start_paused = true)]
async fn an_upload_reaches_gitlab_with_our_token_only() {
    let door = Door::new().await;
    door.gitlab.answer_after_body(
        201,
        &[("content-type", "text/plain"), ("set-cookie", "a=b"), ("server", "x")],
        "201",
    );
    let mut guest = door.guest().await;
    guest.send(upload_head("?artifact_format=zip&artifact_type=archive&expire_in=1+week&new_key=1").replace(
        "\r\n\r\n",
        "\r\nAuthorization: Bearer x\r\nCookie: a=b\r\nJOB_TOKEN: x\r\nDeploy-Token: x\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
    ))
    .await;
    guest.send("3\r\nabc\r\n4;ext=1\r\ndefg\r\n0\r\nTrailer: x\r\n\r\n").await;
    let reply = guest.reply().await;
    assert_eq!(
        (reply.status, reply.text(), reply.header("set-cookie"), reply.header("server")),
        (201, "201", None, None)
    );
    let seen = door.gitlab.seen.lock().unwrap()[0].clone();
    assert_eq!(seen.line, "POST /api/v4/jobs/42/artifacts?artifact_format=zip&artifact_type=archive&expire_in=1+week");
    assert_eq!((seen.body.as_slice(), seen.ended), (&b"abcdefg"[..], Some(true)));
    let tokens: Vec<_> = seen
        .headers
        .iter()
        .filter(|(name, _)| name.contains("token") || name == "authorization" || name == "cookie")
        .collect();
    assert_eq!(tokens, [&("job-token".to_owned(), JOB_TOKEN.to_owned())]);
    assert!(!seen.headers.iter().any(|(name, _)| name == "x-forwarded-for"));
    assert_eq!(door.metrics.guest().query_keys_dropped.get(), 1);
    // The connection goes on after a body that was read to its end.
    guest.send(request("GET", "/", &[], "")).await;
    assert_eq!(guest.reply().await.status, 404);
}

/// T5: credentials in a query.
/// T3: another job's artifacts. No upstream contact.
#[tokio::test(start_paused = true)]
async fn what_is_refused_does_not_reach_gitlab() {
    let door = Door::new().await;
    for (method, path, headers, status) in [
        ("POST", artifacts(JOB) + "?token=x", &[TOKEN, MULTIPART][..], 400),
        ("POST", artifacts(JOB) + "?artifact_type=a&artifact_type=b", &[TOKEN, MULTIPART], 400),
        ("POST", artifacts(JOB), &[TOKEN, ("Content-Type", "application/json")], 400),
        ("POST", artifacts(JOB), &[MULTIPART], 401),
        ("POST", artifacts(JOB), &[("Job-Token", "x"), MULTIPART], 401),
        ("POST", artifacts(JOB), &[TOKEN, ("Private-Token", "x"), MULTIPART], 401),
        ("POST", artifacts(DEPENDENCY), &[TOKEN, MULTIPART], 403),
        ("GET", artifacts(7), &[TOKEN], 403),
        ("GET", artifacts(7), &[], 403),
        ("GET", artifacts(DEPENDENCY), &[TOKEN], 401),
        ("GET", artifacts(JOB) + "?private_token=x", &[TOKEN], 400),
        ("GET", format!("/api/v4/jobs/{DEPENDENCY}/runtime_environment_key"), &[TOKEN], 403),
        ("POST", artifacts(JOB) + "/authorize", &[TOKEN, MULTIPART], 404),
    ] {
        assert_eq!(door.ask(request(method, &path, headers, "")).await.status, status, "{method} {path} {headers:?}");
    }
    door.set_status(JobStatus::Over);
    let reply = door.ask(request("GET", &artifacts(JOB), &[TOKEN], "")).await;
    assert_eq!((reply.status, reply.header("job-status")), (403, Some("canceled")));
    assert_eq!(door.gitlab.contacts(), 0);
}

#[tokio::test(start_paused = true)]
async fn downloads_stream_with_the_token_of_the_job_that_is_asked_for() {
    let door = Door::new().await;
    door.gitlab.answer_after_body(
        206,
        &[("content-type", "application/zip"), ("content-range", "bytes 0-3/9"), ("accept-ranges", "bytes")],
        "PK\u{3}\u{4}",
    );
    let range = ("Range", "bytes=0-3");
    let reply = door
        .ask(request(
            "GET",
            &(artifacts(DEPENDENCY) + "?direct_download=true"),
            &[("Job-Token", DEPENDENCY_TOKEN), range],
            "",
        ))
        .await;
    assert_eq!((reply.status, reply.body.as_slice(), reply.whole), (206, &b"PK\x03\x04"[..], true));
    assert_eq!((reply.header("content-range"), reply.header("accept-ranges")), (Some("bytes 0-3/9"), Some("bytes")));
    assert_eq!(door.ask(request("GET", &(artifacts(JOB) + "?"), &[TOKEN], "")).await.status, 206);
    assert_eq!(door.ask(request("GET", &(artifacts(JOB) + "?download_mode=proxy"), &[TOKEN], "")).await.status, 206);
    assert_eq!(door.ask(request("GET", &(artifacts(JOB) + "?download_mode=direct"), &[TOKEN], "")).await.status, 206);
    assert_eq!(door.ask(request("GET", "/api/v4/jobs/42/runtime_environment_key", &[TOKEN], "")).await.status, 206);
    let seen = door.gitlab.seen.lock().unwrap();
    let lines: Vec<_> = seen.iter().map(|seen| seen.line.as_str()).collect();
    assert_eq!(
        lines,
        [
            "GET /api/v4/jobs/41/artifacts",
            "GET /api/v4/jobs/42/artifacts",
            "GET /api/v4/jobs/42/artifacts?download_mode=proxy",
            "GET /api/v4/jobs/42/artifacts",
            "GET /api/v4/jobs/42/runtime_environment_key"
        ]
    );
    let token = |seen: &super::support::Seen| seen.headers.iter().find(|(n, _)| n == "job-token").unwrap().1.clone();
    assert_eq!((token(&seen[0]).as_str(), token(&seen[1]).as_str()), (DEPENDENCY_TOKEN, JOB_TOKEN));
    assert!(seen[0].headers.contains(&("range".into(), "bytes=0-3".into())));
}

/// T26: redirects of an upload never pass; of a download only where the site allows it.
#[tokio::test(start_paused = true)]
async fn redirects_pass_only_where_the_site_allows_them() {
    for allowed in [false, true] {
        let door = Setup { direct_download: allowed, ..Setup::default() }.open().await;
        door.gitlab.answer_after_body(302, &[("location", "https://store.example/x")], "");
        let reply = door.ask(request("GET", &(artifacts(JOB) + "?direct_download=true"), &[TOKEN], "")).await;
        assert_eq!(reply.status, if allowed { 302 } else { 502 });
        assert_eq!(reply.header("location"), allowed.then_some("https://store.example/x"));
        let line = door.gitlab.seen.lock().unwrap()[0].line.clone();
        assert_eq!(line.ends_with("?direct_download=true"), allowed);
        let reply = door.ask(request("POST", &artifacts(JOB), &[TOKEN, MULTIPART], "x")).await;
        assert_eq!(
            (reply.status, reply.header("location"), reply.text()),
            (502, None, r#"{"message":"502 Bad Gateway"}"#)
        );
    }
}

/// U37: a redirect passes only to a guest that asked for one, at a runner that allows it; else the guest gets 502, and
/// the operator's log says so.
#[tokio::test(start_paused = true)]
async fn a_redirect_that_is_not_passed_on_is_in_the_log() {
    for (allowed, query, passes) in [(true, "?direct_download=true", true), (true, "", false), (false, "", false)] {
        let log = Log::default();
        let guard = log.listen();
        let door = Setup { direct_download: allowed, ..Setup::default() }.open().await;
        door.gitlab.answer_after_body(302, &[("location", "https://store.example/x?signature=canary")], "");
        let reply = door.ask(request("GET", &(artifacts(JOB) + query), &[TOKEN], "")).await;
        assert_eq!(reply.status, if passes { 302 } else { 502 }, "{query}");
        let text = log.text();
        let line = text.lines().find(|line| line.contains("redirect of a guest's artifacts is not passed on"));
        assert_eq!(line.is_some(), !passes, "{query}: {text}");
        assert!(!text.contains("canary"), "a signed URL is a secret");
        if let Some(line) = line {
            let told = format!("method=GET status=302 asked=false direct_download={allowed}");
            assert!(line.trim_start().starts_with("INFO") && line.contains(&told), "{line}");
        }
        drop(guard);
    }
}

/// R17, G12: GitLab's own errors pass with their body; its absence is a constant 502.
#[tokio::test(start_paused = true)]
async fn gitlabs_true_answer_passes_and_its_absence_is_502() {
    let door = Door::new().await;
    door.gitlab.answer_after_body(503, &[("content-type", "text/html"), ("retry-after", "600")], "<h1>away</h1>");
    let reply = door.ask(request("POST", &artifacts(JOB), &[TOKEN, MULTIPART], "x")).await;
    assert_eq!((reply.status, reply.text(), reply.header("retry-after")), (503, "<h1>away</h1>", Some("60")));
    door.gitlab.answer_with(|_| Box::pin(async { Err(TransportError::Connect("10.1.2.3: refused".into())) }));
    let reply = door.ask(request("GET", &artifacts(JOB), &[TOKEN], "")).await;
    assert_eq!((reply.status, reply.text()), (502, r#"{"message":"502 Bad Gateway"}"#));
}

/// U11: what fails at GitLab carries a wait that grows with the outage, for a runner that obeys it; the answer to an
/// older one waits itself.
#[tokio::test(start_paused = true)]
async fn an_outage_is_bridged_for_either_runner() {
    let unreachable =
        |door: &Door| door.gitlab.answer_with(|_| Box::pin(async { Err(TransportError::Connect("refused".into())) }));
    let key = format!("/api/v4/jobs/{JOB}/runtime_environment_key");
    for (method, path) in [("POST", artifacts(JOB)), ("GET", artifacts(JOB)), ("GET", key)] {
        let door = Door::new().await;
        let newer = [TOKEN, MULTIPART, ("User-Agent", "gitlab-runner 19.3.0 (x; go1.25; linux/amd64)")];
        unreachable(&door);
        for (after, wait) in [(0, "5"), (30, "30"), (100, "60")] {
            tokio::time::sleep(std::time::Duration::from_secs(after)).await;
            let (reply, asked) = (door.ask(request(method, &path, &newer, "x")).await, tokio::time::Instant::now());
            assert_eq!((reply.status, reply.header("retry-after")), (502, Some(wait)), "{method} {path}");
            assert!(asked.elapsed().as_secs() < 1);
        }
        let headers = &[("retry-after", "7"), ("ratelimit-resettime", "Mon, 01 Nov 2066 00:00:00 GMT")];
        door.gitlab.answer_after_body(503, headers, "");
        let reply = door.ask(request(method, &path, &newer, "x")).await;
        assert_eq!((reply.header("retry-after"), reply.header("ratelimit-resettime")), (Some("60"), None));
        door.gitlab.answer_after_body(201, &[], "201");
        assert_eq!(door.ask(request(method, &path, &newer, "x")).await.header("retry-after"), None);
        unreachable(&door);
        assert_eq!(door.ask(request(method, &path, &newer, "x")).await.header("retry-after"), Some("5"));

        // Three tries are all that it makes.
        let older = [TOKEN, MULTIPART, ("User-Agent", "gitlab-runner 17.5.0 (x; go1.22; linux/amd64)")];
        let since = tokio::time::Instant::now();
        for pause in [1, 2] {
            assert_eq!(door.ask(request(method, &path, &older, "x")).await.status, 502);
            tokio::time::sleep(std::time::Duration::from_secs(pause)).await;
        }
        assert_eq!(since.elapsed().as_secs(), 123, "{method} {path}");
        door.gitlab.answer_after_body(201, &[], "201");
        let reply = door.ask(request(method, &path, &older, "x")).await;
        assert_eq!((reply.status, since.elapsed().as_secs()), (201, 123));
    }
}

async fn wait_ended(door: &Door) -> bool {
    let ended = async {
        loop {
            if let Some(ended) = door.gitlab.seen.lock().unwrap().first().and_then(|seen| seen.ended) {
                return ended;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, ended).await.expect("the upstream body ends")
}

/// R15: a guest that cuts its upload cuts it upstream; the body never ends cleanly there.
#[tokio::test]
async fn an_upload_that_is_cut_is_cut_upstream() {
    for body in ["3\r\nabc\r\n", "3\r\nab", "3\r\nabc\r\n0x2\r\n", "3\r\nabc\n", ""] {
        let door = Setup { tcp: true, ..Setup::default() }.open().await;
        door.gitlab.answer_after_body(201, &[], "201");
        let mut guest = door.guest().await;
        guest.send(upload_head("")).await;
        guest.send(body).await;
        drop(guest);
        assert!(!wait_ended(&door).await, "{body:?}");
    }
    // The same with a length.
    let door = Setup { tcp: true, ..Setup::default() }.open().await;
    door.gitlab.answer_after_body(201, &[], "201");
    let mut guest = door.guest().await;
    let whole = request("POST", &artifacts(JOB), &[TOKEN, MULTIPART], [b'x'; 100]);
    guest.send(&whole[..whole.len() - 1]).await;
    drop(guest);
    assert!(!wait_ended(&door).await);
}

/// P1: an upload that stands still is cut upstream, too.
#[tokio::test(start_paused = true)]
async fn an_upload_that_stands_still_is_given_up() {
    let door = Door::new().await;
    door.gitlab.answer_after_body(201, &[], "201");
    let (mut guest, begun) = (door.guest().await, tokio::time::Instant::now());
    guest.send(upload_head("")).await;
    guest.send("3\r\nabc\r\n").await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.header("connection")), (502, Some("close")));
    assert_eq!((begun.elapsed().as_secs(), door.gitlab.seen.lock().unwrap()[0].ended), (60, Some(false)));
}

/// An answer that breaks off at GitLab breaks off at the guest: no clean end.
#[tokio::test(start_paused = true)]
async fn a_download_that_breaks_off_does_not_look_whole() {
    for length in [None, Some("9")] {
        let door = Door::new().await;
        let (pieces, body) = Feed::new();
        let body = Mutex::new(Some(body));
        door.gitlab.answer_with(move |_| {
            let body = body.lock().unwrap().take().unwrap();
            let mut response = http::Response::builder().status(200);
            if let Some(length) = length {
                response = response.header("content-length", length);
            }
            Box::pin(async move { Ok(response.body(body.boxed_unsync()).unwrap()) })
        });
        let mut guest = door.guest().await;
        guest.send(request("GET", &artifacts(JOB), &[TOKEN], "")).await;
        let break_off = async {
            pieces.send(Ok("abc".into())).await.unwrap();
            tokio::task::yield_now().await;
            pieces.send(Err("cut".into())).await.unwrap();
        };
        let (reply, ()) = tokio::join!(guest.reply(), break_off);
        assert_eq!((reply.status, reply.body.as_slice(), reply.whole), (200, &b"abc"[..], false));
    }
}
