//! Asking for a job and proving a token: what goes over the wire, and what each answer means.

use crate::gitlab_server::{RUNNER_TOKEN, Reply, Server, answer, every_text, plain, runner, soon};
use dayfly::gitlab::{GitlabError, JobId, Poll, RunnerInfo};
use serde_json::value::RawValue;
use std::time::Duration;

fn info() -> RunnerInfo {
    RunnerInfo(
        RawValue::from_string(r#"{"name":"gitlab-runner","features":{"b":true, "a":false}}"#.to_owned()).unwrap(),
    )
}

const JSON: &str = "Content-Type: application/json\r\n";

async fn poll(reply: Reply) -> Result<Poll, GitlabError> {
    let server = Server::answering(move |_| reply.clone()).await;
    let polled = soon(runner(plain(&server.url())).request_job(&info(), None)).await;
    if let Err(error) = &polled {
        let text = every_text(error);
        assert!(!text.contains("secrettail"), "{text}");
    }
    polled
}

async fn refused(reply: Reply) -> GitlabError {
    poll(reply).await.map(|_| ()).expect_err("an error")
}

#[tokio::test]
async fn a_poll_is_what_the_official_runner_sends() {
    let server = Server::answering(|_| answer(204, "X-GitLab-Last-Update: abc123\r\n", "")).await;
    let api = runner(plain(&server.url()));
    let Poll::Nothing { last_update } = soon(api.request_job(&info(), None)).await.unwrap() else { panic!() };
    assert_eq!(last_update.as_deref(), Some("abc123"));
    soon(api.request_job(&info(), last_update.as_deref())).await.unwrap();

    let requests = server.requests();
    assert_eq!(requests[0].line, "POST /api/v4/jobs/request HTTP/1.1");
    let raw_info = r#"{"name":"gitlab-runner","features":{"b":true, "a":false}}"#;
    assert_eq!(
        requests[0].text(),
        format!(r#"{{"info":{raw_info},"token":"{RUNNER_TOKEN}","system_id":"s_0123456789ab"}}"#)
    );
    assert_eq!(
        requests[1].text(),
        format!(
            r#"{{"info":{raw_info},"token":"{RUNNER_TOKEN}","system_id":"s_0123456789ab","last_update":"abc123"}}"#
        )
    );
    for request in &requests {
        let mut names: Vec<&str> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["accept", "content-length", "content-type", "host", "runner-token", "user-agent", "x-request-id"]
        );
        assert_eq!(request.all("runner-token"), [RUNNER_TOKEN]);
        assert_eq!(request.all("content-type"), ["application/json"]);
        assert_eq!(request.all("accept"), ["application/json"]);
        assert!(request.all("user-agent")[0].starts_with("dayfly/"));
        assert!(request.all("x-request-id")[0].len() == 32);
    }
    assert_ne!(requests[0].all("x-request-id"), requests[1].all("x-request-id"));
    assert_eq!(server.connections(), 1, "polls share a connection");
}

/// U25: with several images in reach a poll carries the features that all of them have, of the oldest, byte for byte;
/// where they differ there is nothing to ask with.
#[tokio::test]
async fn a_poll_carries_what_all_images_in_reach_share() {
    let image = |name: &str, info: &str| {
        let mut image = dayfly_doubles::images::image();
        name.clone_into(&mut image.name);
        image.manifest.info = Some(info.to_owned());
        image
    };
    let old = r#"{"name":"gitlab-runner","version":"18.11.0","features":{"b":true, "a":false}}"#;
    let new = r#"{"name":"gitlab-runner","version":"19.3.0","features":{"a":false,"b":true}}"#;
    let info = dayfly::image::alike::told(&[image("x", new), image("y", old), image("z", new)]).unwrap();
    let server = Server::answering(|_| answer(204, "", "")).await;
    soon(runner(plain(&server.url())).request_job(&info, None)).await.unwrap();
    assert!(server.requests()[0].text().starts_with(&format!(r#"{{"info":{old},"#)), "{}", server.requests()[0].text());
    let more = r#"{"name":"gitlab-runner","version":"19.3.0","features":{"a":false,"b":true,"c":true}}"#;
    let named = dayfly::image::alike::told(&[image("x", new), image("y", more)]).unwrap_err();
    assert!(named.contains("`x` and `y`") && named.contains("`c`"), "{named}");
}

#[tokio::test]
async fn a_gitlab_below_a_path_is_asked_there() {
    let server = Server::answering(|_| answer(204, "", "")).await;
    for root in ["/root", "/root/"] {
        let api = runner(plain(&server.url().join(root).unwrap()));
        assert!(matches!(soon(api.request_job(&info(), None)).await, Ok(Poll::Nothing { last_update: None })));
    }
    assert!(server.requests().iter().all(|r| r.line == "POST /root/api/v4/jobs/request HTTP/1.1"));
}

/// G7: the payload is handed on as it came, whatever GitLab adds to it.
#[tokio::test]
async fn a_job_is_kept_byte_for_byte() {
    let body = "{ \"id\" : 9007199254740993,\"token\":\"t\", \"new\": [1.50, \"\\u00e9\u{e9}\"],\n\"runner_info\":{\"timeout\": 3600 } }";
    for content_type in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
        let headers = format!("Content-Type: {content_type}\r\nX-Request-Id: 01REQ\r\n");
        let Ok(Poll::Job(job)) = poll(answer(201, &headers, body)).await else { panic!("{content_type}") };
        assert_eq!(
            (job.raw().as_ref(), job.id, job.request_id.as_deref()),
            (body.as_bytes(), JobId(9_007_199_254_740_993), Some("01REQ"))
        );
        assert_eq!(job.with_timeout(Duration::from_secs(7)), body.replace("3600", "7"));
    }
}

/// G1: 5xx and 408 are transient.
/// G2: whatever the page says.
/// G4: 401 and 403 are the token's.
/// G5: 409 is a conflict, to be asked again at once.
#[tokio::test]
async fn each_status_of_a_poll_is_told_apart() {
    for status in [408, 500, 501, 502, 503, 504, 520] {
        for (headers, body) in
            [("", ""), ("Content-Type: text/html\r\n", "<html>down</html>"), (JSON, r#"{"message":"x"}"#)]
        {
            let error = refused(answer(status, headers, body)).await;
            assert!(
                matches!(error, GitlabError::Unavailable { status: Some(s), .. } if s == status)
                    && error.is_transient(),
                "{status}: {error}"
            );
        }
    }
    for status in [401, 403] {
        let error = refused(answer(status, JSON, r#"{"message":"403 Forbidden"}"#)).await;
        assert!(
            matches!(error, GitlabError::Forbidden { status: s } if s == status) && !error.is_transient(),
            "{status}: {error}"
        );
    }
    assert!(matches!(refused(answer(409, "", "")).await, GitlabError::Conflict));
    for status in [200, 202, 400, 404, 405, 413, 422] {
        let error = refused(answer(status, JSON, r#"{"message":"because"}"#)).await;
        assert!(
            matches!(&error, GitlabError::Unexpected { status: s, message, .. } if *s == status && message == "because"),
            "{status}: {error}"
        );
        assert!(!error.is_transient());
    }
}

/// G3: what a 429 or 503 says about coming back is told to the caller, within 5 min.
#[tokio::test]
async fn times_to_come_back_are_read_and_bounded() {
    let check = async |status: u16, headers: &str, seconds: Option<u64>| {
        assert_eq!(
            refused(answer(status, headers, "")).await.retry_after(),
            seconds.map(Duration::from_secs),
            "{headers}"
        );
    };
    check(429, "Retry-After: 30\r\n", Some(30)).await;
    check(503, "Retry-After: 30\r\n", Some(30)).await;
    check(503, "", None).await;
    check(429, "Retry-After: 1000000\r\n", Some(300)).await;
    check(
        429,
        "Date: Sat, 01 Jan 2000 00:00:00 GMT\r\nRateLimit-ResetTime: Sat, 01 Jan 2000 00:00:45 GMT\r\n",
        Some(45),
    )
    .await;
    check(
        429,
        "Date: Sat, 01 Jan 2000 00:00:00 GMT\r\nRateLimit-ResetTime: Fri, 31 Dec 9999 00:00:00 GMT\r\n",
        Some(300),
    )
    .await;
}

/// G6: a 201 that cannot be read is told from all else, with id and token where they arrived.
#[tokio::test]
async fn an_unreadable_job_is_salvaged_where_it_can_be() {
    let cut = |bytes: &str| {
        format!("HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{bytes}")
            .into_bytes()
    };
    let chunked = |bytes: &str| {
        let head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        format!("{head}{:x}\r\n{bytes}\r\n", bytes.len()).into_bytes()
    };
    let (head, early) = (r#"{"id":42,"token":"jobtok","job_info":{"na"#, r#"{"id":42,"tok"#);
    let cases: [(&str, Reply, bool); 12] = [
        ("closed", Reply::Close(cut(head)), true),
        ("closed early", Reply::Close(cut(early)), false),
        ("reset", Reply::Reset(cut(early)), false),
        ("chunked, closed", Reply::Close(chunked(head)), true),
        ("chunked, closed early", Reply::Close(chunked(early)), false),
        ("bad JSON", answer(201, JSON, r#"{"id":42,"token":"jobtok","x":}"#), true),
        ("no JSON", answer(201, JSON, "nonsense"), false),
        ("empty", answer(201, JSON, ""), false),
        ("no type", answer(201, "", r#"{"id":42,"token":"jobtok"}"#), true),
        ("a page", answer(201, "Content-Type: text/html\r\n", "<html>"), false),
        ("id as text", answer(201, JSON, r#"{"id":"42","token":"jobtok"}"#), false),
        (
            "encoded",
            answer(201, "Content-Type: application/json\r\nContent-Encoding: gzip\r\n", b"\x1f\x8b\x08\x00rest"),
            false,
        ),
    ];
    for (case, reply, salvaged) in cases {
        let error = refused(reply).await;
        let text = every_text(&error);
        let GitlabError::UnreadableJob { job, .. } = &error else { panic!("{case}: {text}") };
        assert_eq!(
            job.as_ref().map(|job| (job.0, job.1.expose().to_owned())),
            salvaged.then(|| (JobId(42), "jobtok".to_owned())),
            "{case}: {text}"
        );
        assert!(!error.is_transient() && !text.contains("jobtok"), "{case}: {text}");
    }
}

/// T27: a payload beyond 32 MiB is given up when the bound is reached, whatever it was to become.
#[tokio::test]
async fn a_payload_without_end_is_given_up() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::AsyncWriteExt as _;
    static SENT: AtomicUsize = AtomicUsize::new(0);
    for head in ["Transfer-Encoding: chunked", "Content-Length: 1073741824"] {
        SENT.store(0, Ordering::SeqCst);
        let server = Server::raw(move |stream, _, _| {
            Box::pin(async move {
                let mut wire = crate::gitlab_server::Wire::new(stream);
                let mut request = wire.head().await.unwrap();
                wire.body(&mut request).await;
                let head_bytes = format!("HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n{head}\r\n\r\n");
                wire.stream.write_all(head_bytes.as_bytes()).await.unwrap();
                let piece = if head.starts_with("Transfer") {
                    format!("10000\r\n{}\r\n", "[".repeat(0x10000))
                } else {
                    "[".repeat(0x10000)
                };
                while wire.stream.write_all(piece.as_bytes()).await.is_ok() {
                    SENT.fetch_add(0x10000, Ordering::SeqCst);
                }
            })
        })
        .await;
        let error = soon(runner(plain(&server.url())).request_job(&info(), None)).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, GitlabError::UnreadableJob { job: None, .. }), "{error}");
        let sent = SENT.load(Ordering::SeqCst);
        assert!(sent < 64 << 20, "{sent} bytes were taken");
    }
}

/// T27: a million brackets, and a string of 30 MB, are read like any payload, and refused or kept.
#[tokio::test]
async fn hostile_json_costs_one_pass() {
    assert!(matches!(
        refused(answer(201, JSON, "[".repeat(1_000_000))).await,
        GitlabError::UnreadableJob { job: None, .. }
    ));
    let long = format!(r#"{{"id":1,"token":"t","x":"{}"}}"#, "y".repeat(30_000_000));
    let Ok(Poll::Job(job)) = poll(answer(201, JSON, &long)).await else { panic!() };
    assert_eq!(job.raw().len(), long.len());
}

/// G22: a login page with status 200 or 201 is no success.
#[tokio::test]
async fn a_login_page_is_no_answer() {
    let page = |status| answer(status, "Content-Type: text/html; charset=utf-8\r\n", "<html>Sign in</html>");
    assert!(matches!(refused(page(200)).await, GitlabError::Unavailable { status: Some(200), .. }));
    let server = Server::answering(move |_| page(200)).await;
    let verified = soon(runner(plain(&server.url())).verify(None)).await;
    assert!(matches!(verified, Err(GitlabError::Unavailable { status: Some(200), .. })));
}

#[tokio::test]
async fn a_verification_reads_old_and_new_answers() {
    let verify = async |reply: Reply| {
        let server = Server::answering(move |_| reply.clone()).await;
        let verified = soon(runner(plain(&server.url())).verify(Some(&info()))).await;
        (verified, server.request())
    };
    let (verified, request) = verify(answer(200, JSON, r#"{"id":12,"token":"x","token_expires_at":null}"#)).await;
    assert_eq!(verified.unwrap().id, Some(12));
    assert_eq!(request.line, "POST /api/v4/runners/verify HTTP/1.1");
    assert_eq!((request.all("runner-token"), request.all("job-token")), (vec![RUNNER_TOKEN], vec![]));
    let body: serde_json::Value = serde_json::from_slice(&request.body).unwrap();
    assert_eq!(body["token"], RUNNER_TOKEN);
    assert_eq!(body["system_id"], "s_0123456789ab");
    assert_eq!(body["info"]["name"], "gitlab-runner");
    assert_eq!(verify(answer(200, "Content-Type: text/plain\r\n", "200")).await.0.unwrap().id, None);
    assert!(matches!(verify(answer(403, JSON, "")).await.0, Err(GitlabError::Forbidden { status: 403 })));
    assert!(matches!(
        verify(answer(422, JSON, r#"{"message":"orphaned"}"#)).await.0,
        Err(GitlabError::Unexpected { status: 422, .. })
    ));
    assert!(matches!(verify(answer(503, "", "")).await.0, Err(GitlabError::Unavailable { .. })));
}
