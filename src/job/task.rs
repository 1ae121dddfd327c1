//! The task of one job: events in, state on, commands out.
//!
//! Each wait is one `select!` over everything that can happen to the job; the command behind an
//! event never waits long (calls to the hypervisor are in the machine's task, calls to GitLab in
//! the uploader's), so a cancel or a deadline is never kept waiting by another event.

mod begin;
mod commands;
mod deadlines;
mod given;
mod kept;
mod news;
mod seen;

pub use begin::{accept, adopt, begin_anew, give_up, refuse_second, refuse_unread};

use self::commands::{Asking, Behind, Done, Step};
use self::deadlines::Armed;
use self::given::Given;
use self::seen::Seen;
use super::journal::Record;
use super::keeper::Kept;
use super::keeps::Keep;
use super::machinery::{Machinery, Next};
use super::past::{Looks, Past, end_of, machine_was};
use super::state::{Event, Failure, State};
use super::{JobCommand, JobView, Parts, Runner};
use super::{Reassigned, forget};
use crate::capacity::Held;
use crate::gitlab::{JobPayload, JobStatus};
use crate::metrics::Phase;
use crate::retry::Backoff;
use crate::spool::Spool;
use crate::telemetry::chain;
use crate::vm::VmName;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// What a task begins with.
struct Begun {
    parts: Parts,
    runner: Arc<Runner>,
    record: Record,
    kept: Kept,
    payload: Option<JobPayload>,
    reservation: Held,
    first: Event,
    /// Why it is refused, for its author, if that is so.
    refused: Option<String>,
    /// The image that could not be used, if one was asked for.
    image: Option<String>,
}

async fn run(begun: Begun, mut inbox: mpsc::Receiver<JobCommand>, view: watch::Sender<JobView>, looks: Looks) {
    let Begun { parts, runner, record, kept, payload, reservation, mut first, refused, image } = begun;
    let leave = parts.leave.clone();
    if matches!(record.state, State::Releasing { machine_gone: true, .. } | State::Ended) {
        reservation.release();
    }
    if leave.is_cancelled() && kept.is_there() {
        // Assigned during a hand-over: it is written down, and the next process begins it (G13).
        return;
    }
    if record.state == State::Ended {
        // A crash came between its end and the last of its files.
        parts.history.keep(end_of(&record, parts.clock.now()), &record.key.directory()).await;
        forget(&parts, &record.key).await;
        return;
    }
    let Some(spool) = open(&parts, &record, &mut first).await else {
        reservation.release();
        return;
    };
    let brought = (image, past(&parts, &record).await, looks);
    let mut machinery = Machinery::new(parts, runner, record, kept, payload, spool, brought);
    if !matches!(first, Event::Refused(_)) {
        machinery.begin_boot_section().await;
    }
    let given = Given::before(machinery.guest_has_written());
    let seen = Seen::begin(machinery.parts.files.as_ref(), refused).await;
    let kept = machinery.record.state.is_kept().then(|| machinery.parts.keeps.adopt(&machinery.record.class));
    let drain = machinery.parts.drain.clone();
    let mut job = Job { m: machinery, reservation, view, given, seen, grace: None, behind: None, kept };
    job.feed(first).await;
    while job.m.record.state != State::Ended {
        let deadline = job.deadline();
        let write_again = job.behind.as_ref().map(|behind| behind.again);
        let next = tokio::select! {
            biased;
            // All branches are cancel safe. A hand-over goes before everything; then what others
            // decide; then news of the machine and its guest; deadlines last, so that a request
            // that arrived in time is in time.
            () = leave.cancelled() => break,
            Some(command) = inbox.recv() => Happened::Command(command),
            () = drain.cancelled(), if job.m.record.state.is_kept() => Happened::Event(Event::KeepOver),
            next = job.m.next() => Happened::Next(next),
            () = tokio::time::sleep_until(deadline.0) => {
                // If this process slept meanwhile, it is later now.
                let due = job.deadline();
                if due.0 > Instant::now() {
                    continue;
                }
                Happened::Event(due.1)
            }
            () = tokio::time::sleep_until(write_again.unwrap_or(deadline.0)), if write_again.is_some() => {
                job.write_down().await;
                continue;
            }
        };
        match next {
            Happened::Event(event) => {
                let event = job.keeping(event);
                job.feed(event).await;
            }
            Happened::Command(JobCommand::Kill { reason }) => {
                job.seen.kill_reason = reason;
                job.feed(Event::Killed).await;
            }
            Happened::Command(JobCommand::Reassign { payload, reply }) => {
                let answer = job.reassigned(*payload).await;
                // Whoever asked may have left with the daemon.
                let _ = reply.send(answer);
            }
            Happened::Next(Next::Guest(event)) => job.guest(event).await,
            Happened::Next(Next::Machine(event)) => job.machine(event).await,
            Happened::Next(Next::Panicked) => job.feed(Event::Panicked).await,
            Happened::Next(Next::Gitlab(status)) => {
                job.m.tell_guest(status);
                job.seen.gitlab = status;
                job.feed(Event::Gitlab(status)).await;
                if status == JobStatus::Over && !job.given.spoke {
                    // A guest that never began has nothing to end: it would spend its grace asking.
                    job.feed(Event::GuestIdle).await;
                }
            }
            Happened::Next(Next::Waits(what)) => {
                // That nothing waits is no news of a machine that is kept.
                if !what.is_empty() || !job.m.record.state.is_kept() {
                    job.say_phase(&what);
                }
                job.seen.waits = what;
            }
            Happened::Next(Next::Delivered) => {
                job.m.end_phase(Phase::Flush);
                job.m.note("nothing waits for GitLab any more");
                job.feed(Event::Delivered).await;
            }
        }
    }
    job.m.leave().await;
    job.reservation.release();
}

/// What a hand-over took along of it; after a kill only what its record says.
async fn past(parts: &Parts, record: &Record) -> Past {
    let vm = record.machine.as_ref().map(|machine| VmName::from(machine.id.clone()).to_string());
    let taken = match &record.state {
        State::Accepted => None,
        _ => parts.journal.past(&record.key).await.ok(),
    };
    let past: Past = taken.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    Past { vm: vm.or(past.vm), ..past }
}

/// Tries to open the spool of a job that could still be refused; with their pauses 3 s.
const SPOOL_TRIES: u32 = 3;

/// Opens the spool. A job of which nothing is on the host yet is refused if that fails; one whose
/// guest may be running is tried until it works: its machine must not look like nobody's. `None`: the daemon leaves.
async fn open(parts: &Parts, record: &Record, first: &mut Event) -> Option<Spool> {
    let path = parts.journal.spool_path(&record.key);
    let bytes_max = parts.limits.spool_mib.saturating_mul(1024 * 1024);
    let mut backoff = Backoff::uploader();
    let mut tries = 0;
    loop {
        if let Event::Refused(_) = first {
            let begins = parts.files.length(&path).await;
            return Some(Spool::of_last_lines(begins.ok().flatten().unwrap_or(0)));
        }
        let error = match Spool::open(parts.files.clone(), &path, bytes_max, record.guest_base).await {
            Ok(spool) => return Some(spool),
            Err(error) => error,
        };
        tracing::error!(error = chain(&error), "open the job's spool");
        tries += 1;
        if tries >= SPOOL_TRIES
            && record.machine.is_none()
            && matches!(record.state, State::Accepted | State::Booting { .. })
        {
            *first = Event::Refused(Failure::NotKept);
            continue;
        }
        tokio::select! {
            biased;
            // Both are cancel safe.
            () = parts.leave.cancelled() => return None,
            () = tokio::time::sleep(backoff.next(&parts.rng)) => {}
        }
    }
}

enum Happened {
    Event(Event),
    Command(JobCommand),
    Next(Next),
}

struct Job {
    m: Machinery,
    /// Given back when nothing of the machine is left: the verdict needs no room.
    reservation: Held,
    view: watch::Sender<JobView>,
    /// What its guest was given, and has shown of it.
    given: Given,
    /// What was seen of its machine, for the author's lines.
    seen: Seen,
    /// The grace that was begun last.
    grace: Option<Armed>,
    /// The record on disk is, and would begin the job anew after a restart.
    behind: Option<Behind>,
    /// Its machine is one of those that are kept, or is about to be.
    kept: Option<Keep>,
}

impl Job {
    /// Moves the state on, and acts.
    async fn feed(&mut self, event: Event) {
        self.hear(event, None).await;
    }

    /// The same, for an event that somebody waits for.
    async fn hear(&mut self, event: Event, mut asking: Option<Asking>) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            if let (Event::GraceOver, Some(grace)) = (&event, &mut self.grace) {
                grace.over = true;
            }
            let before = self.m.record.state.clone();
            let (state, commands) = before.clone().on(event.clone());
            self.count_loss(&before, &event);
            if matches!((&before, &state), (State::Running { .. }, State::Releasing { .. })) {
                self.m.end_phase(Phase::Run);
            }
            let releases = matches!(state, State::Releasing { .. }) && !matches!(before, State::Releasing { .. });
            self.m.record.state = state;
            if releases {
                self.m.note(&event.words());
            }
            let mut step = Step { before, event, asking: asking.take() };
            for command in commands {
                match self.carry_out(command, &mut step).await {
                    Done::Goes => {}
                    Done::Brings(event) => events.push(event),
                    Done::Undone => break,
                }
            }
            self.publish();
        }
        if !self.m.record.state.is_kept() {
            self.kept = None;
        }
    }

    /// GitLab's second 201 for this job. One machine, whatever it says. With another token than the
    /// first it is GitLab's newest word: before the hand-out it takes the first one's place, after
    /// that the guest goes on and GitLab may be told by either token.
    async fn reassigned(&mut self, payload: JobPayload) -> Reassigned {
        let state = self.m.record.state.word();
        if self.m.record.job_token.matches(payload.token.expose()) {
            tracing::warn!(state, "GitLab assigned this job again; it goes on as it is");
            return Reassigned::UnderWay;
        }
        match &self.m.record.state {
            State::Accepted | State::Booting { .. } => {
                tracing::warn!(state, "GitLab assigned this job anew before it has started; the newer one is run");
                match self.m.renew(payload).await {
                    Ok(true) => {}
                    Ok(false) => return Reassigned::Another,
                    Err(event) => self.feed(event).await,
                }
            }
            State::Running { .. } | State::Releasing { verdict: Some(_), delivered: false, .. } => {
                tracing::warn!(state, "GitLab assigned this job anew after it has started; the first goes on");
                self.m.note_newer_token(payload.token.clone()).await;
            }
            State::Releasing { .. } | State::Ended => {
                tracing::warn!(state, "GitLab assigned this job anew when it had ended here");
                return Reassigned::Another;
            }
        }
        Reassigned::UnderWay
    }

    fn publish(&self) {
        self.view.send_if_modified(|view| {
            view.state = self.m.record.state.word();
            view.vm = self.m.record.machine.as_ref().map(|m| m.id.to_string());
            view.machine = machine_was(&self.m.record);
            view.gitlab = self.seen.gitlab;
            if view.steps.len() != self.m.past.steps.len() {
                view.steps.clone_from(&self.m.past.steps);
            }
            true
        });
    }
}
