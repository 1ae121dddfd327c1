//! How fast one VM may be, and how many connections it may hold.

use crate::support::{Egress, FarEnd, echoes, soon};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy, sink};
use tokio::time::{Instant, timeout};

#[tokio::test]
async fn a_rate_holds_for_both_ways_together() {
    let source = FarEnd::source().await;
    let policy = format!(r#"{{"allow":["127.0.0.1:{}"],"rate":{{"bytes_a_second":1000000}}}}"#, source.port);
    let mut egress = Egress::start(&policy, &[]).await;
    let guest = egress.guest().await;
    let to = format!("127.0.0.1:{}", source.port);
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(guest.connect(&to).await.unwrap());
    }
    let start = Instant::now();
    let all: Vec<_> = streams
        .into_iter()
        .map(|stream| crate::support::spawn(async move { copy(&mut stream.take(500_000), &mut sink()).await.unwrap() }))
        .collect();
    for one in all {
        assert_eq!(soon(one).await.unwrap(), 500_000);
    }
    // Two megabytes at one a second, less what may go at once; what was sent ahead is not taken away.
    let took = start.elapsed();
    assert!((Duration::from_millis(1400)..Duration::from_secs(10)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_a_place() {
    let far = FarEnd::echo().await;
    let policy = format!(r#"{{"allow":["127.0.0.1:{}"],"rate":{{"connections":2}}}}"#, far.port);
    let mut egress = Egress::start(&policy, &[]).await;
    let guest = egress.guest().await;
    let to = format!("127.0.0.1:{}", far.port);
    let mut first = guest.connect(&to).await.unwrap();
    let second = guest.connect(&to).await.unwrap();
    let mut third = guest.opener.open_to(&to).await.unwrap();
    assert!(timeout(Duration::from_millis(300), third.accepted()).await.is_err());
    assert_eq!(far.accepted(), 2);
    second.reset();
    soon(third.accepted()).await.unwrap();
    echoes(&mut third, b"hello").await;
    echoes(&mut first, b"hello").await;
}

/// A connection counts until its bytes are gone, though the guest has ended it: else a far end of the job's own that never
/// reads would let it hold as many as it likes.
#[tokio::test]
async fn a_connection_counts_until_its_bytes_are_gone() {
    // Says that it says no more, and reads nothing.
    let deaf = FarEnd::serve(|mut stream| async move {
        stream.shutdown().await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let echo = FarEnd::echo().await;
    let policy =
        format!(r#"{{"allow":["127.0.0.1:{}","127.0.0.1:{}"],"rate":{{"connections":1}}}}"#, deaf.port, echo.port);
    let mut egress = Egress::start(&policy, &[]).await;
    let guest = egress.guest().await;
    let mut stream = guest.connect(format!("127.0.0.1:{}", deaf.port)).await.unwrap();
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0);
    let filling = async { while stream.write_all(&[b'u'; 10_000]).await.is_ok() {} };
    assert!(timeout(Duration::from_secs(2), filling).await.is_err());
    stream.shutdown().await.unwrap();
    let to = format!("127.0.0.1:{}", echo.port);
    let mut waiting = guest.opener.open_to(&to).await.unwrap();
    assert!(timeout(Duration::from_secs(1), waiting.accepted()).await.is_err());
    drop(deaf);
}
