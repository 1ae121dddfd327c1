//! Guest, door and GitLab over real sockets, with the real client in between: early answers, cuts,
//! back-pressure, and what is left behind.

use super::support::{Door, JOB_TOKEN, LIMIT, Setup, patch, poll, request};
use crate::gitlab_server::{Reply, Server, Wire, answer, plain, sockets_to, until};
use dayfly::guest::Limits;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const ARTIFACTS: &str = "/api/v4/jobs/42/artifacts";

async fn open(server: &Server) -> Door {
    let limits = Limits {
        requests_per_second: 100_000,
        requests_burst: 100_000,
        forwards_per_second: 100_000,
        forwards_burst: 100_000,
        ..Limits::default()
    };
    Setup { limits, tcp: true, transport: Some(plain(&server.url())), ..Setup::default() }.open().await
}

fn upload_head(framing: &str) -> String {
    format!(
        "POST {ARTIFACTS}?artifact_type=archive HTTP/1.1\r\nHost: 192.0.2.1\r\nUser-Agent: gitlab-runner\r\n{framing}\r\nContent-Type: multipart/form-data; boundary=x\r\nJob-Token: {JOB_TOKEN}\r\n\r\n"
    )
}

/// A GitLab that refuses as soon as it has the head.
async fn refusing(status: u16, reads_on: bool) -> Server {
    Server::raw(move |stream, _, _| {
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            if wire.head().await.is_none() {
                return;
            }
            let text =
                format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\nrefused!");
            wire.stream.write_all(text.as_bytes()).await.unwrap();
            let mut buffer = vec![0; 64 * 1024];
            while reads_on && matches!(wire.stream.read(&mut buffer).await, Ok(n) if n > 0) {}
            if !reads_on {
                std::future::pending::<()>().await;
            }
        })
    })
    .await
}

/// R16, B23: GitLab's early 413 and 403 reach a guest that sends on and reads meanwhile, as the
/// official runner does, 100 times of 100; no socket is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_answers_reach_a_busy_guest_and_leave_no_socket() {
    let mut seen = 0;
    for (status, reads_on) in [(413, true), (403, false)] {
        let server = refusing(status, reads_on).await;
        let door = open(&server).await;
        for round in 0..50 {
            let mut guest = door.guest().await;
            guest.send(upload_head("Transfer-Encoding: chunked")).await;
            let (sending, mut reading) = guest.split();
            let mut sending = sending;
            let send = async {
                let piece = format!("4000\r\n{}\r\n", "x".repeat(0x4000));
                for _ in 0..256 {
                    if sending.write_all(piece.as_bytes()).await.is_err() {
                        break;
                    }
                }
                // Holds on, as one that was not told to stop.
                std::future::pending::<()>().await;
            };
            let reply = tokio::select! { biased; reply = reading.reply() => reply, () = send => unreachable!() };
            assert_eq!((reply.status, reply.text()), (status, "refused!"), "round {round}");
            assert_eq!(reply.header("connection"), Some("close"));
            seen += 1;
        }
        until(|| sockets_to(server.address.port()) == 0).await;
        if let super::support::Entrance::Tcp(address) = door.entrance {
            until(|| sockets_to(address.port()) == 0).await;
        }
    }
    assert_eq!(seen, 100);
    println!("figure door.early_answers_seen {seen}");
}

/// F5: a guest that writes all it has before it reads anything still reads the answer, as long as
/// that is no more than the door drains: 100 times of 100.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_answers_reach_a_guest_that_writes_first() {
    let server = refusing(413, true).await;
    let door = open(&server).await;
    let body = vec![b'x'; 900 * 1024];
    for round in 0..100 {
        let mut guest = door.guest().await;
        guest.send(upload_head(&format!("Content-Length: {}", body.len()))).await;
        assert!(guest.try_send(&body).await, "round {round}: the guest was reset while it wrote");
        assert_eq!(guest.reply().await.status, 413, "round {round}");
    }
    // Our own refusals, too.
    for round in 0..100 {
        let mut guest = door.guest().await;
        guest.send(upload_head(&format!("Content-Length: {}", body.len())).replace(JOB_TOKEN, "glcbt-wrong")).await;
        assert!(guest.try_send(&body).await, "round {round}: the guest was reset while it wrote");
        assert_eq!(guest.reply().await.status, 401, "round {round}");
    }
}

/// T5, T8: the head that GitLab gets, field by field, whatever the guest's was.
#[tokio::test]
async fn gitlab_gets_the_head_that_is_ours() {
    let server = Server::answering(|_| answer(201, "", "201")).await;
    let door = open(&server).await;
    let hostile = "\r\nX-Request-Id: 0123456789abcdef\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nAuthorization: Bearer x\r\nCookie: x\r\nJob_Token: x\r\nDeploy-Token: x\r\nX-Forwarded-For: 1.2.3.4\r\nConnection: keep-alive, X-Request-Id\r\nTE: trailers\r\nTrailer: Job-Token\r\nExpect: 100-continue\r\nX-Gitlab-Workhorse: x\r\n\r\n";
    let mut guest = door.guest().await;
    guest.send(upload_head("Transfer-Encoding: chunked").replace("\r\n\r\n", hostile)).await;
    guest.send("3\r\nabc\r\n0\r\nJob-Token: x\r\n\r\n").await;
    // `Expect` was there, so the body was asked for.
    assert_eq!(guest.line().await.unwrap(), "HTTP/1.1 100 Continue");
    assert_eq!(guest.line().await.unwrap(), "");
    assert_eq!(guest.reply().await.status, 201);
    let got = server.request();
    assert_eq!(
        (got.line.as_str(), got.text(), got.whole),
        ("POST /api/v4/jobs/42/artifacts?artifact_type=archive HTTP/1.1", "abc", true)
    );
    let names: Vec<_> = got.headers.iter().map(|(name, _)| name.as_str()).collect();
    let allowed = [
        "job-token",
        "content-type",
        "accept",
        "x-request-id",
        "user-agent",
        "host",
        "transfer-encoding",
        "connection",
    ];
    assert!(names.iter().all(|name| allowed.contains(name)), "{names:?}");
    assert_eq!(got.all("job-token"), [JOB_TOKEN]);
    assert_eq!(got.all("x-request-id"), ["0123456789abcdef"]);
    assert_eq!(got.all("content-type"), ["multipart/form-data; boundary=x"]);
    assert!(!got.all("user-agent")[0].is_empty() && !got.all("user-agent")[0].contains("gitlab-runner"));
}

/// R15: a guest that vanishes in mid-upload: GitLab sees a body without an end, never a whole one.
#[tokio::test]
async fn gitlab_never_sees_the_end_of_a_body_that_was_cut() {
    for how in ["close", "reset", "broken chunk"] {
        let ended = Arc::new(Mutex::new(None));
        let noted = Arc::clone(&ended);
        let server = Server::raw(move |stream, _, _| {
            let noted = Arc::clone(&noted);
            Box::pin(async move {
                let mut wire = Wire::new(stream);
                let Some(mut request) = wire.head().await else { return };
                wire.body(&mut request).await;
                *noted.lock().unwrap() = Some((request.whole, request.body.len()));
            })
        })
        .await;
        let door = open(&server).await;
        let super::support::Entrance::Tcp(address) = door.entrance else { unreachable!() };
        let stream = TcpStream::connect(address).await.unwrap();
        if how == "reset" {
            stream.set_zero_linger().unwrap();
        }
        let mut guest = super::support::Guest::new(stream);
        guest.greet(&door.pass, b"").await;
        guest.send(upload_head("Transfer-Encoding: chunked")).await;
        guest.send("3\r\nabc\r\n").await;
        until(|| door.metrics.guest().artifact_up_bytes.get() == 3).await;
        if how == "broken chunk" {
            guest.send("0x\r\n\r\n").await;
        } else {
            drop(guest);
        }
        until(|| ended.lock().unwrap().is_some()).await;
        assert_eq!(*ended.lock().unwrap(), Some((false, 3)), "{how}");
    }
}

/// R14: GitLab resets in mid-upload: an error for the guest, which then tries the whole again.
#[tokio::test]
async fn a_reset_of_gitlab_in_mid_upload_is_an_error_for_the_guest() {
    let server = Server::raw(|stream, number, _| {
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            let Some(mut request) = wire.head().await else { return };
            if number == 1 {
                let _ = wire.stream.read(&mut [0; 1000]).await;
                wire.stream.set_zero_linger().unwrap();
                return;
            }
            wire.body(&mut request).await;
            let Reply::Keep(bytes) = answer(201, "", "201") else { unreachable!() };
            wire.stream.write_all(&bytes).await.unwrap();
        })
    })
    .await;
    let door = open(&server).await;
    let body = vec![b'x'; 512 * 1024];
    for expected in [502, 201] {
        let mut guest = door.guest().await;
        guest.send(upload_head(&format!("Content-Length: {}", body.len()))).await;
        guest.try_send(&body).await;
        assert_eq!(guest.reply().await.status, expected);
    }
}

/// R18: GitLab reads slowly: the guest is held back, and nothing piles up in between.
#[tokio::test]
async fn a_slow_gitlab_holds_the_guest_back() {
    let taken = Arc::new(AtomicU64::new(0));
    let (go, gone) = tokio::sync::watch::channel(false);
    let counted = Arc::clone(&taken);
    let server = Server::raw(move |stream, _, _| {
        let (counted, mut gone) = (Arc::clone(&counted), gone.clone());
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            let Some(mut request) = wire.head().await else { return };
            gone.wait_for(|gone| *gone).await.unwrap();
            wire.body(&mut request).await;
            counted.store(request.body.len() as u64, Ordering::SeqCst);
            let Reply::Keep(bytes) = answer(201, "", "201") else { unreachable!() };
            wire.stream.write_all(&bytes).await.unwrap();
        })
    })
    .await;
    let door = open(&server).await;
    let mut guest = door.guest().await;
    const ALL: usize = 64 * 1024 * 1024;
    guest.send(upload_head(&format!("Content-Length: {ALL}"))).await;
    let (mut sending, mut reading) = guest.split();
    let sent = Arc::new(AtomicU64::new(0));
    let sender = async {
        let piece = vec![b'x'; 64 * 1024];
        for _ in 0..ALL / piece.len() {
            sending.write_all(&piece).await.unwrap();
            sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
        }
    };
    let watcher = async {
        // It has stopped once nothing moved for a while: then all that is sent sits in sockets.
        let mut before = u64::MAX;
        while sent.load(Ordering::SeqCst) != before {
            before = sent.load(Ordering::SeqCst);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        assert!(before < 24 * 1024 * 1024, "{before} bytes were taken from the guest");
        let passed = door.metrics.guest().artifact_up_bytes.get();
        assert!(before - passed < 16 * 1024 * 1024, "{before} {passed}");
        go.send_replace(true);
        reading.reply().await.status
    };
    let (status, ()) = timeout(LIMIT, async { tokio::join!(watcher, sender) }).await.unwrap();
    assert_eq!((status, taken.load(Ordering::SeqCst)), (201, ALL as u64));
}

/// R19: sixteen ranges at once, and the trace goes on beside them.
#[tokio::test]
async fn sixteen_downloads_leave_room_for_the_trace() {
    const PIECE: u64 = 256 * 1024;
    let server = Server::answering(|request| {
        let range = request.all("range")[0].strip_prefix("bytes=").unwrap().to_owned();
        let first: u64 = range.split_once('-').unwrap().0.parse().unwrap();
        let byte = u8::try_from(first / PIECE).unwrap();
        answer(206, &format!("Content-Range: bytes {range}/4194304\r\n"), vec![byte; usize::try_from(PIECE).unwrap()])
    })
    .await;
    let door = open(&server).await;
    let mut downloads = Vec::new();
    for n in 0..16 {
        let mut guest = door.guest().await;
        let range = format!("bytes={}-{}", n * PIECE, (n + 1) * PIECE - 1);
        guest.send(request("GET", ARTIFACTS, &[("Job-Token", JOB_TOKEN), ("Range", &range)], "")).await;
        downloads.push(guest);
    }
    // None of the downloads is read yet.
    let mut trace = door.guest().await;
    for offset in 0..20 {
        trace.send(patch(offset, b"x")).await;
        assert_eq!(trace.reply().await.status, 202);
    }
    for (n, mut guest) in downloads.into_iter().enumerate() {
        let reply = guest.reply().await;
        let byte = u8::try_from(n).unwrap();
        assert_eq!((reply.status, reply.whole), (206, true));
        assert!(reply.body.len() == 256 * 1024 && reply.body.iter().all(|b| *b == byte), "{n}");
    }
}

/// P7: a half-close or a reset in mid-request leaves no connection behind.
#[tokio::test]
async fn guests_that_break_off_leave_nothing_behind() {
    let server = Server::answering(|_| answer(201, "", "201")).await;
    let door = open(&server).await;
    let super::support::Entrance::Tcp(address) = door.entrance else { unreachable!() };
    let whole = poll("x");
    for n in 0..150 {
        let stream = TcpStream::connect(address).await.unwrap();
        if n % 2 == 0 {
            stream.set_zero_linger().unwrap();
        }
        let mut guest = super::support::Guest::new(stream);
        guest.greet(&door.pass, &whole[..(n * 7) % whole.len()]).await;
        guest.0.finish().await.unwrap();
        drop(guest);
    }
    // 150 connections were here, and 64 may be: all are gone, or this one finds no place.
    until(|| sockets_to(address.port()) == 0).await;
    let mut guest = door.guest().await;
    guest.send(request("GET", "/", &[], "")).await;
    assert_eq!(guest.reply().await.status, 404);
    assert_eq!(door.metrics.guest().connections_closed.get("too_many"), 0);
}
