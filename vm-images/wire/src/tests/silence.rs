//! Another side that is gone, or stands still, without a word: a session does not outlive it for long.

use super::ends::{Ends, LIMIT, door, shake};
use crate::{Limits, SessionError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::time::{Instant, sleep};

/// E4: a host that stands still does not answer, and is left.
#[tokio::test(start_paused = true)]
async fn a_guest_leaves_a_host_that_does_not_answer() {
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let (_opener, session) = guest.connect(&Limits::default(), || {}).await.unwrap();
    let start = Instant::now();
    assert!(matches!(session.run().await, SessionError::Silent));
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    drop(host);
}

#[tokio::test(start_paused = true)]
async fn a_host_leaves_a_guest_that_says_nothing() {
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let limits = Limits::default();
    let (host, guest) = tokio::join!(host.serve(&limits), guest.connect(&limits, || {}));
    // It holds the pipe, and does nothing with it.
    let _guest = guest.unwrap();
    let mut host = host.unwrap();
    let start = Instant::now();
    assert!(matches!(host.accept().await, Some(Err(SessionError::Silent))));
    assert!(host.accept().await.is_none() && start.elapsed() < LIMIT);
}

/// A session in which nothing happens, and one whose only stream stands still, live on; each answer is a sign of life.
#[tokio::test(start_paused = true)]
async fn a_quiet_session_and_a_stalled_stream_live_on() {
    let heard = Arc::new(AtomicU32::new(0));
    let (host, guest) = duplex(64 * 1024);
    let (host, guest) = shake(host, guest).await;
    let limits = Limits::default();
    let count = Arc::clone(&heard);
    let noting = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let (host, guest) = tokio::join!(host.serve(&limits), guest.connect(&limits, noting));
    let (opener, guest) = guest.unwrap();
    let (host, guest) = (super::ends::spawn(super::ends::serve(host.unwrap(), door)), super::ends::spawn(guest.run()));
    sleep(Duration::from_secs(3600)).await;
    let quiet = heard.load(Ordering::Relaxed);
    assert!((500..1000).contains(&quiet), "{quiet} signs of life");
    let mut stalled = opener.open().await.unwrap();
    stalled.write_all(b"S").await.unwrap();
    let mut bytes = tokio::io::repeat(1);
    let full = tokio::time::timeout(Duration::from_secs(3600), tokio::io::copy(&mut bytes, &mut stalled));
    assert!(full.await.is_err());
    assert!(!host.is_finished() && !guest.is_finished());
}

#[tokio::test]
async fn an_end_of_the_pipe_ends_a_session() {
    let (host, guest) = duplex(64 * 1024);
    let ends = Ends::start(host, guest, door).await;
    let mut stream = ends.opener.open().await.unwrap();
    stream.write_all(b"Eping").await.unwrap();
    stream.read_exact(&mut [0; 4]).await.unwrap();
    ends.host.abort();
    let ended = super::ends::soon(ends.guest).await.unwrap();
    assert!(matches!(ended.word(), "ended" | "broken"), "{ended}");
    super::ends::soon(stream.read(&mut [0])).await.unwrap_err();
    assert!(super::ends::soon(ends.opener.open()).await.is_err());
}
