//! The calls for one job: what goes over the wire, and what each answer means.

use crate::gitlab_server::{JOB_TOKEN, Reply, Server, Wire, answer, every_text, job, plain, runner, soon};
use bytes::Bytes;
use dayfly::gitlab::transport::full;
use dayfly::gitlab::{
    Body, Forward, ForwardRoute, GitlabError, JobId, JobStatus, JobUpdate, RunnerInfo, TraceAnswer, UpdateAnswer,
    Verdict,
};
use dayfly::secret::Secret;
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt as _;
use serde_json::value::RawValue;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;

fn update(verdict: Option<Verdict>, trace: Option<(u32, u64)>) -> JobUpdate {
    JobUpdate { verdict, trace }
}

fn failed(reason: &str, exit_code: Option<i64>) -> Option<Verdict> {
    Some(Verdict { success: false, failure_reason: Some(reason.to_owned()), exit_code, runtime_environment_key: None })
}

async fn updated(reply: Reply) -> Result<UpdateAnswer, GitlabError> {
    let server = Server::answering(move |_| reply.clone()).await;
    let answered = soon(job(plain(&server.url())).update_job(&update(None, None))).await;
    if let Err(error) = &answered {
        let text = every_text(error);
        assert!(!text.contains("secretjobtoken"), "{text}");
    }
    answered
}

async fn appended(reply: Reply) -> Result<TraceAnswer, GitlabError> {
    let server = Server::answering(move |_| reply.clone()).await;
    soon(job(plain(&server.url())).append_trace(0, Bytes::from_static(b"x"), false)).await
}

#[tokio::test]
async fn an_update_is_what_the_official_runner_sends() {
    let check = async |sent: JobUpdate, members: &str| {
        let server = Server::answering(|_| answer(200, "", "200")).await;
        soon(job(plain(&server.url())).update_job(&sent)).await.unwrap();
        let request = server.request();
        assert_eq!(request.line, "PUT /api/v4/jobs/42 HTTP/1.1");
        assert_eq!(request.text(), format!(r#"{{"token":"{JOB_TOKEN}",{members}}}"#));
        assert_eq!(
            (request.all("job-token"), request.all("content-type")),
            (vec![JOB_TOKEN], vec!["application/json"])
        );
        assert_eq!((request.all("x-request-id")[0].len(), request.all("runner-token").len()), (32, 0));
    };
    check(update(None, None), r#""state":"running","output":{}"#).await;
    let sums = r#""checksum":"crc32:0000abcd","output":{"checksum":"crc32:0000abcd","bytesize":17}"#;
    check(update(None, Some((0xabcd, 17))), &format!(r#""state":"running",{sums}"#)).await;
    let success = Some(Verdict {
        success: true,
        failure_reason: Some("ignored".into()),
        exit_code: Some(0),
        runtime_environment_key: None,
    });
    check(update(success, Some((0xabcd, 17))), &format!(r#""state":"success",{sums}"#)).await;
    let kept = Some(Verdict {
        success: true,
        failure_reason: None,
        exit_code: None,
        runtime_environment_key: Some("rt-1/abc".into()),
    });
    let key = r#","runtime_environment_key":"rt-1/abc""#;
    check(update(kept, Some((0xabcd, 17))), &format!(r#""state":"success",{sums}{key}"#)).await;
    check(
        update(failed("script_failure", Some(3)), Some((0xabcd, 17))),
        &format!(r#""state":"failed","failure_reason":"script_failure",{sums},"exit_code":3"#),
    )
    .await;
    let empty = r#""checksum":"crc32:00000000","output":{"checksum":"crc32:00000000"}"#;
    check(
        update(failed("runner_system_failure", None), Some((0, 0))),
        &format!(r#""state":"failed","failure_reason":"runner_system_failure",{empty}"#),
    )
    .await;
}

/// G16: 403 is the end of the job, with or without a word.
/// G15: `canceling` comes with a success.
/// R8: 202 says when to ask again.
/// R9: 412 wants the whole trace.
#[tokio::test]
async fn each_answer_to_an_update_is_told_apart() {
    let check = async |status: u16, headers: &str, job_status: JobStatus, ask_again: Option<u64>, resend: bool| {
        let got = updated(answer(status, headers, "x")).await.unwrap();
        assert_eq!(
            (got.status, got.ask_again, got.resend_trace),
            (job_status, ask_again.map(Duration::from_secs), resend),
            "{status} {headers}"
        );
    };
    use JobStatus::{Canceling, Over, Running};
    check(200, "", Running, None, false).await;
    check(200, "Job-Status: running\r\n", Running, None, false).await;
    check(200, "Job-Status: canceling\r\n", Canceling, None, false).await;
    check(200, "Job-Status: canceled\r\n", Over, None, false).await;
    check(202, "X-GitLab-Trace-Update-Interval: 4\r\n", Running, Some(4), false).await;
    check(202, "", Running, Some(1), false).await;
    check(202, "X-GitLab-Trace-Update-Interval: -9\r\n", Running, Some(1), false).await;
    check(412, "", Running, None, true).await;
    for word in ["success", "failed", "canceled", "canceling", "skipped"] {
        check(403, &format!("Job-Status: {word}\r\n"), Over, None, false).await;
    }
    check(403, "", Over, None, false).await;
    let interval = updated(answer(200, "X-GitLab-Trace-Update-Interval: 60\r\n", "")).await.unwrap().interval;
    assert_eq!(interval, Some(Duration::from_secs(60)));
}

/// G22: 404 and pages for people are an outage, not an answer, on updates and trace alike.
#[tokio::test]
async fn what_gitlab_never_says_about_a_job_is_an_error() {
    for (status, headers, transient) in [
        (404, "", true),
        (404, "Job-Status: canceled\r\n", true),
        (200, "Content-Type: text/html\r\n", true),
        (202, "Content-Type: text/html; charset=utf-8\r\n", true),
        (408, "", true),
        (409, "", true),
        (429, "Retry-After: 2\r\n", true),
        (500, "", true),
        (502, "Content-Type: text/html\r\n", true),
        (503, "", true),
        (400, "", false),
        (401, "", false),
        (204, "", false),
        (302, "Location: /\r\n", false),
    ] {
        let error = updated(answer(status, headers, "")).await.unwrap_err();
        assert_eq!(error.is_transient(), transient, "PUT {status} {headers}: {error}");
        let error = appended(answer(status, headers, "")).await.unwrap_err();
        assert_eq!(error.is_transient(), transient, "PATCH {status} {headers}: {error}");
    }
    assert!(updated(answer(416, "", "")).await.is_err());
    for status in [200, 201, 412] {
        assert!(
            matches!(appended(answer(status, "", "")).await, Err(GitlabError::Unexpected { .. })),
            "PATCH {status}"
        );
    }
    assert!(matches!(appended(answer(409, "", "")).await, Err(GitlabError::Conflict)));
}

#[tokio::test]
async fn a_piece_of_trace_is_what_the_official_runner_sends() {
    let server = Server::answering(|_| answer(202, "Range: 0-1005\r\nX-GitLab-Trace-Update-Interval: 3\r\n", "")).await;
    let client = job(plain(&server.url()));
    let got = soon(client.append_trace(1000, Bytes::from_static(b"\x00\xffabc"), false)).await.unwrap();
    assert_eq!((got.status, got.continue_at, got.interval), (JobStatus::Running, None, Some(Duration::from_secs(3))));
    soon(client.append_trace(u64::MAX, Bytes::from_static(b"ab"), true)).await.unwrap();
    let [first, second] = server.requests().try_into().unwrap();
    assert_eq!(first.line, "PATCH /api/v4/jobs/42/trace?debug_trace=false HTTP/1.1");
    assert_eq!(first.body, b"\x00\xffabc");
    let mut headers: Vec<(&str, Vec<&str>)> = first.headers.iter().map(|(n, _)| (n.as_str(), first.all(n))).collect();
    headers.sort();
    let names: Vec<&str> = headers.iter().map(|(n, _)| *n).collect();
    // reqwest adds `Accept: */*`; the official runner sends none here.
    assert_eq!(
        names,
        [
            "accept",
            "content-length",
            "content-range",
            "content-type",
            "host",
            "job-token",
            "user-agent",
            "x-request-id"
        ]
    );
    assert_eq!((first.all("content-range"), first.all("content-type")), (vec!["1000-1004"], vec!["text/plain"]));
    assert_eq!((first.all("content-length"), first.all("job-token")), (vec!["5"], vec![JOB_TOKEN]));
    assert_eq!(second.line, "PATCH /api/v4/jobs/42/trace?debug_trace=true HTTP/1.1");
}

/// R2, R3, R5: a 416 says where GitLab wants to go on, 0 if it says nothing that can be read.
#[tokio::test]
async fn a_416_says_where_to_go_on() {
    for (headers, expected) in [
        ("Range: 0-17\r\n", 17),
        ("Range: 0-0\r\n", 0),
        ("", 0),
        ("Range: nonsense\r\n", 0),
        ("Range: 0-99999999999999999999999\r\n", 0),
        ("Range: 0-18446744073709551615\r\n", u64::MAX),
    ] {
        let got = appended(answer(416, headers, "")).await.unwrap();
        assert_eq!((got.continue_at, got.status), (Some(expected), JobStatus::Running), "{headers}");
    }
    let over = appended(answer(403, "Job-Status: failed\r\n", "")).await.unwrap();
    assert_eq!((over.continue_at, over.status), (None, JobStatus::Over));
    assert_eq!(appended(answer(202, "Job-Status: canceling\r\n", "")).await.unwrap().status, JobStatus::Canceling);
}

/// R2: an answer whose body breaks off is still that answer: its status is all we need.
#[tokio::test]
async fn a_body_that_breaks_does_not_undo_a_status() {
    let broken =
        |status: u16| Reply::Reset(format!("HTTP/1.1 {status} X\r\nContent-Length: 100\r\n\r\nabc").into_bytes());
    assert_eq!(updated(broken(200)).await.unwrap().status, JobStatus::Running);
    assert_eq!(updated(broken(403)).await.unwrap().status, JobStatus::Over);
    assert_eq!(appended(broken(202)).await.unwrap().continue_at, None);
    for reply in
        [Reply::Close(vec![]), Reply::Reset(b"HTTP/1.1 20".to_vec()), Reply::Close(b"nonsense\r\n\r\n".to_vec())]
    {
        let error = updated(reply).await.unwrap_err();
        assert!(matches!(error, GitlabError::Unavailable { status: None, source: Some(_), .. }), "{error}");
    }
}

/// T27: whatever comes as the body of a small answer, little of it is read.
#[tokio::test]
async fn endless_bodies_of_small_answers_are_cut() {
    let endless = |status: u16| {
        Server::raw(move |stream, _, _| {
            Box::pin(async move {
                let mut wire = Wire::new(stream);
                let mut request = wire.head().await.unwrap();
                wire.body(&mut request).await;
                let head = format!(
                    "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                );
                wire.stream.write_all(head.as_bytes()).await.unwrap();
                let piece = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
                let mut sent = 0;
                while wire.stream.write_all(piece.as_bytes()).await.is_ok() {
                    sent += piece.len();
                    assert!(sent < 32 << 20, "too much was taken");
                }
            })
        })
    };
    let server = endless(200).await;
    assert!(soon(job(plain(&server.url())).update_job(&update(None, None))).await.is_ok());
    let server = endless(400).await;
    let error = soon(job(plain(&server.url())).update_job(&update(None, None))).await.unwrap_err();
    assert!(matches!(&error, GitlabError::Unexpected { message, .. } if message.len() == 200), "{error}");
}

fn forward(route: ForwardRoute, body: Body) -> Forward {
    Forward { route, query: Vec::new(), headers: HeaderMap::new(), body }
}

/// T5, T8: of what a guest sends, only the listed headers reach GitLab, and one token: ours.
#[tokio::test]
async fn forwarding_sends_one_token_and_listed_headers_only() {
    let server = Server::answering(|_| answer(201, "Set-Cookie: a=b\r\n", "201")).await;
    let client = job(plain(&server.url()));
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("job-token", "guest"),
        ("job_token", "guest"),
        ("private-token", "guest"),
        ("runner-token", "guest"),
        ("deploy-token", "guest"),
        ("authorization", "Bearer guest"),
        ("cookie", "guest"),
        ("proxy-authorization", "guest"),
        ("x-forwarded-for", "10.0.0.1"),
        ("user-agent", "guest"),
        ("host", "guest.example"),
        ("connection", "close, x-thing"),
        ("x-thing", "guest"),
        ("content-length", "5"),
        ("transfer-encoding", "chunked"),
        ("expect", "100-continue"),
        ("accept-encoding", "gzip"),
        ("content-type", "multipart/form-data; boundary=b"),
        ("x-request-id", "guest-id_1"),
    ] {
        headers.append(http::HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    headers.append("job-token", HeaderValue::from_static("guest2"));
    let query = vec![
        ("artifact_format".to_owned(), "zip".to_owned()),
        ("expire_in".to_owned(), "1+week&token=guest".to_owned()),
    ];
    let sent = Forward { route: ForwardRoute::UploadArtifacts, query, headers: headers.clone(), body: full("body") };
    let answered = soon(client.forward(sent, None)).await.unwrap();
    assert_eq!(
        (answered.status().as_u16(), answered.into_body().collect().await.unwrap().to_bytes().as_ref()),
        (201, &b"201"[..])
    );

    let request = server.request();
    assert_eq!(
        request.line,
        "POST /api/v4/jobs/42/artifacts?artifact_format=zip&expire_in=1+week%26token%3Dguest HTTP/1.1"
    );
    let mut names: Vec<&str> = request.headers.iter().map(|(n, _)| n.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["accept", "content-length", "content-type", "host", "job-token", "user-agent", "x-request-id"]);
    assert_eq!((request.all("job-token"), request.all("x-request-id")), (vec![JOB_TOKEN], vec!["guest-id_1"]));
    assert_eq!(
        (request.all("host"), request.body.as_slice()),
        (vec![server.address.to_string().as_str()], &b"body"[..])
    );

    headers.insert("x-request-id", HeaderValue::from_bytes(b"a b\xff").unwrap());
    headers.insert("range", HeaderValue::from_static("bytes=0-0"));
    let download = Forward { route: ForwardRoute::DownloadArtifacts(JobId(7)), query: vec![], headers, body: full("") };
    soon(client.forward(download, Some(&Secret::new("dependency-token")))).await.unwrap();
    let request = server.requests().pop().unwrap();
    assert_eq!(request.line, "GET /api/v4/jobs/7/artifacts HTTP/1.1");
    assert_eq!((request.all("job-token"), request.all("range")), (vec!["dependency-token"], vec!["bytes=0-0"]));
    assert_eq!(
        (
            request.all("x-request-id")[0].len(),
            request.all("content-length").len(),
            request.all("transfer-encoding").len()
        ),
        (32, 0, 0)
    );

    soon(client.forward(forward(ForwardRoute::RuntimeEnvironmentKey, full("")), None)).await.unwrap();
    assert_eq!(server.requests().pop().unwrap().line, "GET /api/v4/jobs/42/runtime_environment_key HTTP/1.1");
    assert_eq!(server.connections(), 3, "each has a connection of its own");
}

/// R17: GitLab's answer to a forwarded call passes as it is, whatever it says.
#[tokio::test]
async fn forwarded_answers_pass_whole() {
    for (status, headers) in [
        (201, ""),
        (400, ""),
        (403, ""),
        (404, ""),
        (413, ""),
        (429, "Retry-After: 5\r\n"),
        (500, ""),
        (503, "Content-Type: text/html\r\n"),
        (307, "Location: http://other.example/\r\n"),
    ] {
        let server = Server::answering(move |_| answer(status, headers, b"\x1f\x8b\x08 body")).await;
        let answered = soon(job(plain(&server.url())).forward(forward(ForwardRoute::UploadArtifacts, full("x")), None))
            .await
            .unwrap();
        assert_eq!(answered.status().as_u16(), status);
        assert_eq!(answered.headers().contains_key("location"), status == 307);
        assert_eq!(soon(answered.into_body().collect()).await.unwrap().to_bytes().as_ref(), b"\x1f\x8b\x08 body");
    }
}

/// T29: an answer with 300 header fields is an answer; one with a head without end is not.
#[tokio::test]
async fn many_headers_are_borne_and_endless_ones_are_not() {
    let headers: String = (0..300).map(|n| format!("X-Field-{n}: {n}\r\n")).collect();
    let server = Server::answering(move |_| answer(201, &headers, "ok")).await;
    let answered =
        soon(job(plain(&server.url())).forward(forward(ForwardRoute::UploadArtifacts, full("x")), None)).await;
    assert_eq!(answered.unwrap().status().as_u16(), 201);
    for head in ["X: y\r\n".repeat(1000), format!("X: {}", "y".repeat(2 << 20))] {
        let bytes = format!("HTTP/1.1 200 OK\r\n{head}").into_bytes();
        let error = updated(Reply::Hang(bytes)).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, GitlabError::Unavailable { status: None, .. }), "{error}");
    }
}

/// T26: a redirect is never followed, by any call, to anywhere: its target sees nothing.
#[tokio::test]
async fn no_call_follows_a_redirect() {
    let target = Server::answering(|_| answer(200, "", "")).await;
    let info = RunnerInfo(RawValue::from_string("{}".to_owned()).unwrap());
    let port = target.address.port();
    for status in [301, 302, 303, 307, 308] {
        for location in [
            format!("http://localhost:{port}/other/host"),
            format!("http://127.0.0.1:{port}/other/port"),
            format!("//127.0.0.1:{port}/x"),
            "/same/host".to_owned(),
        ] {
            let text = format!("Location: {location}\r\n");
            let server = Server::answering(move |_| answer(status, &text, "")).await;
            let (runner, client) = (runner(plain(&server.url())), job(plain(&server.url())));
            let unexpected = |error: GitlabError| {
                let explained = error.explain().unwrap_or_default();
                assert!(
                    matches!(&error, GitlabError::Unexpected { status: s, message, .. } if *s == status && message.contains("never followed")),
                    "{error}"
                );
                assert!(explained.contains("`url`"), "{explained}");
            };
            unexpected(soon(runner.request_job(&info, None)).await.map(|_| ()).unwrap_err());
            unexpected(soon(runner.verify(Some(&info))).await.map(|_| ()).unwrap_err());
            unexpected(soon(client.update_job(&update(None, None))).await.map(|_| ()).unwrap_err());
            unexpected(soon(client.append_trace(0, Bytes::from_static(b"x"), false)).await.map(|_| ()).unwrap_err());
            for route in [
                ForwardRoute::UploadArtifacts,
                ForwardRoute::DownloadArtifacts(JobId(1)),
                ForwardRoute::RuntimeEnvironmentKey,
            ] {
                let answered = soon(client.forward(forward(route, full("x")), None)).await.unwrap();
                assert_eq!(answered.status().as_u16(), status);
            }
            assert_eq!(server.requests().len(), 7, "{status} {location}");
        }
    }
    assert_eq!((target.requests().len(), target.connections()), (0, 0));
}
