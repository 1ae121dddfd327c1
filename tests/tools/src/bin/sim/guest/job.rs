//! A guest's runner at work on one job, speaking as the official one does.

use super::wire::{Line, Reply};
use super::{Guest, hostile, transfer};
use crate::event::GuestDoes;
use crate::kinds::Kind;
use crate::plan::{After, Step};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Tries of the final report (`job_status_final_update_retry_limit`).
const FINAL_TRIES: u32 = 20;

/// Bytes of one PATCH.
const PIECE: usize = 1024 * 1024;

/// What GitLab, through the door, said last about the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Running,
    Canceling,
    Over,
}

/// One job in a guest.
pub(crate) struct Runner {
    pub(crate) id: u64,
    pub(crate) token: String,
    pub(crate) trace: Vec<u8>,
    pub(crate) sent: usize,
    timeout: Duration,
    interval: Duration,
    next_tick: Instant,
    word: Word,
    deaf: bool,
    began: Instant,
}

enum End {
    Script,
    Aborted,
    Canceled,
}

impl Runner {
    pub(crate) fn new(payload: &[u8], guest: &Guest) -> Self {
        let payload: Value = serde_json::from_slice(payload).unwrap_or_default();
        Self {
            id: payload["id"].as_u64().unwrap_or(0),
            token: payload["token"].as_str().unwrap_or_default().to_owned(),
            trace: Vec::new(),
            sent: 0,
            timeout: Duration::from_secs(payload["runner_info"]["timeout"].as_u64().unwrap_or(7200)),
            interval: Duration::from_secs(3),
            next_tick: Instant::now() + Duration::from_secs(3),
            word: Word::Running,
            deaf: guest.script.deaf,
            began: Instant::now(),
        }
    }

    pub(crate) async fn run(&mut self, guest: &mut Guest) {
        self.put(&mut guest.line, json!({"state": "running", "output": {}})).await;
        if self.word == Word::Over {
            return;
        }
        guest.line.tell(GuestDoes::Works);
        let script = Arc::clone(&guest.script);
        let limit = if self.deaf { Duration::from_secs(1_000_000) } else { self.timeout };
        let ended = timeout(limit, self.steps(guest, &script.steps)).await;
        let (state, reason, code) = match ended {
            Err(_) => ("failed", Some("job_execution_timeout"), 0),
            Ok(End::Script) if script.exit_code == 0 => ("success", None, 0),
            Ok(End::Script) => ("failed", Some("script_failure"), script.exit_code),
            Ok(End::Aborted) => {
                self.patch(&mut guest.line).await;
                let verdict = self.verdict("failed", Some("unknown_failure"), 0);
                self.put(&mut guest.line, verdict).await;
                return;
            }
            Ok(End::Canceled) => {
                self.print(&guest.line, 60, true);
                sleep(Duration::from_millis(guest.line.dice.range(100, 8_000))).await;
                ("failed", Some("unknown_failure"), 0)
            }
        };
        if !self.send_all(guest).await {
            return;
        }
        if script.steps.contains(&Step::Bad(Kind::DiesBeforeFinal)) {
            guest.line.story.hit(Kind::DiesBeforeFinal);
            guest.machine.power.crash();
            std::future::pending::<()>().await;
        }
        let verdict = self.verdict(state, reason, code);
        guest.line.tell(GuestDoes::Verdict { state, reason });
        let mut taken = false;
        for _ in 0..FINAL_TRIES {
            match self.put(&mut guest.line, verdict.clone()).await {
                Some(200) => {
                    guest.line.tell(GuestDoes::VerdictTaken { state });
                    taken = true;
                    break;
                }
                Some(403 | 404) => return,
                _ => sleep(Duration::from_secs(3)).await,
            }
        }
        if let After::Bad(kind) = script.after
            && taken
        {
            hostile::after(self, guest, kind, &verdict).await;
        }
    }

    /// The rest of the trace. `false`: the job is over.
    async fn send_all(&mut self, guest: &mut Guest) -> bool {
        for _ in 0..60 {
            if self.sent == self.trace.len() {
                return true;
            }
            let before = self.sent;
            self.patch(&mut guest.line).await;
            if self.word == Word::Over {
                return false;
            }
            if self.sent == before {
                sleep(Duration::from_secs(1)).await;
            }
        }
        self.word != Word::Over
    }

    async fn steps(&mut self, guest: &mut Guest, steps: &[Step]) -> End {
        for step in steps {
            match *step {
                Step::Print(bytes, ended) => self.print(&guest.line, bytes, ended),
                Step::Work(ms) => {
                    if let Some(end) = self.work(&mut guest.line, Duration::from_millis(ms)).await {
                        return end;
                    }
                }
                Step::Upload(bytes, slow) => transfer::upload(self, guest, bytes, slow).await,
                Step::Download => transfer::download(self, guest).await,
                Step::Bad(Kind::DiesBeforeFinal) => {}
                Step::Bad(kind) => hostile::act(self, guest, kind).await,
            }
        }
        End::Script
    }

    /// Works on, sending its trace as the runner does.
    async fn work(&mut self, line: &mut Line, time: Duration) -> Option<End> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            sleep(until.min(self.next_tick) - Instant::now()).await;
            if Instant::now() >= self.next_tick {
                self.tick(line).await;
            }
            if self.deaf && self.began.elapsed() > self.timeout {
                line.story.inner().hit_once(self.id, Kind::IgnoresTimeout);
            }
            match self.word {
                Word::Running => {}
                _ if self.deaf => line.story.inner().hit_once(self.id, Kind::IgnoresCancel),
                Word::Canceling => return Some(End::Canceled),
                Word::Over => return Some(End::Aborted),
            }
        }
        None
    }

    /// Prints so many bytes; each 64 of them say whose they are and where they belong.
    pub(crate) fn print(&mut self, line: &Line, bytes: usize, ended: bool) {
        let from = self.trace.len();
        while self.trace.len() < from + bytes {
            let place = self.trace.len();
            let mut text = format!("{} at {place:08} ", self.id);
            text.extend(std::iter::repeat_n('.', 63_usize.saturating_sub(text.len())));
            text.push('\n');
            let room = from + bytes - place;
            text.truncate(room);
            self.trace.extend_from_slice(text.as_bytes());
        }
        if ended {
            self.trace.push(b'\n');
        } else if self.trace.last() == Some(&b'\n') {
            self.trace.push(b'~');
        }
        line.tell(GuestDoes::Prints(&self.trace[from..]));
    }

    async fn tick(&mut self, line: &mut Line) {
        if self.sent < self.trace.len() {
            self.patch(line).await;
        } else {
            self.put(line, json!({"state": "running"})).await;
        }
        self.next_tick = Instant::now() + self.interval;
    }

    pub(crate) async fn patch(&mut self, line: &mut Line) {
        let end = self.trace.len().min(self.sent + PIECE);
        if end == self.sent {
            return;
        }
        let piece = self.trace[self.sent..end].to_vec();
        let Some(reply) = self.patch_at(line, self.sent, &piece).await else { return };
        self.heard(line, &reply);
        match reply.status {
            202 => {
                self.sent = end;
                line.tell(GuestDoes::Taken(end));
            }
            416 => {
                let range = reply.header("Range").and_then(|r| r.split_once('-')?.1.parse().ok());
                self.sent = range.unwrap_or(0);
                if self.sent > self.trace.len() {
                    // A daemon whose record was behind takes the last lines of the one before for the guest's.
                    let anew = line.story.inner().ledger.jobs.get(&line.job).is_some_and(|note| note.begun_anew);
                    if !anew {
                        line.tell(GuestDoes::Wrong { invariant: 5, what: "a 416 beyond what the guest has sent" });
                    }
                    self.sent = self.trace.len();
                }
            }
            _ => {}
        }
    }

    /// One PATCH of these bytes at this offset.
    pub(crate) async fn patch_at(&self, line: &mut Line, at: usize, piece: &[u8]) -> Option<Reply> {
        let range = format!("{at}-{}", (at + piece.len()).saturating_sub(1));
        let path = format!("/api/v4/jobs/{}/trace?debug_trace=false", self.id);
        let headers =
            [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", self.token.as_str())];
        line.call("PATCH", &path, &headers, piece).await
    }

    pub(crate) async fn put(&mut self, line: &mut Line, mut body: Value) -> Option<u16> {
        body["token"] = self.token.clone().into();
        let path = format!("/api/v4/jobs/{}", self.id);
        let headers = [("Content-Type", "application/json"), ("Job-Token", self.token.as_str())];
        let reply = line.call("PUT", &path, &headers, body.to_string().as_bytes()).await?;
        self.heard(line, &reply);
        Some(reply.status)
    }

    pub(crate) fn verdict(&self, state: &str, reason: Option<&str>, code: i64) -> Value {
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

    fn heard(&mut self, line: &Line, reply: &Reply) {
        if reply.status < 300 {
            line.tell(GuestDoes::Spoke);
        }
        if let Some(seconds) = reply.header("X-GitLab-Trace-Update-Interval").and_then(|s| s.parse().ok()) {
            self.interval = Duration::from_secs(seconds);
        }
        let word = match (reply.status, reply.header("Job-Status")) {
            (403, _) | (_, Some("canceled" | "failed")) => Word::Over,
            (_, Some("canceling")) if self.word == Word::Running => Word::Canceling,
            _ => self.word,
        };
        if word != self.word {
            self.word = word;
            line.tell(GuestDoes::Told { over: word == Word::Over });
        }
    }
}
