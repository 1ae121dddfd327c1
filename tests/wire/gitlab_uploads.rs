//! Uploads to GitLab: early answers, cut bodies, resets, back-pressure; and no socket left behind.

use crate::gitlab_server::{Reply, Server, Wire, every_text, job, open, plain, sockets_to, soon, until};
use bytes::Bytes;
use dayfly::gitlab::transport::BodyError;
use dayfly::gitlab::{Body, Endpoint, Forward, ForwardRoute, GitlabError, JobUpdate, RealLimits};
use http::HeaderMap;
use http_body_util::BodyExt as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;

pub(crate) type Piece = Result<Bytes, BodyError>;

/// A body that a test feeds, piece by piece; when its other end is dropped it breaks off.
struct Fed(mpsc::Receiver<Piece>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, BodyError>>> {
        self.0
            .poll_recv(context)
            .map(|piece| Some(piece.unwrap_or_else(|| Err("cut by the guest".into())).map(http_body::Frame::data)))
    }
}

pub(crate) fn fed() -> (mpsc::Sender<Piece>, Body) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, Fed(receiver).boxed_unsync())
}

fn upload(body: Body) -> Forward {
    Forward { route: ForwardRoute::UploadArtifacts, query: Vec::new(), headers: HeaderMap::new(), body }
}

pub(crate) fn piece(bytes: usize) -> Piece {
    Ok(Bytes::from(vec![7; bytes]))
}

/// What an upload meets that GitLab refuses before its body has come.
#[derive(Clone, Copy, Debug)]
enum Early {
    /// The rest is read and thrown away, as nginx does for a while.
    Drains,
    /// Nothing more is read, and the connection stays open.
    Ignores,
}

async fn early(status: u16, early: Early) -> Server {
    Server::raw(move |stream, _, _| {
        Box::pin(async move {
            let mut wire = Wire::new(stream);
            if wire.head().await.is_none() {
                return;
            }
            let text = format!("HTTP/1.1 {status} X\r\nContent-Length: 8\r\n\r\nrefused!");
            wire.stream.write_all(text.as_bytes()).await.unwrap();
            match early {
                Early::Drains => {
                    let mut buffer = vec![0; 0x10000];
                    while matches!(wire.stream.read(&mut buffer).await, Ok(n) if n > 0) {}
                }
                Early::Ignores => std::future::pending().await,
            }
        })
    })
    .await
}

/// R16: an early 413 or 403 reaches us as it is, 100 times of 100, while the guest still sends,
/// and no socket is left, though neither side closes the connection.
#[tokio::test]
async fn early_answers_are_seen_and_leave_no_socket() {
    for (status, how) in [(413, Early::Drains), (403, Early::Drains), (413, Early::Ignores)] {
        let server = early(status, how).await;
        let client = job(plain(&server.url()));
        let mut guests = Vec::new();
        for round in 0..100 {
            let (guest, body) = fed();
            guest.try_send(piece(1000)).unwrap();
            let answered = soon(client.forward(upload(body), None))
                .await
                .unwrap_or_else(|error| panic!("round {round}: {}", every_text(&error)));
            assert_eq!(answered.status().as_u16(), status, "round {round}");
            assert_eq!(
                soon(answered.into_body().collect()).await.unwrap().to_bytes().as_ref(),
                b"refused!",
                "round {round}"
            );
            // The guest has not noticed yet, and holds on.
            guests.push(guest);
        }
        until(|| sockets_to(server.address.port()) == 0).await;
        // All that is ours has ended: the guests' bodies were dropped.
        for guest in guests {
            soon(guest.closed()).await;
        }
        assert_eq!(server.connections(), 100);
    }
}

/// R16: the same with a guest that never stops sending, so that the answer overtakes the body.
#[tokio::test]
async fn early_answers_are_seen_by_busy_uploads() {
    let server = early(413, Early::Drains).await;
    let client = job(plain(&server.url()));
    for round in 0..100 {
        let (guest, body) = fed();
        let sending = async { while guest.send(piece(0x4000)).await.is_ok() {} };
        let answering = async {
            let answered = client
                .forward(upload(body), None)
                .await
                .unwrap_or_else(|error| panic!("round {round}: {}", every_text(&error)));
            let status = answered.status().as_u16();
            (status, answered.into_body().collect().await.unwrap().to_bytes())
        };
        let ((status, text), ()) = soon(async { tokio::join!(answering, sending) }).await;
        assert_eq!((status, text.as_ref()), (413, &b"refused!"[..]), "round {round}");
    }
    until(|| sockets_to(server.address.port()) == 0).await;
}

/// R16: a GitLab that answers early, then neither reads nor closes, keeps no socket of ours, though
/// what we have sent is stuck in it.
#[tokio::test]
async fn an_early_answer_on_a_full_connection_leaves_no_socket() {
    let server = early(413, Early::Ignores).await;
    let client = job(plain(&server.url()));
    let (guest, body) = fed();
    let sent = AtomicU64::new(0);
    let sending = async {
        // More than any socket buffer takes; ends when the body is dropped.
        while guest.send(piece(0x10_0000)).await.is_ok() {
            sent.fetch_add(1, Ordering::SeqCst);
        }
    };
    let answering = async {
        let answered = client.forward(upload(body), None).await.unwrap();
        // Taken only when nothing more goes out: one piece in hyper's hands, one in the channel.
        let mut last = (0, Instant::now());
        until(|| {
            let now = sent.load(Ordering::SeqCst);
            if now != last.0 {
                last = (now, Instant::now());
            }
            now > 0 && last.1.elapsed() > Duration::from_millis(200)
        })
        .await;
        answered.into_body().collect().await.unwrap();
    };
    soon(async { tokio::join!(answering, sending) }).await;
    until(|| sockets_to(server.address.port()) == 0).await;
}

/// R18: a GitLab that takes nothing for the limit of a write stall, and says nothing, is cut off.
#[tokio::test]
async fn an_upload_that_gitlab_does_not_take_is_cut() {
    let server = Server::answering_heads_only().await;
    let limits = RealLimits { write_stall: Duration::from_secs(1), ..RealLimits::default() };
    let endpoint = Endpoint { url: server.url(), tls_ca_file: None, tls_client: None, allow_insecure_http: true };
    let client = job(open(limits, &endpoint));
    let (guest, body) = fed();
    let sending = async { while guest.send(piece(0x10_0000)).await.is_ok() {} };
    let (answered, ()) = soon(async { tokio::join!(client.forward(upload(body), None), sending) }).await;
    let error = answered.map(|_| ()).unwrap_err();
    assert!(every_text(&error).contains("timed out"), "{}", every_text(&error));
    until(|| sockets_to(server.address.port()) == 0).await;
}

/// R15: a body that the guest cuts is cut at GitLab too, and never ended as if it were whole.
#[tokio::test]
async fn a_cut_body_is_never_ended_properly() {
    for pieces in 1..4 {
        // All bytes of the connection, and whether it has ended.
        let bytes = Arc::new(Mutex::new((Vec::new(), false)));
        let kept = Arc::clone(&bytes);
        let server = Server::raw(move |mut stream, _, _| {
            let kept = Arc::clone(&kept);
            Box::pin(async move {
                let mut buffer = vec![0; 0x10000];
                while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                    kept.lock().unwrap().0.extend_from_slice(&buffer[..n]);
                }
                kept.lock().unwrap().1 = true;
            })
        })
        .await;
        let (guest, body) = fed();
        let sending = async {
            for _ in 0..pieces {
                guest.send(piece(5000)).await.unwrap();
            }
            until(|| bytes.lock().unwrap().0.len() > pieces * 5000).await;
            drop(guest);
        };
        let client = job(plain(&server.url()));
        let (answered, ()) = soon(async { tokio::join!(client.forward(upload(body), None), sending) }).await;
        assert!(matches!(answered, Err(GitlabError::Unavailable { status: None, .. })));
        until(|| bytes.lock().unwrap().1).await;
        let (sent, _) = bytes.lock().unwrap().clone();
        assert!(String::from_utf8_lossy(&sent).to_ascii_lowercase().contains("transfer-encoding: chunked"));
        // Each piece is a chunk: size, 5000 bytes, line break. A proper end would be `0` and two breaks.
        assert!(sent.ends_with(&[[7; 8].as_slice(), b"\r\n"].concat()), "{:?}", &sent[sent.len() - 20..]);
    }
}

/// R15: a job that gives its call up takes the connection with it.
#[tokio::test]
async fn a_dropped_call_closes_its_connection() {
    let server = Server::answering(|_| Reply::Hang(Vec::new())).await;
    let client = job(plain(&server.url()));
    let update = JobUpdate { verdict: None, trace: None };
    {
        let mut waiting = std::pin::pin!(client.update_job(&update));
        let asked = async { until(|| server.requests().len() == 1).await };
        tokio::select! { biased; _ = &mut waiting => panic!("no answer was sent"), () = asked => {} }
    }
    until(|| sockets_to(server.address.port()) == 0).await;
}

/// R14: an upload that GitLab resets at some byte ends in an error, and the guest's body with it.
#[tokio::test]
async fn an_upload_reset_by_gitlab_ends_at_once() {
    for bytes in [0_usize, 1, 100_000] {
        let server = Server::raw(move |stream, _, _| {
            Box::pin(async move {
                let mut wire = Wire::new(stream);
                wire.head().await.unwrap();
                let mut buffer = vec![0; bytes];
                wire.stream.read_exact(&mut buffer).await.unwrap();
                wire.stream.set_zero_linger().unwrap();
            })
        })
        .await;
        let (guest, body) = fed();
        let client = job(plain(&server.url()));
        let sending = async { while guest.send(piece(0x4000)).await.is_ok() {} };
        let (answered, ()) = soon(async { tokio::join!(client.forward(upload(body), None), sending) }).await;
        let error = answered.map(|_| ()).unwrap_err();
        assert!(error.is_transient(), "{bytes}: {}", every_text(&error));
    }
}

/// R18: what GitLab does not take is not read from the guest: back-pressure, no buffer.
#[tokio::test]
async fn a_slow_gitlab_slows_the_guest() {
    let server = Server::answering_heads_only().await;
    let (guest, body) = fed();
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let client = job(plain(&server.url()));
    let mut answering = std::pin::pin!(client.forward(upload(body), None));
    let mut sending = std::pin::pin!(async move {
        while guest.send(piece(0x10000)).await.is_ok() {
            counted.fetch_add(0x10000, Ordering::SeqCst);
        }
    });
    // It has come to rest when nothing was taken for 300 ms.
    let mut last = (0, Instant::now());
    let at_rest = std::future::poll_fn(|context| {
        assert!(answering.as_mut().poll(context).is_pending() && sending.as_mut().poll(context).is_pending());
        let now = sent.load(Ordering::SeqCst);
        if now != last.0 {
            last = (now, Instant::now());
        }
        context.waker().wake_by_ref();
        if now > 0 && last.1.elapsed() > Duration::from_millis(300) { Poll::Ready(()) } else { Poll::Pending }
    });
    soon(at_rest).await;
    let taken = sent.load(Ordering::SeqCst);
    assert!(taken < 16 << 20, "{taken} bytes were taken");
}
