//! A guest's artifacts: uploads, whole or cut, and what it fetches back.

use super::Guest;
use super::job::Runner;
use crate::event::GuestDoes;
use crate::kinds::Kind;
use dayfly_test_guest::http::request;
use dayfly_test_guest::job::{MULTIPART, multipart, upload_path};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// How long a slow upload's answer may take.
const SLOW: Duration = Duration::from_secs(700);

fn content(bytes: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().take(bytes).collect()
}

/// An upload of so many bytes, whole.
fn upload_of(runner: &Runner, bytes: usize) -> Vec<u8> {
    let headers = [("Content-Type", MULTIPART), ("Job-Token", runner.job.token.as_str())];
    request("POST", &upload_path(runner.job.id), &headers, multipart(&content(bytes)))
}

/// Uploads, three tries as the official runner makes them.
pub(crate) async fn upload(runner: &mut Runner, guest: &mut Guest, bytes: usize, slow: bool) {
    let request = upload_of(runner, bytes);
    for _ in 0..3 {
        guest.line.tell(GuestDoes::Transfers { uploads: Some(bytes) });
        let status = if slow {
            slowly(guest, &request).await
        } else {
            guest.line.call(&request).await.map(|reply| reply.status)
        };
        guest.line.tell(GuestDoes::Uploaded { bytes, status });
        if status.is_some_and(|status| status < 500) {
            break;
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// The same in two halves with a pause between.
async fn slowly(guest: &mut Guest, request: &[u8]) -> Option<u16> {
    let mut connection = guest.line.connect().await?;
    let (first, second) = request.split_at(request.len() / 2);
    connection.send(first).await.ok()?;
    sleep(Duration::from_secs(2)).await;
    connection.send(second).await.ok()?;
    let answer = timeout(SLOW, connection.answer()).await.ok()?.ok()??.complete().ok()?;
    guest.line.tell(GuestDoes::Reads(&answer.raw));
    Some(answer.status)
}

/// Begins an upload and dies in the middle of it.
pub(crate) async fn dies(runner: &Runner, guest: &mut Guest) {
    let request = upload_of(runner, 5000);
    guest.line.tell(GuestDoes::Transfers { uploads: None });
    if let Some(mut connection) = guest.line.connect().await {
        let _ = connection.send(&request[..request.len() / 2]).await;
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
    let path = format!("/api/v4/jobs/{}/artifacts", runner.job.id);
    let content = content(bytes);
    for (from, to) in [(0, bytes / 2), (bytes / 2, bytes)] {
        if from == to {
            continue;
        }
        let range = format!("bytes={from}-{}", to - 1);
        guest.line.tell(GuestDoes::Transfers { uploads: None });
        let headers = [("Job-Token", runner.job.token.as_str()), ("Range", range.as_str())];
        let reply = guest.line.call(&request("GET", &path, &headers, "")).await;
        // Anything else is what a fault has made of it.
        if reply.is_some_and(|reply| reply.status == 206 && reply.body != content[from..to]) {
            guest.line.tell(GuestDoes::Wrong { invariant: 9, what: "an artifact with other bytes than were uploaded" });
        }
    }
}
