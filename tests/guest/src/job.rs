//! The runner's calls, as gitlab-runner 19.3 makes them, and what it makes of the answers.

use crate::http::{self, Answer};
use serde_json::{Value, json};
use std::time::Duration;

/// Bytes of one PATCH at most.
pub const PIECE_BYTES: usize = 1 << 20;

/// Bytes of one chunk of an upload, which Go's `io.Copy` makes.
pub const CHUNK_BYTES: usize = 32 << 10;

const BOUNDARY: &str = "------------------------0123456789abcdef";

/// What an upload of [`multipart`] says of its body.
pub const MULTIPART: &str = "multipart/form-data; boundary=------------------------0123456789abcdef";

/// `jobs/request`.
#[must_use]
pub fn ask(token: &str) -> Vec<u8> {
    let info = json!({"name": "gitlab-runner", "version": "19.3.0", "features": {"cancel_gracefully": true}});
    let body = json!({"info": info, "token": token, "system_id": "s_0123456789ab"}).to_string();
    let headers = [("Content-Type", "application/json"), ("Runner-Token", token)];
    http::request("POST", "/api/v4/jobs/request", &headers, body)
}

/// A PUT of this body.
#[must_use]
pub fn update(job: u64, token: &str, body: &str) -> Vec<u8> {
    let headers = [("Content-Type", "application/json"), ("Job-Token", token)];
    http::request("PUT", &format!("/api/v4/jobs/{job}"), &headers, body)
}

/// A PATCH of these bytes under this `Content-Range`, which may be a lie.
#[must_use]
pub fn patch_as(job: u64, token: &str, range: &str, bytes: &[u8], debug: bool) -> Vec<u8> {
    let headers = [("Content-Range", range), ("Content-Type", "text/plain"), ("Job-Token", token)];
    http::request("PATCH", &format!("/api/v4/jobs/{job}/trace?debug_trace={debug}"), &headers, bytes)
}

/// The `Content-Range` of so many bytes at this offset.
#[must_use]
pub fn range(at: usize, bytes: usize) -> String {
    format!("{at}-{}", (at + bytes).saturating_sub(1))
}

/// A PATCH of these bytes at this offset.
#[must_use]
pub fn patch(job: u64, token: &str, at: usize, bytes: &[u8]) -> Vec<u8> {
    patch_as(job, token, &range(at, bytes.len()), bytes, false)
}

/// Where a job's artifacts go.
#[must_use]
pub fn upload_path(job: u64) -> String {
    format!("/api/v4/jobs/{job}/artifacts?artifact_format=zip&artifact_type=archive")
}

/// An upload's body with this content; its type is [`MULTIPART`].
#[must_use]
pub fn multipart(content: &[u8]) -> Vec<u8> {
    let mut body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"artifacts.zip\"\r\nContent-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(content);
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    body
}

/// The size of the trace that an answer to a PATCH names.
#[must_use]
pub fn size(answer: &Answer) -> Option<usize> {
    answer.header("range")?.split_once('-')?.1.parse().ok()
}

/// What GitLab, through the door, said last about the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Go on.
    Running,
    /// Come to an end.
    Canceling,
    /// There is nothing more to say.
    Over,
}

/// A job as its runner knows it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Its token.
    pub token: String,
    /// All that it has printed.
    pub trace: Vec<u8>,
    /// How much of that the door has taken.
    pub sent: usize,
    /// What was said last.
    pub word: Word,
    /// Between two pieces of trace.
    pub interval: Duration,
}

impl Job {
    /// The job of a payload; `None`: it names none.
    #[must_use]
    pub fn new(payload: &Value) -> Option<Self> {
        Some(Self {
            id: payload["id"].as_u64()?,
            token: payload["token"].as_str()?.to_owned(),
            trace: Vec::new(),
            sent: 0,
            word: Word::Running,
            interval: Duration::from_secs(3),
        })
    }

    /// A PUT of this body, the token added.
    #[must_use]
    pub fn update(&self, mut body: Value) -> Vec<u8> {
        body["token"] = self.token.clone().into();
        update(self.id, &self.token, &body.to_string())
    }

    /// What says that it runs.
    #[must_use]
    pub fn begin(&self) -> Vec<u8> {
        self.update(json!({"state": "running", "output": {}}))
    }

    /// The next piece of trace; `None`: all is there.
    #[must_use]
    pub fn piece(&self) -> Option<Vec<u8>> {
        let end = self.trace.len().min(self.sent + PIECE_BYTES);
        (end > self.sent).then(|| patch(self.id, &self.token, self.sent, &self.trace[self.sent..end]))
    }

    /// Believes the answer to [`Job::piece`]: whether it was taken. A size beyond the trace is believed as well: that
    /// is the caller's to judge.
    pub fn patched(&mut self, answer: &Answer) -> bool {
        match answer.status {
            202 => self.sent = self.trace.len().min(self.sent + PIECE_BYTES),
            416 => self.sent = size(answer).unwrap_or(0),
            _ => {}
        }
        answer.status == 202
    }

    /// What any answer for the job says of it.
    pub fn heard(&mut self, answer: &Answer) {
        if let Some(seconds) = answer.header("x-gitlab-trace-update-interval").and_then(|s| s.parse().ok()) {
            self.interval = Duration::from_secs(seconds);
        }
        self.word = match (answer.status, answer.header("job-status")) {
            (403, _) | (_, Some("canceled" | "failed")) => Word::Over,
            (_, Some("canceling")) if self.word == Word::Running => Word::Canceling,
            _ => self.word,
        };
    }

    /// The body of its last PUT.
    #[must_use]
    pub fn verdict(&self, state: &str, reason: Option<&str>, code: i64) -> Value {
        let checksum = format!("crc32:{:08x}", crc32fast::hash(&self.trace));
        let output = json!({"checksum": checksum, "bytesize": self.trace.len()});
        let mut body = json!({"state": state, "checksum": checksum, "output": output});
        if let Some(reason) = reason {
            body["failure_reason"] = reason.into();
        }
        if code != 0 {
            body["exit_code"] = code.into();
        }
        body
    }
}
