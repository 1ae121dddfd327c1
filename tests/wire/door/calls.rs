//! The calls that end at the door: poll, trace, update.

use super::support::{Door, GUEST_TOKEN, Guest, JOB, JOB_TOKEN, PAYLOAD, Setup, patch, poll, put, request};
use dayfly::gitlab::{JobStatus, Verdict};
use dayfly::guest::{Limits, VerdictAnswer};
use std::time::Duration;
use tokio::time::Instant;

/// V7: the guest token of another machine.
#[tokio::test(start_paused = true)]
async fn a_poll_with_another_guest_token_gets_401_and_asks_nobody() {
    let door = Door::new().await;
    assert_eq!(door.ask(poll("glrt-another")).await.status, 401);
    assert_eq!(door.ask(request("POST", "/api/v4/jobs/request", &[], "{}")).await.status, 400);
    assert_eq!(door.job.lock().unwrap().count("ask"), 0);
}

/// V4, T12: the payload goes out once, byte for byte, with GitLab's request id.
#[tokio::test(start_paused = true)]
async fn a_hundred_parallel_polls_get_one_job() {
    let door = Door::new().await;
    door.job.lock().unwrap().payload = true;
    let mut guests: Vec<Guest> = Vec::new();
    let mut jobs = 0;
    for _ in 0..4 {
        for _ in 0..25 {
            let mut guest = door.guest().await;
            guest.send(poll(GUEST_TOKEN)).await;
            guests.push(guest);
        }
        for mut guest in guests.drain(..) {
            let reply = guest.reply().await;
            if reply.status == 201 {
                assert_eq!(reply.body, PAYLOAD);
                assert_eq!(reply.header("content-type"), Some("application/json"));
                assert_eq!(reply.header("x-request-id"), Some("gitlab-request-1"));
                jobs += 1;
            } else {
                assert_eq!(reply.status, 204);
            }
        }
    }
    assert_eq!((jobs, door.job.lock().unwrap().count("ask object")), (1, 100));
    assert_eq!(door.job.lock().unwrap().count("hand_out_lost"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_poll_is_held_until_the_job_answers_or_the_hold_ends() {
    let door = Door::new().await;
    door.job.lock().unwrap().hold_polls = true;
    let (mut first, begun) = (door.guest().await, Instant::now());
    first.send(poll(GUEST_TOKEN)).await;
    assert_eq!(first.reply().await.status, 204);
    assert_eq!(begun.elapsed().as_secs(), 20);
    assert!(!door.job.lock().unwrap().answer_held(), "the job must learn that nobody waits any more");

    first.send(poll(GUEST_TOKEN)).await;
    door.wait_told("ask", 2).await;
    assert!(door.job.lock().unwrap().answer_held());
    assert_eq!(first.reply().await.body, PAYLOAD);
}

/// V5: a 201 that could not be written.
#[tokio::test(start_paused = true)]
async fn the_job_learns_that_its_hand_out_was_lost() {
    let door = Door::new().await;
    door.job.lock().unwrap().hold_polls = true;
    let mut guest = door.guest().await;
    guest.send(poll(GUEST_TOKEN)).await;
    door.wait_told("ask", 1).await;
    // Both in one step: the answer is on its way to nobody.
    {
        let mut job = door.job.lock().unwrap();
        drop(guest);
        assert!(job.answer_held());
    }
    door.wait_told("hand_out_lost", 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_hand_out_that_was_read_is_not_lost() {
    let door = Door::new().await;
    door.job.lock().unwrap().payload = true;
    let mut guest = door.guest().await;
    guest.send(poll(GUEST_TOKEN)).await;
    assert_eq!(guest.reply().await.status, 201);
    guest.send(put(r#""state":"running""#)).await;
    assert_eq!(guest.reply().await.status, 200);
    drop(guest);
    // A later connection is served after the first one's end was dealt with.
    assert_eq!(door.ask(poll(GUEST_TOKEN)).await.status, 204);
    assert_eq!(door.job.lock().unwrap().count("hand_out_lost"), 0);
}

#[tokio::test(start_paused = true)]
async fn polls_after_the_end_get_204_without_asking_the_job() {
    let door = Door::new().await;
    door.job.lock().unwrap().payload = true;
    door.set_status(JobStatus::Over);
    assert_eq!(door.ask(poll(GUEST_TOKEN)).await.status, 204);
    door.set_status(JobStatus::Running);
    door.set_verdict(Some(success()));
    assert_eq!(door.ask(poll(GUEST_TOKEN)).await.status, 204);
    assert_eq!(door.job.lock().unwrap().count("ask"), 0);
}

#[tokio::test(start_paused = true)]
async fn the_calls_around_the_job_are_answered_here() {
    let door = Door::new().await;
    let body = format!(r#"{{"token":"{GUEST_TOKEN}","system_id":"s_0123456789ab"}}"#);
    let reply = door.ask(request("POST", "/api/v4/runners/verify", &[], &body)).await;
    assert_eq!(reply.status, 200);
    let verified: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(
        (verified["token"].as_str(), &verified["token_expires_at"]),
        (Some(GUEST_TOKEN), &serde_json::Value::Null)
    );
    let reply =
        door.ask(request("GET", "/api/v4/runners/router/discovery", &[("Runner-Token", GUEST_TOKEN)], "")).await;
    assert_eq!((reply.status, reply.text()), (501, r#"{"message":"501 Not Implemented"}"#));
    for (method, path) in
        [("DELETE", "runners"), ("DELETE", "runners/managers"), ("POST", "runners/reset_authentication_token")]
    {
        assert_eq!(
            door.ask(request(method, &format!("/api/v4/{path}"), &[], &body)).await.status,
            403,
            "{method} {path}"
        );
    }
    let reply = door.ask(request("GET", "/api/v4/user", &[], "")).await;
    assert_eq!((reply.status, reply.text()), (404, r#"{"message":"404 Not Found"}"#));
    assert_eq!(door.gitlab.contacts(), 0);
}

/// R2, R7: own offsets; the last piece again is a success, as at GitLab.
#[tokio::test(start_paused = true)]
async fn a_trace_is_taken_by_its_own_offsets() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    for (offset, piece, status, range) in [
        (0, "hello ", 202, "0-6"),
        (6, "world\n", 202, "0-12"),
        (6, "world\n", 202, "0-12"),
        (0, "hello ", 416, "0-12"),
        (6, "world\nmore", 416, "0-12"),
        (99, "x", 416, "0-12"),
        (12, "end", 202, "0-15"),
    ] {
        guest.send(patch(offset, piece.as_bytes())).await;
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("range")), (status, Some(range)), "{offset} {piece}");
        if status == 202 {
            assert_eq!(reply.header("job-status"), Some("running"));
            assert_eq!(reply.header("x-gitlab-trace-update-interval"), Some("2"));
        }
    }
    assert_eq!(door.guest_bytes().await, b"hello world\nend");
    assert_eq!(door.told(), ["greeted", "spoke"]);
}

/// R6: a range that disagrees with its body.
#[tokio::test(start_paused = true)]
async fn a_piece_of_trace_that_contradicts_itself_is_refused() {
    let door = Door::new().await;
    let path = format!("/api/v4/jobs/{JOB}/trace");
    for range in [&[][..], &["0-4"], &["1-0"], &["0-18446744073709551615"], &["0-5", "0-5"], &["x"]] {
        let mut headers: Vec<_> = range.iter().map(|range| ("Content-Range", *range)).collect();
        headers.push(("Job-Token", JOB_TOKEN));
        assert_eq!(door.ask(request("PATCH", &path, &headers, "hello!")).await.status, 400, "{range:?}");
    }
    assert_eq!(door.ask(request("PATCH", &path, &[("Content-Range", "0-5")], "hello!")).await.status, 401);
    assert!(door.guest_bytes().await.is_empty());
}

/// P4: bodies above their route's limit.
#[tokio::test(start_paused = true)]
async fn bodies_above_their_limit_get_413() {
    let door = Door::new().await;
    let big = vec![b'x'; 2 * 1024 * 1024 + 1];
    for head in [patch(0, &big), put(&format!(r#""state":"running","x":"{}""#, "y".repeat(65_536))), {
        let body = format!(r#"{{"token":"{GUEST_TOKEN}","x":"{}"}}"#, "y".repeat(32_768));
        request("POST", "/api/v4/jobs/request", &[], body)
    }] {
        let mut guest = door.guest().await;
        // Only the head and a little: the length alone is enough.
        guest.send(&head[..1024]).await;
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("connection")), (413, Some("close")));
    }
    assert_eq!(door.ask(patch(0, &big[1..])).await.status, 202);
    let mut guest = door.guest().await;
    guest
        .send(format!(
            "PUT /api/v4/jobs/{JOB} HTTP/1.1\r\nHost: h\r\nJob-Token: {JOB_TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
        ))
        .await;
    for _ in 0..17 {
        guest.try_send(format!("1000\r\n{}\r\n", "x".repeat(4096))).await;
    }
    assert_eq!(guest.reply().await.status, 413);
}

#[tokio::test(start_paused = true)]
async fn a_debug_trace_is_told_once() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    for offset in 0..3 {
        let headers = [("Content-Range", format!("{offset}-{offset}")), ("Job-Token", JOB_TOKEN.to_owned())];
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        guest.send(request("PATCH", &format!("/api/v4/jobs/{JOB}/trace?debug_trace=true"), &headers, "x")).await;
        assert_eq!(guest.reply().await.status, 202);
    }
    assert_eq!(door.job.lock().unwrap().count("debug_trace"), 1);
}

/// H6: at the door, a disk that fails costs a retry, never a byte.
#[tokio::test(start_paused = true)]
async fn a_failed_write_is_answered_503_with_a_second() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    door.files.fail_call(1, std::io::ErrorKind::StorageFull);
    guest.send(patch(0, b"abc")).await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    guest.send(patch(0, b"abc")).await;
    assert_eq!(guest.reply().await.status, 202);
    assert_eq!(door.guest_bytes().await, b"abc");
}

/// G15, G16: what GitLab says reaches the guest with its next call.
#[tokio::test(start_paused = true)]
async fn a_cancel_reaches_the_guest_with_its_next_call() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    guest.send(put(r#""state":"running","output":{}"#)).await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.text(), reply.header("job-status")), (200, "200", Some("running")));

    door.set_status(JobStatus::Canceling);
    guest.send(patch(0, b"a")).await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.header("job-status")), (202, Some("canceling")));
    guest.send(put(r#""state":"running""#)).await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.header("job-status")), (200, Some("canceling")));

    door.set_status(JobStatus::Over);
    for call in [patch(1, b"b"), put(r#""state":"running""#), put(r#""state":"failed""#)] {
        guest.send(call).await;
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("job-status")), (403, Some("canceled")));
    }
    assert_eq!(door.guest_bytes().await, b"a");
    assert!(door.job.lock().unwrap().verdicts.is_empty(), "after a hard cancel no PUT is a verdict");
}

/// Decision D13: 19.3 holds the job's start on the first `running`, and polls for ever after a 403.
#[tokio::test(start_paused = true)]
async fn the_first_running_is_always_200() {
    let door = Door::new().await;
    door.set_status(JobStatus::Over);
    let mut guest = door.guest().await;
    for (status, word) in [(200, "running"), (403, "canceled"), (403, "canceled")] {
        guest.send(put(r#""state":"running""#)).await;
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("job-status")), (status, Some(word)));
    }
}

fn success() -> Verdict {
    Verdict { success: true, failure_reason: None, exit_code: None, runtime_environment_key: None }
}

/// T11, T12: the first verdict wins, the same one again is 200, others 403 with `Job-Status`.
#[tokio::test(start_paused = true)]
async fn the_first_verdict_wins() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    guest.send(put(r#""state":"pending""#)).await;
    assert_eq!(guest.reply().await.status, 400);
    guest.send(put(r#""state":"success","checksum":"crc32:00000000","output":{"checksum":"crc32:00000000"}"#)).await;
    let reply = guest.reply().await;
    assert_eq!((reply.status, reply.text()), (200, "200"));
    assert_eq!(door.job.lock().unwrap().verdicts, [success()]);

    door.set_verdict(Some(success()));
    guest.send(put(r#""state":"running""#)).await;
    assert_eq!(guest.reply().await.status, 200, "the very first running is 200 whatever happened");
    for (call, status) in [
        (put(r#""state":"success""#), 200),
        (put(r#""state":"failed","failure_reason":"script_failure","exit_code":1"#), 403),
        (put(r#""state":"running""#), 403),
        (patch(0, b"x"), 403),
    ] {
        guest.send(call).await;
        let reply = guest.reply().await;
        assert_eq!(reply.status, status);
        assert_eq!(reply.header("job-status"), (status == 403).then_some("success"));
    }
    assert_eq!(door.job.lock().unwrap().verdicts.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_verdict_that_could_not_be_written_is_asked_for_again() {
    let door = Door::new().await;
    let mut guest = door.guest().await;
    for (answer, status) in [(VerdictAnswer::Later, 503), (VerdictAnswer::Over, 403), (VerdictAnswer::Taken, 200)] {
        door.job.lock().unwrap().verdict_answer = Some(answer);
        guest.send(put(r#""state":"failed","failure_reason":"runner_system_failure","exit_code":137"#)).await;
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("retry-after")), (status, (status == 503).then_some("1")));
    }
    let verdict = Verdict {
        success: false,
        failure_reason: Some("runner_system_failure".into()),
        exit_code: Some(137),
        runtime_environment_key: None,
    };
    assert_eq!(door.job.lock().unwrap().verdicts, vec![verdict; 3]);
}

/// 17.5 proves its PUT by the body and `PRIVATE-TOKEN`; any wrong token beside a right one is 401.
#[tokio::test(start_paused = true)]
async fn both_generations_of_runners_prove_the_job_token() {
    let door = Door::new().await;
    let path = format!("/api/v4/jobs/{JOB}");
    let running = format!(r#"{{"token":"{JOB_TOKEN}","state":"running"}}"#);
    let bare = r#"{"state":"running"}"#;
    let wrong = r#"{"token":"glcbt-wrong","state":"running"}"#;
    for (headers, body, status) in [
        (&[("Private-Token", JOB_TOKEN)][..], running.as_str(), 200),
        (&[], &running, 200),
        (&[("Job-Token", JOB_TOKEN)], bare, 200),
        (&[("Private-Token", JOB_TOKEN)], bare, 401),
        (&[], bare, 401),
        (&[("Job-Token", JOB_TOKEN)], wrong, 401),
        (&[("Job-Token", "glcbt-wrong")], &running, 401),
        (&[("Job-Token", JOB_TOKEN), ("Job-Token", "glcbt-wrong")], &running, 401),
        (&[("Private-Token", GUEST_TOKEN)], &running, 401),
        (&[("Runner-Token", "x")], &running, 401),
    ] {
        assert_eq!(door.ask(request("PUT", &path, headers, body)).await.status, status, "{headers:?} {body}");
    }
}

/// P5: pipelined requests are served one by one, in order.
#[tokio::test(start_paused = true)]
async fn pipelined_requests_are_served_in_order() {
    let limits = Limits { requests_per_second: 10_000, requests_burst: 10_000, ..Limits::default() };
    let door = Setup { limits, ..Setup::default() }.open().await;
    let mut guest = door.connect().await;
    let mut all = Vec::new();
    for offset in 0..1000 {
        all.extend(patch(offset, b"x"));
    }
    guest.greet(&door.pass, &all).await;
    for offset in 0..1000 {
        let reply = guest.reply().await;
        assert_eq!((reply.status, reply.header("range")), (202, Some(format!("0-{}", offset + 1).as_str())));
    }
}

/// T10: requests beyond the rate wait, within a bound.
#[tokio::test(start_paused = true)]
async fn requests_beyond_the_rate_are_slowed_down() {
    let door = Door::new().await;
    let (mut guest, begun) = (door.guest().await, Instant::now());
    for offset in 0..200 {
        guest.send(patch(offset, b"x")).await;
        assert_eq!(guest.reply().await.status, 202);
    }
    let elapsed = begun.elapsed();
    assert!((Duration::from_millis(1990)..Duration::from_millis(2100)).contains(&elapsed), "{elapsed:?}");
}

/// T10: trace bytes beyond the rate wait, and none is lost.
#[tokio::test(start_paused = true)]
async fn a_trace_beyond_the_rate_is_slowed_down() {
    let limits = Limits { trace_bytes_per_second: 1000, trace_bytes_burst: 1000, ..Limits::default() };
    let door = Setup { limits, ..Setup::default() }.open().await;
    let (mut guest, begun) = (door.guest().await, Instant::now());
    for piece in 0..5 {
        guest.send(patch(piece * 1000, &[b'x'; 1000])).await;
        assert_eq!(guest.reply().await.status, 202);
    }
    assert_eq!(begun.elapsed().as_secs(), 4);
    assert_eq!(door.spool.view().length, 5005);
}

/// P8: the end of the VM is the end of its connections.
#[tokio::test(start_paused = true)]
async fn revoking_the_pass_ends_everything() {
    let mut door = Door::new().await;
    door.job.lock().unwrap().hold_polls = true;
    let (mut idle, mut held, mut silent) = (door.guest().await, door.guest().await, door.connect().await);
    held.send(poll(GUEST_TOKEN)).await;
    door.wait_told("ask", 1).await;
    let begun = Instant::now();
    door.handle.take().unwrap().revoke().await;
    for guest in [&mut idle, &mut held, &mut silent] {
        assert!(guest.rest().await.is_empty());
    }
    assert!(begun.elapsed() <= Duration::from_secs(1));
    assert!(matches!(&door.entrance, super::support::Entrance::Memory(sender) if sender.is_closed()));
}
