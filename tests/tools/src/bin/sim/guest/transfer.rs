//! A guest's artifacts: uploads, whole or cut, and what it fetches back.

use super::Guest;
use super::job::Runner;
use super::wire::head;
use crate::event::GuestDoes;
use crate::kinds::Kind;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::time::sleep;

const BOUNDARY: &str = "------------------------0123456789abcdef";

fn multipart(bytes: usize) -> Vec<u8> {
    let mut body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend((0..bytes).map(|n| b'a' + u8::try_from(n % 26).unwrap_or(0)));
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    body
}

/// Uploads, three tries as the official runner makes them.
pub(crate) async fn upload(runner: &mut Runner, guest: &mut Guest, bytes: usize, slow: bool) {
    let body = multipart(bytes);
    let path = format!("/api/v4/jobs/{}/artifacts?artifact_format=zip&artifact_type=archive", runner.id);
    let content = format!("multipart/form-data; boundary={BOUNDARY}");
    let token = runner.token.clone();
    let headers = [("Content-Type", content.as_str()), ("Job-Token", token.as_str())];
    for _ in 0..3 {
        guest.line.tell(GuestDoes::Transfers { uploads: Some(bytes) });
        let status = if slow {
            slowly(guest, &path, &headers, &body).await
        } else {
            guest.line.call("POST", &path, &headers, &body).await.map(|reply| reply.status)
        };
        guest.line.tell(GuestDoes::Uploaded { bytes, status });
        if status.is_some_and(|status| status < 500) {
            break;
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// The same in two halves with a pause between.
async fn slowly(guest: &mut Guest, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<u16> {
    let mut stream = guest.line.connect().await?;
    stream.write_all(head("POST", path, headers, body.len()).as_bytes()).await.ok()?;
    let (first, second) = body.split_at(body.len() / 2);
    stream.write_all(first).await.ok()?;
    sleep(Duration::from_secs(2)).await;
    stream.write_all(second).await.ok()?;
    let read = tokio::time::timeout(Duration::from_secs(700), super::wire::read_reply(&mut stream)).await;
    let (reply, raw) = read.ok()??;
    guest.line.tell(GuestDoes::Reads(&raw));
    Some(reply.status)
}

/// Begins an upload and dies in the middle of it.
pub(crate) async fn dies(runner: &Runner, guest: &mut Guest) {
    let body = multipart(5000);
    let path = format!("/api/v4/jobs/{}/artifacts?artifact_format=zip&artifact_type=archive", runner.id);
    let content = format!("multipart/form-data; boundary={BOUNDARY}");
    let headers = [("Content-Type", content.as_str()), ("Job-Token", runner.token.as_str())];
    guest.line.tell(GuestDoes::Transfers { uploads: None });
    if let Some(mut stream) = guest.line.connect().await {
        let half = &body[..body.len() / 2];
        let _ = stream.write_all(head("POST", &path, &headers, body.len()).as_bytes()).await;
        let _ = stream.write_all(half).await;
        sleep(Duration::from_millis(300)).await;
    }
    guest.line.story.hit(Kind::UploadVmDies);
    guest.machine.power.crash();
    std::future::pending::<()>().await;
}

/// Fetches what it has uploaded, in two parts, and compares.
pub(crate) async fn download(runner: &Runner, guest: &mut Guest) {
    let Some(bytes) =
        guest.line.story.inner().ledger.jobs.get(&guest.line.job).and_then(|n| n.uploaded.last().copied())
    else {
        return;
    };
    guest.line.story.hit(Kind::DownloadRange);
    let path = format!("/api/v4/jobs/{}/artifacts", runner.id);
    let whole = multipart(bytes);
    let begin = whole.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(0) + 4;
    let content = &whole[begin..begin + bytes];
    for (from, to) in [(0, bytes / 2), (bytes / 2, bytes)] {
        if from == to {
            continue;
        }
        let range = format!("bytes={from}-{}", to - 1);
        guest.line.tell(GuestDoes::Transfers { uploads: None });
        let headers = [("Job-Token", runner.token.as_str()), ("Range", range.as_str())];
        let reply = guest.line.call("GET", &path, &headers, b"").await;
        // Anything else is what a fault has made of it.
        if reply.is_some_and(|reply| reply.status == 206 && reply.body != content[from..to]) {
            guest.line.tell(GuestDoes::Wrong { invariant: 9, what: "an artifact with other bytes than were uploaded" });
        }
    }
}
