//! Too slow, too much, too often; and what the log keeps to itself.

use super::support::{Door, Feed, GUEST_TOKEN, JOB, JOB_TOKEN, LIMIT, PAYLOAD, Setup, patch, poll, put, request};
use crate::support;
use bytes::Bytes;
use dayfly::gitlab::JobUpdate;
use dayfly::gitlab::transport::TransportError;
use dayfly::guest::Limits;
use http_body_util::BodyExt as _;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, advance, timeout};

const ARTIFACTS: &str = "/api/v4/jobs/42/artifacts";

/// A GitLab whose one answer is fed by the test.
fn fed(door: &Door) -> tokio::sync::mpsc::Sender<Result<Bytes, dayfly::gitlab::transport::BodyError>> {
    let (pieces, body) = Feed::new();
    let body = Mutex::new(Some(body));
    door.gitlab.answer_with(move |_| {
        let body = body.lock().unwrap().take().expect("asked once");
        Box::pin(async move { Ok(http::Response::new(body.boxed_unsync())) })
    });
    pieces
}

/// P1: a guest that never reads its answer.
#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_read_is_cut_and_so_is_gitlab() {
    let door = Door::new().await;
    let pieces = fed(&door);
    let mut guest = door.guest().await;
    guest.send(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN)], "")).await;
    let begun = Instant::now();
    let feeding = async { while pieces.send(Ok(Bytes::from_static(&[7; 64 * 1024]))).await.is_ok() {} };
    timeout(LIMIT, feeding).await.expect("GitLab is let go");
    assert_eq!(begun.elapsed().as_secs(), 60);
    assert_eq!(door.metrics.guest().connections_closed.get("write_stall"), 1);
    drop(guest);
}

/// P1: a body of a byte a second is no progress worth waiting for.
#[tokio::test(start_paused = true)]
async fn a_body_that_creeps_is_given_up() {
    let door = Door::new().await;
    let (mut guest, begun) = (door.guest().await, Instant::now());
    let whole = patch(0, &[b'x'; 1000]);
    let (head, body) = whole.split_at(whole.len() - 1000);
    guest.send(head).await;
    for byte in body {
        if !guest.try_send([*byte]).await || begun.elapsed() > Duration::from_secs(20) {
            break;
        }
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(guest.reply().await.status, 408);
    assert!(door.guest_bytes().await.is_empty());
    assert!(begun.elapsed() <= Duration::from_secs(21));
}

#[tokio::test(start_paused = true)]
async fn a_gitlab_that_pauses_for_too_long_is_cut() {
    let door = Door::new().await;
    let pieces = fed(&door);
    let mut guest = door.guest().await;
    guest.send(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN)], "")).await;
    let begun = Instant::now();
    pieces.send(Ok(Bytes::from_static(b"abc"))).await.unwrap();
    assert_eq!(guest.line().await.unwrap(), "HTTP/1.1 200 OK");
    timeout(Duration::from_secs(400), pieces.closed()).await.expect("GitLab is let go");
    assert_eq!(begun.elapsed().as_secs(), 300);
    assert!(!guest.rest().await.ends_with(b"0\r\n\r\n"), "the guest must not take it for whole");
}

/// A download may take longer than an idle connection may live.
#[tokio::test(start_paused = true)]
async fn a_long_transfer_is_no_idle_connection() {
    let door = Door::new().await;
    let pieces = fed(&door);
    let mut guest = door.guest().await;
    guest.send(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN)], "")).await;
    let feeding = async {
        for _ in 0..20 {
            pieces.send(Ok(Bytes::from_static(b"piece"))).await.unwrap();
            tokio::time::sleep(Duration::from_secs(100)).await;
        }
        drop(pieces);
    };
    let (reply, ()) = tokio::join!(guest.0.answer(), feeding);
    let reply = reply.unwrap().expect("an answer");
    assert_eq!((reply.status, reply.body.len(), reply.whole), (200, 100, true));
}

/// Transfers beyond GitLab's share wait; one that waits in vain is told to come again.
#[tokio::test(start_paused = true)]
async fn transfers_beyond_their_number_wait() {
    let limits = Limits { transfer_total: Duration::from_secs(30), ..Limits::default() };
    let door = Setup { limits, ..Setup::default() }.open().await;
    door.gitlab.answer_with(|_| Box::pin(std::future::pending()));
    let mut guests = Vec::new();
    for _ in 0..21 {
        let mut guest = door.guest().await;
        guest.send(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN)], "")).await;
        guests.push(guest);
    }
    let begun = Instant::now();
    let mut last = guests.pop().unwrap();
    for mut guest in guests {
        assert_eq!(guest.reply().await.status, 502);
    }
    assert_eq!((begun.elapsed().as_secs(), door.gitlab.contacts()), (30, 21));
    assert_eq!(last.reply().await.status, 502);
    assert_eq!(begun.elapsed().as_secs(), 60);
}

/// T10: more trace than the spool keeps: all of it is taken, the spool keeps to its bound with one
/// notice, and the job still ends.
#[tokio::test(start_paused = true)]
async fn a_flood_of_trace_stops_at_the_spools_bound() {
    const MIB: usize = 1024 * 1024;
    let door = Door::new().await;
    let mut guest = door.guest().await;
    for piece in 0..20 {
        guest.send(patch(piece * MIB as u64, &vec![b'x'; MIB])).await;
        let reply = guest.reply().await;
        let range = format!("0-{}", (piece + 1) * MIB as u64);
        assert_eq!((reply.status, reply.header("range")), (202, Some(range.as_str())));
    }
    let kept = door.guest_bytes().await;
    assert!(kept.len() < 8 * MIB + 1024, "{}", kept.len());
    let text = String::from_utf8(kept).unwrap();
    assert_eq!(text.matches("reached the limit").count(), 1);
    guest.send(put(r#""state":"success""#)).await;
    assert_eq!(guest.reply().await.status, 200);
}

/// T10: single bytes without end are taken at the rate, no faster.
#[tokio::test(start_paused = true)]
async fn a_flood_of_requests_is_taken_at_the_rate() {
    let door = Door::new().await;
    let (mut guest, begun) = (door.connect().await, Instant::now());
    guest.greet(&door.pass, b"").await;
    for batch in 0..20 {
        let all: Vec<u8> = (0..50).flat_map(|n| patch(batch * 50 + n, b"x")).collect();
        guest.send(all).await;
        for _ in 0..50 {
            assert_eq!(guest.reply().await.status, 202);
        }
    }
    // 1,000, less the burst of 100, at 50 a second.
    assert_eq!(begun.elapsed().as_secs(), 18);
}

/// T10: a request that would have to wait for more than a second is told to come again.
#[tokio::test(start_paused = true)]
async fn requests_far_beyond_the_rate_get_429_with_a_second() {
    let limits = Limits { requests_per_second: 1, requests_burst: 1, ..Limits::default() };
    let door = Setup { limits, ..Setup::default() }.open().await;
    let mut statuses = Vec::new();
    let mut guests = Vec::new();
    for _ in 0..3 {
        let mut guest = door.guest().await;
        guest.send(request("GET", "/", &[], "")).await;
        guests.push(guest);
    }
    for mut guest in guests {
        let reply = guest.reply().await;
        assert_eq!(reply.header("retry-after"), (reply.status == 429).then_some("1"));
        statuses.push(reply.status);
    }
    assert_eq!(statuses, [404, 404, 429]);
}

/// U28: a guest that calls for GitLab 50 times a second takes its 60 and then two a second; one that asks for more at
/// once is told when to come again. Neither its own trace nor the daemon's calls wait for that.
#[tokio::test(start_paused = true)]
async fn a_flood_of_forwarded_calls_reaches_gitlab_at_their_own_rate() {
    let door = Door::new().await;
    door.gitlab.answer_after_body(200, &[], "");
    let key = format!("/api/v4/jobs/{JOB}/runtime_environment_key");
    let mut calls = tokio::task::JoinSet::new();
    let begun = Instant::now();
    for n in 0..600 {
        let (mut guest, path) = (door.guest().await, if n % 2 == 0 { ARTIFACTS } else { &key });
        guest.send(request("GET", path, &[("Job-Token", JOB_TOKEN)], "")).await;
        calls.spawn(async move {
            let reply = guest.reply().await;
            assert_eq!(reply.header("retry-after"), (reply.status == 429).then_some("10"));
            reply.status
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(begun.elapsed().as_secs(), 12);
    let at_once = Instant::now();
    assert_eq!(door.ask(patch(0, b"a line")).await.status, 202);
    let update = JobUpdate { verdict: None, trace: None };
    door.client.update_job(&update).await.unwrap();
    assert!(at_once.elapsed().is_zero(), "{:?}", at_once.elapsed());
    let contacts = door.gitlab.contacts() - 1;
    assert!((80..=86).contains(&contacts), "{contacts} calls in 12 s");
    let statuses = calls.join_all().await;
    let passed = statuses.iter().filter(|status| **status == 200).count();
    // What was delayed by up to ten seconds comes behind it.
    assert!((100..=106).contains(&passed) && passed == door.gitlab.contacts() - 1, "{passed}");
    assert_eq!(door.metrics.guest().refused.get("forward_rate"), 600 - passed as u64);
    // One after the other, as runners call, none is refused.
    for _ in 0..100 {
        assert_eq!(door.ask(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN)], "")).await.status, 200);
    }
}

/// A writer that keeps all.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// U27: whatever a guest repeats, the log has ten lines of each kind, and their number when the door closes.
#[tokio::test(start_paused = true)]
async fn the_log_tells_ten_times_what_a_guest_repeats() {
    let log = support::log::Log::default();
    let guard = log.listen_to(tracing::Level::DEBUG);
    let mut door = Door::new().await;
    door.gitlab.answer_with(|_| Box::pin(async { Err(TransportError::Connect("refused".into())) }));
    let token = [("Job-Token", JOB_TOKEN)];
    for _ in 0..25 {
        door.entrance.fail().await;
        door.files.fail_call(1, io::ErrorKind::StorageFull);
        assert_eq!(door.ask(patch(0, b"never written")).await.status, 503);
        assert_eq!(door.ask(request("GET", "/api/v4/jobs/77/artifacts", &token, "")).await.status, 403);
        assert_eq!(door.ask(request("GET", ARTIFACTS, &token, "")).await.status, 502);
    }
    let kinds = [
        "failed to write a guest's trace",
        "guest asked for another job",
        "failed to forward a guest's request",
        "failed to accept at a door",
    ];
    for kind in kinds {
        assert_eq!(log.text().matches(kind).count(), 10, "{kind}: {}", log.text());
    }
    door.handle.take().unwrap().revoke().await;
    let text = log.text();
    for kind in kinds {
        let total = format!("of these lines the log has the first ten only line=\"{kind}\" times=25");
        assert_eq!((text.matches(kind).count(), text.contains(&total)), (11, true), "{kind}: {text}");
    }
    drop(guard);
}

/// T1, T21: at the most talkative level, neither a secret nor a guest's own text is in the log.
#[tokio::test(start_paused = true)]
async fn the_log_holds_no_secret_and_no_text_of_a_guest() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let door = Door::new().await;
    door.job.lock().unwrap().payload = true;
    door.gitlab.answer_after_body(503, &[("retry-after", "1")], "canary-answer");
    door.files.fail_call(1, io::ErrorKind::StorageFull);
    let ours = [("Job-Token", JOB_TOKEN), ("Content-Type", "multipart/form-data; boundary=canary")];
    for call in [
        poll(GUEST_TOKEN),
        poll("glrt-canary"),
        put(r#""state":"running","failure_reason":"canary\u001b[31m""#),
        put(r#""state":"canary\u001b""#),
        patch(0, b"canary\x1b[2J"),
        patch(99, b"canary"),
        patch(99, b"canary again"),
        request("POST", &format!("{ARTIFACTS}?artifact_type=canary"), &ours, "canary"),
        request("GET", "/api/v4/jobs/77/artifacts?canary=1", &[("User-Agent", "canary")], ""),
        request("GET", "/canary", &[("X-Request-Id", "canary")], ""),
        request("PUT", &format!("/api/v4/jobs/{JOB}?canary_token=canary"), &[], ""),
        b"GET /canary\x1b HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let mut guest = door.guest().await;
        guest.try_send(call).await;
        guest.try_reply().await;
    }
    let mut stranger = door.connect().await;
    stranger.try_send("canary\x1b\r\n").await;
    assert!(stranger.rest().await.is_empty());
    drop(guard);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    // The log is there at all: the audit line of another job's id, and the failed write.
    assert!(text.contains("another job") && text.contains("failed to write"), "{text}");
    let payload = std::str::from_utf8(PAYLOAD).unwrap();
    let pass = door.pass.to_text();
    for secret in [JOB_TOKEN, GUEST_TOKEN, payload, pass.as_str(), "canary"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
    assert!(text.bytes().all(|byte| byte >= b' ' || byte == b'\n'), "{text:?}");
}

/// V5: a guest that hangs up while its poll is held: the job's answer goes nowhere, and it sees so.
#[tokio::test(start_paused = true)]
async fn a_poll_that_was_given_up_is_not_answered() {
    let door = Door::new().await;
    door.job.lock().unwrap().hold_polls = true;
    let mut guest = door.guest().await;
    guest.send(poll(GUEST_TOKEN)).await;
    door.wait_told("ask", 1).await;
    drop(guest);
    // Another call is served after the first one's end was seen.
    assert_eq!(door.ask(request("GET", "/", &[], "")).await.status, 404);
    assert!(!door.job.lock().unwrap().answer_held());
    assert_eq!(door.job.lock().unwrap().count("hand_out_lost"), 0);
}
