//! An artifact's way to GitLab, with the tries of 19.3's uploader.

use super::{Guest, JobRun};
use dayfly_test_guest::http::request;
use dayfly_test_guest::{Answer, job};
use std::time::Duration;
use tokio::time::sleep;

impl JobRun {
    /// Uploads an artifact of this size; whether GitLab has it.
    pub(super) async fn upload(&mut self, guest: &Guest, bytes: usize) -> bool {
        let body = job::multipart(&vec![b'x'; bytes]);
        let headers = [
            ("User-Agent", "gitlab-runner 19.3.0 (19-3-stable; go1.25; linux/amd64)"),
            ("Content-Type", job::MULTIPART),
            ("Job-Token", self.job.token.as_str()),
        ];
        let request = request("POST", &job::upload_path(self.job.id), &headers, body);
        let mut status = None;
        for tries in 1.. {
            status = self.one_try(guest, &request).await;
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
    async fn one_try(&self, guest: &Guest, request: &[u8]) -> Option<u16> {
        let mut backoff = Duration::from_millis(100);
        for _ in 1..5 {
            let answer = guest.exchange(request).await?;
            if !matches!(answer.status, 408 | 429 | 500 | 502..=504 | 512..) {
                return Some(answer.status);
            }
            sleep(told(&answer).unwrap_or(backoff)).await;
            backoff *= 2;
        }
        guest.exchange(request).await.map(|answer| answer.status)
    }
}

/// The wait that an answer asks for: whole seconds, and none is none.
fn told(answer: &Answer) -> Option<Duration> {
    let seconds = answer.header("Retry-After")?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
