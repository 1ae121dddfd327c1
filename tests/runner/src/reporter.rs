//! Carries a job's log and state to GitLab: one PATCH a tick while it runs, all the rest and the final PUT after it.
//!
//! One thread owns the position in the log. While the job runs it ticks by GitLab's interval; at the
//! end it hands itself back, and the job's thread sends what is left.

use crate::api::{Api, JobKey, Outcome, Reported};
use crate::control::Control;
use crate::trace::Trace;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two ticks until GitLab says otherwise, and again for the final update.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(3);
/// GitLab's interval is obeyed up to here.
const INTERVAL_MAX: Duration = Duration::from_secs(15 * 60);
/// After this time without anything accepted a tick sends a sign of life.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// Bytes of one PATCH at most.
const PATCH_BYTES_MAX: usize = 1024 * 1024;
/// Tries of the final update where config.toml does not say.
const DEFAULT_TRIES: u32 = 10;
/// Bound of the doubling pause between these tries.
const BACKOFF_MAX: Duration = Duration::from_secs(60 * 60);

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Verdict {
    /// `None`: success.
    pub(crate) failure_reason: Option<&'static str>,
    /// The script's; 0 where there is none.
    pub(crate) exit_code: i32,
}

/// A reporter at work beside the job.
pub(crate) struct Running {
    finish: mpsc::Sender<()>,
    thread: JoinHandle<Reporter>,
}

struct Reporter {
    api: Arc<Api>,
    job: JobKey,
    trace: Arc<Trace>,
    control: Arc<Control>,
    debug_trace: bool,
    interval: Duration,
    /// Bytes that GitLab has.
    sent: usize,
    sent_at: Option<Instant>,
}

/// Whether an update, final or not, is done with.
#[derive(PartialEq, Eq, Debug)]
enum Final {
    Done,
    /// This try is lost; the next may come after a pause.
    Failed,
}

impl Running {
    /// Starts to report; the first tick comes after three seconds.
    pub(crate) fn start(
        api: &Arc<Api>,
        job: &JobKey,
        trace: &Arc<Trace>,
        control: &Arc<Control>,
        debug_trace: bool,
    ) -> Self {
        let reporter = Reporter {
            api: Arc::clone(api),
            job: job.clone(),
            trace: Arc::clone(trace),
            control: Arc::clone(control),
            debug_trace,
            interval: DEFAULT_INTERVAL,
            sent: 0,
            sent_at: None,
        };
        let (finish, finished) = mpsc::channel();
        let thread = std::thread::spawn(move || reporter.watch(&finished));
        Self { finish, thread }
    }

    /// Ends without a further call: GitLab has dropped the job.
    pub(crate) fn stop(self) {
        drop(self.into_reporter());
    }

    /// Sends the rest of the log and the verdict, `tries` times if need be (0: 10), then gives up. The
    /// call that is under way is waited for.
    pub(crate) fn finish(self, verdict: Verdict, tries: u32) {
        let mut reporter = self.into_reporter();
        let tries = if tries == 0 { DEFAULT_TRIES } else { tries };
        let mut pause = Duration::from_secs(1);
        for attempt in 1..=tries {
            if reporter.final_update(verdict) == Final::Done {
                return;
            }
            if attempt < tries {
                std::thread::sleep(pause);
                pause = (pause * 2).min(BACKOFF_MAX);
            }
        }
        crate::log("ERROR: giving up on the final update");
    }

    fn into_reporter(self) -> Reporter {
        drop(self.finish);
        match self.thread.join() {
            Ok(reporter) => reporter,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Reporter {
    fn watch(mut self, finished: &mpsc::Receiver<()>) -> Self {
        while finished.recv_timeout(self.interval) == Err(RecvTimeoutError::Timeout) {
            if !self.tick() {
                let _ = finished.recv();
                break;
            }
        }
        self
    }

    /// Sends one PATCH, and a sign of life if it is time. `false`: the job is over for GitLab.
    fn tick(&mut self) -> bool {
        let patched = self.patch();
        if patched.cancel {
            self.control.cancel();
        }
        let outcome = match patched.outcome {
            // While PATCHes fail, no sign of life is sent: recorded.
            Outcome::Accepted if self.sent_at.is_none_or(|at| at.elapsed() > KEEPALIVE_AFTER) => self.keepalive(),
            outcome => outcome,
        };
        if outcome == Outcome::Abort {
            self.control.abort();
        }
        outcome != Outcome::Abort
    }

    fn keepalive(&mut self) -> Outcome {
        let update = self.api.update(&self.job, "running").with_trace(self.trace.checksum());
        let answer = self.api.put(&self.job, &update);
        self.obey_interval(answer);
        if answer.cancel {
            self.control.cancel();
        }
        if answer.outcome == Outcome::Accepted {
            self.sent_at = Some(Instant::now());
        }
        answer.outcome
    }

    fn patch(&mut self) -> Reported {
        let Some(bytes) = self.trace.slice(self.sent, PATCH_BYTES_MAX) else {
            // GitLab asked for an offset beyond the log: 19.3 never recovers from that either.
            crate::log(&format!("ERROR: the log has no byte {}", self.sent));
            return Reported { outcome: Outcome::Failed, cancel: false, interval: None };
        };
        if bytes.is_empty() {
            return Reported { outcome: Outcome::Accepted, cancel: false, interval: None };
        }
        let answer = self.api.patch(&self.job, &bytes, self.sent, self.debug_trace);
        self.obey_interval(answer);
        match answer.outcome {
            Outcome::Accepted => (self.sent, self.sent_at) = (self.sent + bytes.len(), Some(Instant::now())),
            Outcome::WantsOffset(offset) => (self.sent, self.sent_at) = (offset, Some(Instant::now())),
            _ => {}
        }
        answer
    }

    fn obey_interval(&mut self, answer: Reported) {
        if let Some(interval) = answer.interval {
            self.interval = interval.min(INTERVAL_MAX);
        }
    }

    /// One try: the whole rest of the log, then the PUT, until GitLab has both or refuses. What GitLab
    /// itself asks to have again (416, 202, 412) is no failed try, however often.
    fn final_update(&mut self, verdict: Verdict) -> Final {
        self.interval = DEFAULT_INTERVAL;
        loop {
            if self.flush() == Final::Failed {
                return Final::Failed;
            }
            let state = if verdict.failure_reason.is_some() { "failed" } else { "success" };
            let mut update = self.api.update(&self.job, state).with_trace(self.trace.checksum());
            update.failure_reason = verdict.failure_reason.unwrap_or("");
            update.exit_code = verdict.exit_code;
            let answer = self.api.put(&self.job, &update);
            self.obey_interval(answer);
            match answer.outcome {
                Outcome::Accepted | Outcome::Abort | Outcome::NotFound => return Final::Done,
                Outcome::NotCompleted => {}
                Outcome::TraceInvalid => self.sent = 0,
                Outcome::Failed | Outcome::WantsOffset(_) => {
                    std::thread::sleep(self.interval);
                    return Final::Failed;
                }
            }
            std::thread::sleep(self.interval);
        }
    }

    /// Sends the log to its end, back to back. `Done` also if GitLab wants no more of it.
    fn flush(&mut self) -> Final {
        while self.sent != self.trace.size() {
            match self.patch().outcome {
                Outcome::Accepted => {}
                Outcome::Abort | Outcome::NotFound => return Final::Done,
                Outcome::WantsOffset(_) => std::thread::sleep(self.interval),
                Outcome::NotCompleted | Outcome::TraceInvalid | Outcome::Failed => {
                    std::thread::sleep(self.interval);
                    return Final::Failed;
                }
            }
        }
        Final::Done
    }
}
