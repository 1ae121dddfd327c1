//! Streams of a good session: beside each other, against each other, left and cut.

use super::ends::{Ends, door, download, soon, spawn, upload};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::net::UnixStream;

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (host, guest) = duplex(4096);
    let ends = Ends::start(host, guest, door).await;
    let mut stream = soon(ends.opener.open()).await.unwrap();
    stream.write_all(b"Ehello").await.unwrap();
    let mut came = [0; 5];
    soon(stream.read_exact(&mut came)).await.unwrap();
    assert_eq!(&came, b"hello");
    stream.shutdown().await.unwrap();
    assert_eq!(stream.write(b"more").await.unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(soon(stream.read(&mut came)).await.unwrap(), 0);
    soon(upload(&ends.opener, 1_000_000)).await;
    soon(download(&ends.opener, 1_000_000)).await;
}

/// Both ends write as much as they can through pipes that hold next to nothing: nobody waits for the other for ever.
#[tokio::test]
async fn full_pipes_stand_still_for_nobody() {
    for bytes in [64, 1000, 20_000] {
        let (host, guest) = duplex(bytes);
        let ends = Ends::start(host, guest, door).await;
        let mut all = Vec::new();
        for _ in 0..3 {
            let opener = ends.opener.clone();
            all.push(spawn(async move { upload(&opener, 1_000_000).await }));
            let opener = ends.opener.clone();
            all.push(spawn(async move { download(&opener, 1_000_000).await }));
        }
        for one in all {
            soon(one).await.unwrap();
        }
    }
}

/// As many streams as may stand still at once, full to the brim both ways: another one moves all the same.
#[tokio::test]
async fn stalled_streams_do_not_hold_up_another() {
    let (host, guest) = duplex(256 * 1024);
    let ends = Ends::start(host, guest, door).await;
    let mut stalled = Vec::new();
    for n in 0..46 {
        let mut stream = soon(ends.opener.open()).await.unwrap();
        if n % 2 == 0 {
            stream.write_all(b"S").await.unwrap();
            let mut bytes = tokio::io::repeat(1);
            let filling = tokio::io::copy(&mut bytes, &mut stream);
            assert!(tokio::time::timeout(Duration::from_millis(20), filling).await.is_err());
        } else {
            stream.write_all(b"D").await.unwrap();
            stream.write_u64(u64::MAX).await.unwrap();
        }
        stalled.push(stream);
    }
    soon(async { tokio::join!(upload(&ends.opener, 5_000_000), download(&ends.opener, 5_000_000)) }).await;
    drop(stalled);
    soon(upload(&ends.opener, 1000)).await;
}

/// Ten thousand connections that are given up in all stages leave a running download alone, and no stream behind.
#[tokio::test]
async fn ten_thousand_given_up_connections_leave_a_download_alone() {
    let (host, guest) = UnixStream::pair().unwrap();
    let ends = Ends::start(host, guest, door).await;
    let mut running = ends.opener.open().await.unwrap();
    running.write_all(b"D").await.unwrap();
    running.write_u64(u64::MAX).await.unwrap();
    let running = spawn(async move { tokio::io::copy(&mut running, &mut tokio::io::sink()).await });
    for n in 0..10_000 / 40 {
        let mut all = Vec::new();
        for m in 0..40 {
            let mut stream = soon(ends.opener.open()).await.unwrap();
            match (n + m) % 5 {
                0 => {}
                1 => stream.write_all(b"U").await.unwrap(),
                2 => stream.write_all(b"Ehello").await.unwrap(),
                3 => {
                    stream.write_all(b"D").await.unwrap();
                    stream.write_u64(1 << 30).await.unwrap();
                }
                _ => {
                    stream.write_all(b"Ehello").await.unwrap();
                    soon(stream.read_exact(&mut [0; 5])).await.unwrap();
                }
            }
            all.push(stream);
        }
    }
    assert!(!running.is_finished() && !ends.host.is_finished() && !ends.guest.is_finished());
    soon(download(&ends.opener, 1_000_000)).await;
    running.abort();
}

/// More connections than there are places wait for one, and all get one.
#[tokio::test]
async fn streams_beyond_the_bound_wait() {
    let (host, guest) = duplex(64 * 1024);
    let ends = Ends::start(host, guest, door).await;
    let all: Vec<_> = (0..300)
        .map(|_| {
            let opener = ends.opener.clone();
            spawn(async move { upload(&opener, 10_000).await })
        })
        .collect();
    for one in all {
        soon(one).await.unwrap();
    }
    assert!(!ends.host.is_finished() && !ends.guest.is_finished());
}

/// A door that has ended its way: what it has said comes whole. One that leaves without: there is no end to mistake it for.
#[tokio::test]
async fn a_stream_is_cut_on_one_side_as_it_was_on_the_other() {
    let (host, guest) = duplex(64 * 1024);
    let ends = Ends::start(host, guest, |mut stream: crate::Stream| async move {
        let kind = stream.read_u8().await.unwrap();
        stream.write_all(b"said").await.unwrap();
        if kind == b'e' {
            stream.shutdown().await.unwrap();
        }
        // Not read to the end.
    })
    .await;
    for (kind, clean) in [(b"e", true), (b"x", false)] {
        let mut stream = soon(ends.opener.open()).await.unwrap();
        soon(stream.accepted()).await.unwrap();
        stream.write_all(kind).await.unwrap();
        let mut said = Vec::new();
        let end = soon(stream.read_to_end(&mut said)).await;
        assert_eq!(end.is_ok(), clean, "{end:?}");
        assert!(said == b"said" || !clean);
        // Sooner or later a writer learns it, too.
        soon(async { while stream.write_all(&[0; 1000]).await.is_ok() {} }).await;
    }
}

/// What is accepted was taken by the host: a session whose host is dead accepts nothing.
#[tokio::test]
async fn nothing_is_accepted_by_a_dead_host() {
    let (host, guest) = duplex(64 * 1024);
    let ends = Ends::start(host, guest, door).await;
    let mut good = ends.opener.open().await.unwrap();
    soon(good.accepted()).await.unwrap();
    // It holds the pipe and moves nothing, as the port does for a daemon that was killed.
    let (host, guest) = duplex(64 * 1024);
    let (_host, guest) = super::ends::shake(host, guest).await;
    let (opener, session) = guest.connect(&crate::Limits::default(), || {}).await.unwrap();
    let session = spawn(session.run());
    let mut dead = soon(opener.open()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), dead.accepted()).await.is_err());
    session.abort();
}
