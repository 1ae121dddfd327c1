//! Many large artifacts at once, up to a slow GitLab and down from a quick one.

use super::scales::{Growth, Neighbour, alone, assert_not_starved, open_files, run, sized, until_files_are};
use super::server::{Pattern, Server};
use crate::door::support::{DEPENDENCY, DEPENDENCY_TOKEN, Door, Guest, JOB, JOB_TOKEN, Setup};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

const MIB: u64 = 1 << 20;

async fn open(server: &Server) -> Arc<Door> {
    Arc::new(Setup { tcp: true, transport: Some(server.transport()), ..Setup::default() }.open().await)
}

/// Uploads so many chunks of 32 KiB, as the official runner cuts them.
async fn upload(mut guest: Guest, chunks: u64, chunk: Arc<Vec<u8>>) -> u16 {
    let head = format!(
        "POST /api/v4/jobs/{JOB}/artifacts HTTP/1.1\r\nHost: 192.0.2.1\r\nTransfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=x\r\nJob-Token: {JOB_TOKEN}\r\n\r\n"
    );
    guest.send(head).await;
    for _ in 0..chunks {
        guest.send(chunk.as_slice()).await;
    }
    guest.send("0\r\n\r\n").await;
    guest.reply().await.status
}

fn sum(content: &[u8], chunks: u64) -> (u64, u32) {
    let mut crc = crc32fast::Hasher::new();
    (0..chunks).for_each(|_| crc.update(content));
    (chunks * content.len() as u64, crc.finalize())
}

/// R18: eight artifacts of 1 GiB at once to a GitLab that takes them slowly: memory grows by no more
/// than 1 MiB for each, and every byte arrives.
#[test]
fn eight_uploads_to_a_slow_gitlab_take_no_memory() {
    if !alone("loads::transfers::eight_uploads_to_a_slow_gitlab_take_no_memory") {
        return;
    }
    run(async {
        const UPLOADS: usize = 8;
        // 32 KiB each 4 ms: 8 MB/s for each upload.
        let server = Server::new(Duration::from_millis(4)).await;
        let door = open(&server).await;
        let (chunks, pattern) = (sized(16, 1024) * MIB / 0x8000, Pattern::new());
        let content = pattern.at(0, 0x8000);
        let chunk = Arc::new([b"8000\r\n", content, b"\r\n"].concat());
        // One before, so that only what depends on size and number counts.
        assert_eq!(upload(door.guest().await, 8, Arc::clone(&chunk)).await, 201);
        server.uploads.lock().unwrap().clear();
        let growth = Growth::begin();
        let mut uploads = JoinSet::new();
        for _ in 0..UPLOADS {
            uploads.spawn(upload(door.guest().await, chunks, Arc::clone(&chunk)));
        }
        assert_eq!(uploads.join_all().await, [201; UPLOADS]);
        let grown = growth.mib();
        println!("figure load.uploads_mib {grown:.2} MiB");
        assert_eq!(*server.uploads.lock().unwrap(), [sum(content, chunks); UPLOADS]);
        assert!(grown <= 8.0, "{grown} MiB");
    });
}

/// Downloads a range of a dependency's artifacts; every byte is the one of its place.
async fn download(mut guest: Guest, from: u64, bytes: u64, pattern: Arc<Pattern>) {
    let head = format!(
        "GET /api/v4/jobs/{DEPENDENCY}/artifacts?direct_download=true HTTP/1.1\r\nHost: 192.0.2.1\r\nRange: bytes={from}-{}\r\nJob-Token: {DEPENDENCY_TOKEN}\r\n\r\n",
        from + bytes - 1
    );
    guest.send(head).await;
    assert_eq!(guest.line().await.as_deref(), Some("HTTP/1.1 206 Partial Content"));
    let mut length = None;
    while let Some(header) = guest.line().await.filter(|line| !line.is_empty()) {
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = value.parse().ok();
        }
    }
    assert_eq!(length, Some(bytes));
    let mut at = from;
    while at < from + bytes {
        let piece = guest.0.some().await.unwrap();
        assert!(!piece.is_empty(), "it broke off at {at}");
        assert!(piece == *pattern.at(at, piece.len()), "{} bytes at {at}", piece.len());
        at += piece.len() as u64;
    }
    assert_eq!(at, from + bytes);
}

/// R19: sixteen ranges of a dependency's artifacts at once: the right bytes, bounded memory, and
/// another VM's trace goes on as before.
#[test]
fn sixteen_downloads_at_once_starve_nobody() {
    if !alone("loads::transfers::sixteen_downloads_at_once_starve_nobody") {
        return;
    }
    run(async {
        const DOWNLOADS: u64 = 16;
        let server = Server::new(Duration::ZERO).await;
        let door = open(&server).await;
        let neighbour = Neighbour::new().await;
        let bytes = sized(2, 64) * MIB + 4321;
        let pattern = Arc::new(Pattern::new());
        download(door.guest().await, 5, 100, Arc::clone(&pattern)).await;
        let (files, growth) = (open_files(), Growth::begin());
        let load = async {
            let mut downloads = JoinSet::new();
            for n in 0..DOWNLOADS {
                downloads.spawn(download(door.guest().await, n * bytes, bytes, Arc::clone(&pattern)));
            }
            while let Some(ended) = downloads.join_next().await {
                ended.unwrap();
            }
        };
        let (neighbour, beside, ()) = neighbour.p99_beside(load).await;
        let grown = growth.mib();
        println!("figure load.downloads_mib {grown:.2} MiB");
        assert!(grown <= 50.0, "{grown} MiB");
        assert_not_starved(beside);
        neighbour.assert_whole().await;
        until_files_are(files).await;
    });
}
