//! What GitLab does to the uploader, and what it must never hold.

use super::plan::{Mood, Plan, Range};
use dayfly::files::Files as _;
use dayfly::gitlab::JobId;
use dayfly_doubles::files::MemoryFiles;
use dayfly_exec::standin::{Fault, Recorded, Route, Standin};
use serde_json::Value;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longer than any plan takes, in virtual time.
pub(super) const LONG: Duration = Duration::from_secs(20 * 3600);

/// Bytes of one PATCH at most.
const PATCH_BYTES_MAX: u64 = 1 << 20;

/// GitLab as one plan has it.
#[derive(Clone)]
pub(super) struct Gitlab {
    pub(super) standin: Standin,
    pub(super) job: JobId,
    shadow: Shadow,
    ended: Arc<AtomicBool>,
    /// Whether a call with the size follows each loss: not after a full spool.
    may_lose: bool,
}

/// What the spool held when it was last looked at: it is gone when the job is.
#[derive(Clone)]
struct Shadow {
    files: MemoryFiles,
    spool: PathBuf,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Shadow {
    fn look(&self) -> MutexGuard<'_, Vec<u8>> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        // A fake answers at once.
        let mut read = self.files.read(&self.spool, u64::MAX);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(Ok(now)) = read.as_mut().poll(&mut context)
            // It only grows; a shorter one is that of a job which is being removed.
            && now.len() >= bytes.len()
        {
            *bytes = now;
        }
        bytes
    }
}

impl Gitlab {
    /// Puts the plan's moods in place.
    pub(super) fn new(standin: Standin, job: JobId, files: MemoryFiles, spool: &Path, plan: &Plan) -> Self {
        standin.configure(|settings| {
            settings.live_trace_persist_after = plan.persist;
            settings.trace_update_interval = plan.interval.map(Duration::from_secs);
        });
        let ended = Arc::new(AtomicBool::new(false));
        let over = ended.clone();
        let mut higher = false;
        // Said twice, it is what GitLab holds, as far as anybody can know.
        let mut once =
            |mood: &Mood| !matches!(mood, Mood::Wrong(Range::Higher(_))) || !std::mem::replace(&mut higher, true);
        let moods = queue(plan.moods.iter().copied().filter(&mut once));
        let last = queue(plan.last_moods.iter().copied().filter(&mut once));
        let shadow = Shadow { files, spool: spool.to_owned(), bytes: Arc::default() };
        let seen = shadow.clone();
        standin.hook(Arc::new(move |request| {
            // Whatever GitLab is about to be sent stands in the spool by now.
            drop(seen.look());
            if request.job != Some(job) || !matches!(request.route, Route::AppendTrace | Route::UpdateJob) {
                return Vec::new();
            }
            let queue = if over.load(Ordering::Relaxed) { &last } else { &moods };
            let mood = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            mood.and_then(|mood| fault(mood, request)).into_iter().collect()
        }));
        Self { standin, job, shadow, ended, may_lose: plan.room.is_none() }
    }

    /// The job has its verdict: the last moods begin.
    pub(super) fn ended(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Bytes of the spool now.
    pub(super) fn spool_length(&self) -> usize {
        self.shadow.look().len()
    }

    /// What the spool held at last.
    pub(super) fn spool(&self) -> Vec<u8> {
        self.shadow.look().clone()
    }

    /// GitLab loses its log but for so many thousandths.
    pub(super) fn lose(&self, permille: usize) {
        if !self.may_lose {
            return;
        }
        self.standin.edit(|model| {
            let Some(job) = model.jobs.get_mut(&self.job).filter(|job| job.state.is_executing()) else { return };
            let left = job.trace.bytes.len() * permille / 1000;
            job.trace.bytes.truncate(left);
        });
    }

    /// Watches until the job is over: GitLab's bytes are a prefix of the spool at every instant.
    pub(super) async fn watch(&self) -> Result<(), String> {
        let wrong = Mutex::new(None);
        let over = self.standin.wait_for(
            |model| {
                let job = &model.jobs[&self.job];
                let kept = self.shadow.look();
                if !kept.starts_with(&job.trace.bytes) {
                    let at = kept.iter().zip(&job.trace.bytes).take_while(|(a, b)| a == b).count();
                    let (held, spool) = (job.trace.bytes.len(), kept.len());
                    let text = format!("GitLab's {held} bytes are no prefix of the spool's {spool}: they part at {at}");
                    *wrong.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    return true;
                }
                job.state.is_over()
            },
            LONG,
        );
        over.await.map_err(|error| format!("{error}: {}", self.history()))?;
        match wrong.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(format!("{why}\n{}", self.history())),
            None => Ok(()),
        }
    }

    /// The end: GitLab holds the spool, and was told so with the verdict; no PATCH was too large.
    pub(super) fn judge(&self) -> Result<(), String> {
        let spool = self.spool();
        let job = self.standin.job(self.job).ok_or("the job is gone")?;
        if job.trace.bytes != spool {
            let at = spool.iter().zip(&job.trace.bytes).take_while(|(a, b)| a == b).count();
            let held = job.trace.bytes.len();
            return Err(format!("GitLab holds {held} of {} bytes; they part at {at}\n{}", spool.len(), self.history()));
        }
        if job.verdicts != 1 {
            return Err(format!("{} verdicts\n{}", job.verdicts, self.history()));
        }
        let crc = format!("crc32:{:08x}", crc32fast::hash(&spool));
        let mut verdicts = 0;
        for request in self.standin.requests() {
            if request.route == Route::AppendTrace && request.body_bytes > PATCH_BYTES_MAX {
                return Err(format!("a PATCH of {} bytes", request.body_bytes));
            }
            // What was cut before its body came said nothing.
            let Some(body) = request.body.as_ref().filter(|_| request.route == Route::UpdateJob) else { continue };
            let said: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
            // Nobody listens to what is said after the end.
            if said["state"] == "running" || request.status.is_some_and(|status| status == 403) {
                continue;
            }
            verdicts += 1;
            let size = said["output"]["bytesize"].as_u64().unwrap_or(0);
            let sums = [&said["checksum"], &said["output"]["checksum"]];
            if sums.iter().any(|sum| **sum != crc.as_str()) || size != spool.len() as u64 {
                return Err(format!("a verdict said {said}, for {crc} over {} bytes\n{}", spool.len(), self.history()));
            }
        }
        if verdicts == 0 { Err("no verdict was sent".to_owned()) } else { Ok(()) }
    }

    /// What GitLab saw, for a failing case.
    pub(super) fn history(&self) -> String {
        let of_job = |request: &Recorded| request.job == Some(self.job);
        let lines = self.standin.requests().into_iter().filter(of_job).map(|request| {
            let range = request.headers.get("content-range").and_then(|range| range.to_str().ok());
            format!("{request:?} {}", range.unwrap_or_default())
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

fn queue(moods: impl Iterator<Item = Mood>) -> Mutex<VecDeque<Mood>> {
    Mutex::new(moods.collect())
}

fn fault(mood: Mood, request: &Recorded) -> Option<Fault> {
    let patch = request.route == Route::AppendTrace;
    Some(match mood {
        Mood::Fine => return None,
        Mood::Cut => Fault::DropBeforeApply,
        Mood::CutInBody(bytes) => Fault::DropInBody(bytes),
        Mood::AnswerLost => Fault::ApplyThenDrop,
        // On a PUT a bare 200 is GitLab's own answer, and would end the job without its verdict.
        Mood::Status(200 | 204, _) if !patch => return None,
        Mood::Status(code, 0) => Fault::status(code),
        Mood::Status(code, wait) => Fault::status_with(code, &[("Retry-After", &wait.to_string())]),
        Mood::Page(code) => Fault::html(code),
        Mood::Wrong(range) if patch => {
            let told = request.headers.get("content-range").and_then(|range| range.to_str().ok()).unwrap_or_default();
            let (first, last) = told.split_once('-').unwrap_or_default();
            let (first, last) = (first.parse::<u64>().unwrap_or(0), last.parse::<u64>().unwrap_or(0));
            let text = match range {
                Range::Zero => "0-0".to_owned(),
                Range::Missing => return Some(Fault::status(416)),
                Range::Garbage => "bytes".to_owned(),
                Range::Lower(less) => format!("0-{}", first.saturating_sub(less.into())),
                Range::Higher(more) => format!("0-{}", last + 2 + u64::from(more)),
            };
            Fault::status_with(416, &[("Range", &text)])
        }
        Mood::Later(interval) if !patch => {
            Fault::status_with(202, &[("X-GitLab-Trace-Update-Interval", &interval.to_string())])
        }
        Mood::AllAgain if !patch => Fault::status(412),
        Mood::Wrong(_) | Mood::Later(_) | Mood::AllAgain => return None,
        Mood::Slow(ms) => Fault::Delay(Duration::from_millis(ms.into())),
        Mood::SlowAnswer(ms) => Fault::DelayAnswer(Duration::from_millis(ms.into())),
        Mood::Interval(seconds) => {
            Fault::AnswerHeaders(vec![("X-GitLab-Trace-Update-Interval".into(), seconds.to_string())])
        }
    })
}
