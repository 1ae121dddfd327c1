//! A guest's runner at work on one job, speaking as the official one does.

use super::wire::Line;
use super::{Guest, Whose, cache, hostile, transfer};
use crate::event::GuestDoes;
use crate::kinds::Kind;
use crate::plan::{After, Step};
use dayfly_test_guest::{Answer, Job, Word, job};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Tries of the final report (`job_status_final_update_retry_limit`).
const FINAL_TRIES: u32 = 20;

/// One job in a guest.
pub(crate) struct Runner {
    pub(crate) job: Job,
    timeout: Duration,
    next_tick: Instant,
    deaf: bool,
    began: Instant,
    project: u64,
}

enum End {
    Script,
    Aborted,
    Canceled,
}

impl Runner {
    /// `None`: the payload names no job.
    pub(crate) fn new(payload: &[u8], guest: &Guest) -> Option<Self> {
        let payload: Value = serde_json::from_slice(payload).ok()?;
        let job = Job::new(&payload)?;
        Some(Self {
            project: payload["job_info"]["project_id"].as_u64().unwrap_or(0),
            timeout: Duration::from_secs(payload["runner_info"]["timeout"].as_u64().unwrap_or(7200)),
            next_tick: Instant::now() + job.interval,
            job,
            deaf: guest.script.deaf,
            began: Instant::now(),
        })
    }

    /// Whose a cache of this key is.
    pub(super) fn whose(&self, guest: &Guest, key: u8) -> Whose {
        Whose { project: self.project, protected: guest.script.protected, key }
    }

    pub(crate) async fn run(&mut self, guest: &mut Guest) {
        self.put(&mut guest.line, json!({"state": "running", "output": {}})).await;
        if self.job.word == Word::Over {
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
                let verdict = self.job.verdict("failed", Some("unknown_failure"), 0);
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
        let verdict = self.job.verdict(state, reason, code);
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
            if self.job.sent == self.job.trace.len() {
                return true;
            }
            let before = self.job.sent;
            self.patch(&mut guest.line).await;
            if self.job.word == Word::Over {
                return false;
            }
            if self.job.sent == before {
                sleep(Duration::from_secs(1)).await;
            }
        }
        self.job.word != Word::Over
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
                Step::Restore(key) => cache::restore(self, guest, key).await,
                Step::Save(key, bytes, cut) => cache::save(self, guest, key, bytes, cut).await,
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
                line.story.inner().hit_once(self.job.id, Kind::IgnoresTimeout);
            }
            match self.job.word {
                Word::Running => {}
                _ if self.deaf => line.story.inner().hit_once(self.job.id, Kind::IgnoresCancel),
                Word::Canceling => return Some(End::Canceled),
                Word::Over => return Some(End::Aborted),
            }
        }
        None
    }

    /// Prints so many bytes; each 64 of them say whose they are and where they belong.
    pub(crate) fn print(&mut self, line: &Line, bytes: usize, ended: bool) {
        let from = self.job.trace.len();
        while self.job.trace.len() < from + bytes {
            let place = self.job.trace.len();
            let mut text = format!("{} at {place:08} ", self.job.id);
            text.extend(std::iter::repeat_n('.', 63_usize.saturating_sub(text.len())));
            text.push('\n');
            let room = from + bytes - place;
            text.truncate(room);
            self.job.trace.extend_from_slice(text.as_bytes());
        }
        if ended {
            self.job.trace.push(b'\n');
        } else if self.job.trace.last() == Some(&b'\n') {
            self.job.trace.push(b'~');
        }
        line.tell(GuestDoes::Prints(&self.job.trace[from..]));
    }

    async fn tick(&mut self, line: &mut Line) {
        if self.job.piece().is_some() {
            self.patch(line).await;
        } else {
            self.put(line, json!({"state": "running"})).await;
        }
        self.next_tick = Instant::now() + self.job.interval;
    }

    pub(crate) async fn patch(&mut self, line: &mut Line) {
        let Some(piece) = self.job.piece() else { return };
        let Some(answer) = line.call(&piece).await else { return };
        self.heard(line, &answer);
        if self.job.patched(&answer) {
            line.tell(GuestDoes::Taken(self.job.sent));
        }
        if self.job.sent > self.job.trace.len() {
            // A daemon whose record was behind takes the last lines of the one before for the guest's.
            let anew = line.story.inner().ledger.jobs.get(&line.job).is_some_and(|note| note.begun_anew);
            if !anew {
                line.tell(GuestDoes::Wrong { invariant: 5, what: "a 416 beyond what the guest has sent" });
            }
            self.job.sent = self.job.trace.len();
        }
    }

    /// One PATCH of these bytes at this offset.
    pub(crate) async fn patch_at(&self, line: &mut Line, at: usize, piece: &[u8]) -> Option<Answer> {
        line.call(&job::patch(self.job.id, &self.job.token, at, piece)).await
    }

    pub(crate) async fn put(&mut self, line: &mut Line, body: Value) -> Option<u16> {
        let answer = line.call(&self.job.update(body)).await?;
        self.heard(line, &answer);
        Some(answer.status)
    }

    fn heard(&mut self, line: &Line, answer: &Answer) {
        if answer.status < 300 {
            line.tell(GuestDoes::Spoke);
        }
        let before = self.job.word;
        self.job.heard(answer);
        if self.job.word != before {
            line.tell(GuestDoes::Told { over: self.job.word == Word::Over });
        }
    }
}
