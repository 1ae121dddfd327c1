//! What has GitLab got, what is still owed? One task per job: spool and outbox in, PATCH and PUT out.
//!
//! It is the one writer of the trace at GitLab (decision D4). It sends the spool in pieces of at most
//! 1 MiB, keeps the job alive while there is nothing to send, passes GitLab's word on the job to
//! the job task, and delivers the verdict once the last byte of the trace is there, until GitLab
//! has taken it or says that the job is over (decision D5). It never waits for anybody else's answer
//! than GitLab's, and it may be stopped at any await: a successor learns GitLab's offset from a 416.

mod next;
mod owed;
mod pace;
mod trace;

use self::next::Next;
use self::owed::{Backlog, Owed};
use self::trace::PATCH_BYTES_MAX;
use crate::awake::{Awake, Moment};
use crate::clock::Clock;
use crate::failpoint::{Point, reached};
use crate::gitlab::{GitlabError, JobClient, JobStatus, JobUpdate, Verdict};
use crate::metrics::Metrics;
use crate::repeats::Repeats;
use crate::retry::Backoff;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::spool::SpoolReader;
use crate::telemetry::chain;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A 404 on a job route comes from something in between (GitLab never sends it): the job counts as
/// over only after this long of nothing else (threats.md G22).
const NOT_FOUND_PATIENCE: Duration = Duration::from_secs(600);

/// Interval between PATCHes before GitLab has named one: its own while somebody watches the log.
const FIRST_INTERVAL: Duration = Duration::from_secs(3);

/// Told when that begins, and not with each try.
const NOT_TAKEN: &str = "GitLab did not take trace or state; it will be sent again";

/// What an uploader needs.
pub struct Upload {
    /// The job at GitLab.
    pub client: JobClient,
    /// The job token of a newer 201, to be used once GitLab refuses the first (threats.md G17).
    pub newer_token: watch::Receiver<Option<Secret>>,
    /// The trace.
    pub spool: SpoolReader,
    /// The verdict, once there is one.
    pub outbox: watch::Receiver<Outbox>,
    /// What the job task learns. Bounded; the uploader waits for room.
    pub events: mpsc::Sender<UploaderEvent>,
    /// GitLab marks the trace as one with secrets in it.
    pub debug_trace: watch::Receiver<bool>,
    /// Longest pause between two calls.
    pub keepalive: Duration,
    /// How long an undelivered verdict is tried.
    pub keep: Duration,
    /// How long a verdict waits for a trace that GitLab does not take although it answers.
    pub trace_patience: Duration,
    /// How often the guest sends its trace.
    pub guest_interval: Duration,
    /// How long this process did not run.
    pub awake: Awake,
    /// What the uploader counts.
    pub metrics: Metrics,
    /// Source of the pauses' jitter.
    pub rng: Rng,
    /// Wall time, for the log.
    pub clock: Clock,
}

/// What waits for GitLab besides the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outbox {
    /// The job goes on.
    Empty,
    /// How it ended. The spool is complete.
    Verdict(Verdict),
    /// It is over at GitLab: nothing more is sent.
    Abandoned,
}

/// What the job task learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UploaderEvent {
    /// GitLab's word on the job has changed.
    Status(JobStatus),
    /// What GitLab does not take, and why, for people; empty: nothing any more.
    Waits(String),
    /// Nothing is left to do: delivered, over, or given up. The last event.
    Done,
}

/// Sends the spool and the verdict; ends after [`UploaderEvent::Done`], or when nobody listens.
pub async fn upload(upload: Upload) {
    let keep = upload.keep;
    let mut uploader = Uploader {
        sent: 0,
        lead: None,
        tried: false,
        interval: FIRST_INTERVAL,
        last_answer: None,
        last_state: None,
        last_patch: None,
        status: JobStatus::Running,
        marked_debug: false,
        backoff: Backoff::uploader(),
        not_before: Instant::now(),
        not_found_since: None,
        read_failures: 0,
        opened: false,
        refusals: 0,
        doubt: false,
        resends: None,
        truncated_at: None,
        given_up: false,
        piece_max: PATCH_BYTES_MAX,
        owed: Owed::new(upload.awake.clone(), upload.metrics.job().waiting_for_gitlab.clone()),
        backlog: Backlog::new(upload.metrics.job().backlog_bytes.clone()),
        untaken: Repeats::new(NOT_TAKEN),
        waits: String::new(),
        renewals: upload.client.renewals(),
        upload,
    };
    uploader.marked_debug = *uploader.upload.debug_trace.borrow();
    uploader.lead = uploader.upload.spool.view().whole.then_some(0);
    loop {
        let end = match uploader.step().await {
            Step::Continue => false,
            Step::Done => true,
        };
        if matches!(*uploader.upload.outbox.borrow(), Outbox::Verdict(_)) {
            uploader.owed.verdict();
            if !end && uploader.owed.verdict_for() >= keep {
                tracing::error!(
                    hours = keep.as_secs() / 3600,
                    "verdict could not be delivered to GitLab and is dropped"
                );
                break;
            }
        }
        if end {
            break;
        }
    }
    // Nobody listening means that the daemon goes: the record still owes the rest.
    let _ = uploader.upload.events.send(UploaderEvent::Done).await;
}

struct Uploader {
    upload: Upload,
    /// Bytes of the spool that GitLab holds, as far as we know.
    sent: u64,
    /// Bytes that GitLab has of before, and the spool has not; `None`: that is not known yet.
    lead: Option<u64>,
    /// A piece was sent, and the answer may have been lost.
    tried: bool,
    interval: Duration,
    last_answer: Option<Instant>,
    /// When GitLab was last told the job's state, taken or not.
    last_state: Option<Instant>,
    last_patch: Option<Instant>,
    status: JobStatus,
    marked_debug: bool,
    backoff: Backoff,
    /// No call before this, after a failure or on GitLab's wish.
    not_before: Instant,
    not_found_since: Option<Moment>,
    /// In a row.
    read_failures: u32,
    /// GitLab has heard `running` from this uploader, or will not hear it.
    opened: bool,
    /// Answers in a row that asked for other bytes than were sent.
    refusals: u32,
    /// GitLab has named more bytes than this uploader had sent. If nothing is left to send after
    /// that, it is asked once more before the verdict.
    doubt: bool,
    /// Pauses between verdicts that GitLab answers with 412: the trace in between is taken each time.
    resends: Option<Backoff>,
    /// Whether the job's token has changed during a call.
    renewals: watch::Receiver<Secret>,
    /// Where the trace ends because the spool could not be read further, or GitLab takes no more.
    truncated_at: Option<u64>,
    /// The verdict goes without the rest of the trace, and without its checksum.
    given_up: bool,
    /// Bytes of one PATCH at most, as far as is known.
    piece_max: usize,
    owed: Owed,
    backlog: Backlog,
    /// How often it began to wait.
    untaken: Repeats,
    /// What the job task was told last of what waits.
    waits: String,
}

#[derive(PartialEq, Eq)]
enum Step {
    Continue,
    Done,
}

impl Uploader {
    async fn step(&mut self) -> Step {
        self.renewals.mark_unchanged();
        // Before it is decided what to do: what grows meanwhile ends the wait.
        let seen = self.upload.spool.view();
        self.backlog.is(seen.length.saturating_sub(self.sent));
        match self.next() {
            Next::Stop => Step::Done,
            Next::Patch(offset) => self.patch(offset).await,
            Next::MarkDebug => self.mark_debug().await,
            Next::Keepalive => self.update(None).await,
            Next::Verdict(verdict) => self.update(Some(verdict)).await,
            Next::Wait(until) => {
                self.wait(until, seen).await;
                Step::Continue
            }
        }
    }

    async fn update(&mut self, verdict: Option<Verdict>) -> Step {
        let view = self.upload.spool.view();
        let whole = !self.given_up && self.truncated_at.is_none() && self.sent == view.length && self.lead == Some(0);
        let first = self.last_answer.is_none();
        let trace = (whole && !(first && verdict.is_none())).then_some((view.crc, view.length));
        let last = verdict.is_some();
        reached(if last { Point::K14 } else { Point::K11 });
        let update = JobUpdate { verdict, trace };
        match self.upload.client.update_job(&update).await {
            Ok(answer) => {
                // GitLab has it, and nobody here has noted that.
                reached(if last { Point::K15 } else { Point::K11 });
                self.answered(answer.interval);
                self.opened = true;
                self.last_state = Some(Instant::now());
                let wants_trace = answer.resend_trace || last && answer.ask_again.is_some();
                if self.owed.took_state(wants_trace) {
                    self.tell(String::new()).await;
                }
                self.look_whether_hopeless();
                if answer.resend_trace && self.given_up {
                    self.not_before = Instant::now() + self.backoff.next(&self.upload.rng);
                    return Step::Continue;
                }
                if answer.resend_trace {
                    self.sent = 0;
                    // Once it goes on at once; a GitLab that is never content must not be flooded.
                    match &mut self.resends {
                        Some(pauses) => self.not_before = Instant::now() + pauses.next(&self.upload.rng),
                        None => self.resends = Some(Backoff::uploader()),
                    }
                    return Step::Continue;
                }
                if !self.owed.is_failing() {
                    self.progressed();
                }
                if let Some(pause) = answer.ask_again.filter(|_| last) {
                    self.not_before = Instant::now() + pause;
                    return Step::Continue;
                }
                if last && !self.is_refused(answer.status) { Step::Done } else { self.status(answer.status).await }
            }
            Err(error) => {
                self.last_state = Some(Instant::now());
                self.owed.state_failed();
                // The few lines of a job that is not run are looked at again.
                self.doubt |= last && !view.whole;
                self.failed(&error, if last { "verdict" } else { "state" }).await
            }
        }
    }

    /// GitLab takes states and no trace, for long enough: the verdict goes without the rest.
    fn look_whether_hopeless(&mut self) {
        if self.given_up || !self.owed.is_hopeless(self.upload.trace_patience) {
            return;
        }
        let lacks = self.upload.spool.view().length.saturating_sub(self.sent);
        tracing::error!(
            held = self.sent,
            lacks,
            "GitLab answers and does not take this job's log; its verdict goes without the rest of it"
        );
        self.upload.metrics.job().traces_given_up.inc();
        (self.given_up, self.doubt) = (true, false);
        self.truncated_at = Some(self.sent);
        self.not_before = Instant::now();
    }

    /// Says what waits, if that is news.
    async fn tell(&mut self, waits: String) {
        if waits != self.waits {
            if waits.is_empty() {
                tracing::info!("GitLab takes trace and state of the job again");
            }
            self.waits.clone_from(&waits);
            // Nobody listening is found out by whoever has a word for it.
            let _ = self.upload.events.send(UploaderEvent::Waits(waits)).await;
        }
    }

    fn answered(&mut self, interval: Option<Duration>) {
        self.last_answer = Some(Instant::now());
        self.interval = interval.unwrap_or(self.interval);
        self.not_found_since = None;
    }

    fn progressed(&mut self) {
        self.backoff.reset();
        self.refusals = 0;
    }

    /// GitLab wants other bytes. Once that is the end of a lost answer, and goes on at once; again
    /// and again it must not become a storm.
    fn refused(&mut self) {
        self.refusals += 1;
        if self.refusals > 1 {
            self.not_before = Instant::now() + self.backoff.next(&self.upload.rng);
        }
    }

    /// Whether "over" is said of a token that is not GitLab's newest for this job.
    fn is_refused(&self, status: JobStatus) -> bool {
        let renewed = self.renewals.has_changed().unwrap_or(false);
        status == JobStatus::Over && (renewed || self.upload.newer_token.borrow().is_some())
    }

    async fn status(&mut self, status: JobStatus) -> Step {
        if self.is_refused(status) {
            // Once: the next refusal is of the newest token.
            let newer = self.upload.newer_token.borrow().clone();
            if let Some(newer) = newer {
                tracing::warn!("GitLab refuses the job's token; it is told by that of its newest assignment");
                self.upload.client.renew(newer);
                self.upload.newer_token = watch::channel(None).1;
            }
            return Step::Continue;
        }
        // A 416 has no word of GitLab's, which reads as `running`; a cancel is never taken back.
        let taken_back = status == JobStatus::Running && self.status == JobStatus::Canceling;
        if status != self.status && !taken_back {
            self.status = status;
            tracing::info!(status = status.word(), at = %self.upload.clock.now(), "GitLab's word on the job changed");
            if self.upload.events.send(UploaderEvent::Status(status)).await.is_err() {
                return Step::Done;
            }
        }
        if status == JobStatus::Over { Step::Done } else { Step::Continue }
    }

    async fn failed(&mut self, error: &GitlabError, what: &str) -> Step {
        let why = match error.status() {
            Some(status) => format!("GitLab answered {status}"),
            None if matches!(error, GitlabError::RateLimited { .. }) => "GitLab limits our requests".to_owned(),
            None => "GitLab does not answer".to_owned(),
        };
        let news = self.waits.is_empty() && self.untaken.is_news();
        self.tell(format!("its {what} waits: {why}")).await;
        let outbox = self.upload.outbox.borrow().clone();
        let mut pause = self.backoff.next(&self.upload.rng);
        if outbox == Outbox::Empty {
            // A live job is spoken of often, or a cancel would be learnt late.
            pause = pause.min(self.upload.keepalive);
        }
        // An early `running` that GitLab refuses to understand is no reason to keep the trace back.
        self.opened |= !error.is_transient();
        if let Some(wish) = error.retry_after() {
            pause = pause.max(wish);
        }
        if error.status() == Some(404) {
            let since = *self.not_found_since.get_or_insert_with(|| self.upload.awake.now());
            if self.upload.awake.elapsed(since) >= NOT_FOUND_PATIENCE {
                return self.status(JobStatus::Over).await;
            }
        } else {
            self.not_found_since = None;
        }
        let (error, pause_s) = (chain(error), pause.as_secs_f64());
        if news {
            tracing::warn!(error, pause_s, "{NOT_TAKEN}");
        } else {
            tracing::debug!(error, pause_s, "{NOT_TAKEN}");
        }
        self.not_before = Instant::now() + pause;
        Step::Continue
    }
}
