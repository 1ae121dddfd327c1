//! An artifact's way to GitLab, with the tries of 19.3's uploader.

use super::{Answer, Guest, JobRun};
use std::time::Duration;
use tokio::time::sleep;

impl JobRun {
    /// Uploads an artifact of this size; whether GitLab has it.
    pub(super) async fn upload(&mut self, guest: &Guest, bytes: usize) -> bool {
        let boundary = "------------------------0123456789abcdef";
        let mut body = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n").into_bytes();
        body.resize(body.len() + bytes, b'x');
        body.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
        let mut status = None;
        for tries in 1.. {
            status = self.one_try(guest, boundary, &body).await;
            let tries_max = match status {
                Some(201 | 403 | 413) => 1,
                Some(503) => 6,
                _ => 3,
            };
            if tries >= tries_max {
                break;
            }
            sleep(Duration::from_secs((1 << (tries - 1)).min(5))).await;
        }
        self.print(&format!("upload: {status:?}"));
        status == Some(201)
    }

    /// One try: up to five attempts, as long as there is an answer.
    async fn one_try(&self, guest: &Guest, boundary: &str, body: &[u8]) -> Option<u16> {
        let path = format!("/api/v4/jobs/{}/artifacts?artifact_format=zip&artifact_type=archive", self.id);
        let content = format!("multipart/form-data; boundary={boundary}");
        let headers = [
            ("User-Agent", "gitlab-runner 19.3.0 (19-3-stable; go1.25; linux/amd64)"),
            ("Content-Type", content.as_str()),
            ("Job-Token", self.token.as_str()),
        ];
        let mut backoff = Duration::from_millis(100);
        for _ in 1..5 {
            let answer = guest.call("POST", &path, &headers, body).await?;
            if !matches!(answer.status, 408 | 429 | 500 | 502..=504 | 512..) {
                return Some(answer.status);
            }
            sleep(told(&answer).unwrap_or(backoff)).await;
            backoff *= 2;
        }
        guest.call("POST", &path, &headers, body).await.map(|answer| answer.status)
    }
}

/// The wait that an answer asks for: whole seconds, and none is none.
fn told(answer: &Answer) -> Option<Duration> {
    let seconds = answer.header("Retry-After")?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
