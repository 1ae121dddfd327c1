//! How fast one VM may be, and how many connections it may hold.

use crate::support::{Egress, FarEnd, echoes, soon};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, copy, sink};
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
