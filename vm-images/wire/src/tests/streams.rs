//! Streams of a good session: beside each other, against each other, left and cut.

use super::ends::{Ends, door, download, soon, spawn, upload};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

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
