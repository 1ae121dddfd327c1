//! The task of one job: events in, state on, record down, commands out.
//!
//! Each wait is one `select!` over everything that can happen to the job; the command behind an
//! event never waits long (calls to the hypervisor are in the machine's task, calls to GitLab in
//! the uploader's), so a cancel or a deadline is never kept waiting by another event.

mod begin;
mod news;

pub use begin::{accept, adopt, begin_anew, give_up, refuse_second, refuse_unread};

use super::journal::Record;
use super::keeper::Kept;
use super::lines;
use super::machinery::{Machinery, Next};
use super::oom::oom_kills;
use super::state::{Command, Event, Failure, Grace, State};
use super::{END_PATIENCE, JobCommand, JobView, Parts, REWRITE_PAUSE, Runner};
use super::{GivenAgain, forget};
use crate::awake::Moment;
use crate::capacity::Held;
use crate::config::Span;
use crate::gitlab::{JobPayload, JobStatus};
use crate::retry::Backoff;
use crate::spool::Spool;
use crate::telemetry::chain;
use crate::vm::{Ending, Pause};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// How often a job that found no free door looks again; it has until its boot deadline.
const DOOR_PAUSE: Span = Span::from_secs(5);

/// What a task begins with.
struct Begun {
    parts: Parts,
    runner: Arc<Runner>,
    record: Record,
    kept: Kept,
    payload: Option<JobPayload>,
    reservation: Held,
    first: Event,
}

async fn run(begun: Begun, mut inbox: mpsc::Receiver<JobCommand>, view: watch::Sender<JobView>) {
    let Begun { parts, runner, record, kept, payload, reservation, mut first } = begun;
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
        forget(&parts, &record.key).await;
        return;
    }
    let Some(spool) = open(&parts, &record, &mut first).await else {
        reservation.release();
        return;
    };
    let mut machinery = Machinery::new(parts, runner, record, kept, payload, spool);
    if !matches!(first, Event::Refused(_)) {
        machinery.begin_boot_section().await;
    }
    let spoke = machinery.guest_has_written();
    let oom_kills = oom_kills(machinery.parts.files.as_ref()).await;
    let mut job = Job {
        m: machinery,
        reservation,
        view,
        last_hand_out: None,
        hand_outs: 0,
        unkept: false,
        spoke,
        grace: None,
        graced: Duration::ZERO,
        untold: false,
        write_again: None,
        verdict_waits: None,
        oom_kills,
        paused: None,
        runner_exited: None,
        guest_failed: None,
    };
    job.feed(first).await;
    while job.m.record.state != State::Ended {
        let deadline = job.deadline();
        let next = tokio::select! {
            biased;
            // All branches are cancel safe. A hand-over goes before everything; then what others
            // decide; then news of the machine and its guest; deadlines last, so that a request
            // that arrived in time is in time.
            () = leave.cancelled() => break,
            Some(command) = inbox.recv() => Happened::Command(command),
            next = job.m.next() => Happened::Next(next),
            () = tokio::time::sleep_until(deadline.0) => {
                // If this process slept meanwhile, it is later now.
                let due = job.deadline();
                if due.0 > Instant::now() {
                    continue;
                }
                Happened::Event(due.1)
            }
            () = tokio::time::sleep_until(job.write_again.unwrap_or(deadline.0)), if job.write_again.is_some() => {
                job.write_down().await;
                continue;
            }
        };
        match next {
            Happened::Event(event) => job.feed(event).await,
            Happened::Command(JobCommand::Kill) => job.feed(Event::Killed).await,
            Happened::Command(JobCommand::GivenAgain { payload, reply }) => {
                let answer = job.given_again(*payload).await;
                // Whoever asked may have left with the daemon.
                let _ = reply.send(answer);
            }
            Happened::Next(Next::Guest(event)) => job.guest(event).await,
            Happened::Next(Next::Machine(event)) => job.machine(event).await,
            Happened::Next(Next::Panicked) => job.feed(Event::Panicked).await,
            Happened::Next(Next::Gitlab(status)) => {
                job.m.tell_guest(status);
                job.feed(Event::Gitlab(status)).await;
                if status == JobStatus::Over && !job.spoke {
                    // A guest that never began has nothing to end: it would spend its grace asking.
                    job.feed(Event::GuestAsked).await;
                }
            }
            Happened::Next(Next::Waits(what)) => job.say_phase(&what),
            Happened::Next(Next::Delivered) => job.feed(Event::Delivered).await,
        }
    }
    job.m.leave().await;
    job.give_room_back();
}

/// How much longer than its update interval a guest with something to say may take to say it.
const UNTOLD_SLACK: Duration = Duration::from_millis(200);

/// How long the disk may refuse a guest's trace before that is given up: the official runner tries a
/// PATCH about as long.
const SPOOL_PATIENCE: Duration = Duration::from_secs(60);

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
    last_hand_out: Option<Instant>,
    /// How often this task has given the payload out, those times left out that are known to be lost.
    hand_outs: u32,
    /// The guest's verdict could not be written down, and has not come again since.
    unkept: bool,
    /// The guest has made a call for its job since the hand-out.
    spoke: bool,
    /// When the grace that is running began.
    grace: Option<Moment>,
    /// Its length, for the author's line.
    graced: Duration,
    /// Its job is over at GitLab, and the guest has not asked since: it cannot know.
    untold: bool,
    /// The record on disk is behind, and would begin the job anew after a restart: when it is tried again.
    write_again: Option<Instant>,
    /// The verdict waits for a record that holds it, until then at the latest.
    verdict_waits: Option<Instant>,
    /// What the host's kernel had ended for want of memory when this task began.
    oom_kills: Option<u64>,
    /// Since when somebody at the host has kept the machine from going on.
    paused: Option<Instant>,
    /// What the guest has said of its runner's end: a hint.
    runner_exited: Option<i32>,
    /// What it has said last that it could not do, or of its own end: a hint.
    guest_failed: Option<String>,
}

impl Job {
    /// The deadline that comes first, and its event.
    fn deadline(&self) -> (Instant, Event) {
        let (limits, awake) = (&self.m.parts.limits, &self.m.parts.awake);
        let mut next = self.grace.map(|since| (awake.deadline(since, self.graced), Event::GraceOver));
        let mut sooner = |at: Instant, event: Event| {
            if next.as_ref().is_none_or(|(first, _)| at < *first) {
                next = Some((at, event));
            }
        };
        match self.m.record.state {
            State::Booting { .. } => {
                // After a restart the guest's request may be waiting in its relay: it gets time to arrive.
                let deadline = self.m.awake_since_received(limits.boot_deadline.get()).max(self.m.reopened());
                sooner(deadline, Event::BootDeadline);
                sooner(self.m.since_received(self.m.cap()), Event::TimeoutDeadline);
            }
            State::Running { .. } => {
                // Its guest tries again and again, so this is looked at often enough.
                if let Some(since) = self.m.spool_failing_since() {
                    sooner((since + SPOOL_PATIENCE).max(self.m.heard_after_sleep()), Event::HostDiskFailed);
                }
                let silence = awake.deadline(self.m.last_spoke, limits.silence_deadline.get());
                sooner(silence, Event::SilenceDeadline);
                // Its machine was not asleep, so this counts on; but its verdict may be waiting to be heard.
                let cap = self.m.since_received(self.m.cap()).max(self.m.heard_after_sleep());
                sooner(cap, Event::TimeoutDeadline);
            }
            State::Accepted | State::Releasing { .. } | State::Ended => {}
        }
        // A job that only waits for its uploader or machine still wakes now and then.
        next.unwrap_or_else(|| (Instant::now() + Duration::from_secs(3600), Event::GraceOver))
    }

    /// Moves the state on, writes it down, acts.
    async fn feed(&mut self, event: Event) {
        if event == Event::GraceOver {
            self.grace = None;
        }
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let before = self.m.record.state.clone();
            let (state, commands) = before.clone().on(event.clone());
            self.count_loss(&before, &event);
            if state != before {
                tracing::info!(state = state.word(), event = event.words(), "job goes on");
            }
            self.m.record.state = state;
            if let Some(Command::Fail(failure)) = commands.iter().find(|c| matches!(c, Command::Fail(_))) {
                let failure = self.measured(*failure).await;
                let unseen = matches!(event, Event::MachineStopped(Ending::Unseen));
                if failure == Failure::HostMemory && unseen && matches!(before, State::Running { .. }) {
                    self.m.parts.supply.machine_was_stopped("the host's kernel ended processes for want of memory");
                }
                self.word_reason(failure);
                self.explain(failure).await;
            }
            // Record first, act second. What makes a machine refuses to without a record of its own.
            // The end as well: its files go one by one, and without its trace a job looks as if it began.
            if self.m.record.state != before {
                self.write_down().await;
                if self.write_again.is_some() {
                    tracing::warn!("the job's new state is not on disk; it goes on");
                }
            }
            for command in commands {
                events.extend(self.carry_out(command).await);
            }
            self.publish();
        }
    }

    /// Writes the record, and ends the wait of a verdict for it. Room is given back only by a record that says so:
    /// one that is behind would have the next process make the machine anew, beside that of whoever has the room by
    /// then.
    async fn write_down(&mut self) {
        self.write_again = (!self.m.put().await).then(|| Instant::now() + REWRITE_PAUSE);
        let gone = matches!(self.m.record.state, State::Releasing { machine_gone: true, .. } | State::Ended);
        if gone && self.write_again.is_none() {
            self.give_room_back();
        }
        let over = self.write_again.is_none_or(|at| self.verdict_waits.is_some_and(|until| until < at));
        if self.verdict_waits.take_if(|_| over).is_some() {
            self.deliver().await;
        }
    }

    /// Nothing of the machine is left.
    fn give_room_back(&self) {
        self.reservation.release();
    }

    /// Machines that the host loses count; what a guest can bring about at will, once it has a job, does not.
    fn count_loss(&self, before: &State, event: &Event) {
        let supply = &self.m.parts.supply;
        let pause = |why: Pause| (why != Pause::Operator).then(|| why.words());
        match (before, event) {
            (State::Booting { .. }, Event::MachineFailed) => supply.machine_was_lost("it could not be made"),
            (State::Booting { .. }, Event::MachineStopped(ending)) => supply.machine_was_lost(ending.words()),
            (State::Booting { .. }, Event::BootDeadline) if self.paused.is_none() => {
                supply.machine_was_lost("its guest did not ask for its job in time");
            }
            (State::Booting { .. }, Event::MachinePaused(why)) => {
                pause(*why).into_iter().for_each(|why| supply.machine_was_lost(why));
            }
            (State::Running { .. }, Event::MachineStopped(ending)) if ending.is_the_hosts() => {
                supply.machine_was_stopped(ending.words());
            }
            (State::Running { .. }, Event::MachinePaused(why)) => {
                pause(*why).into_iter().for_each(|why| supply.machine_was_stopped(why));
            }
            _ => {}
        }
    }

    /// The failure in the light of what was measured: whose doing it was that a deadline passed, or a machine ended.
    async fn measured(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Silent | Failure::Timeout | Failure::BootDeadline if self.paused.is_some() => Failure::HostPaused,
            // Both are true, and this is the one that its author knows: the timeout was over, and its end was not heard of.
            Failure::Silent if self.m.elapsed() >= self.m.timeout() => Failure::Timeout,
            Failure::Lost if self.m.host_was_restarted() => Failure::HostLost,
            Failure::Died(Ending::Unseen | Ending::Died) | Failure::DiedBooting(Ending::Unseen | Ending::Died)
                if self.host_ran_out_of_memory().await =>
            {
                Failure::HostMemory
            }
            failure => failure,
        }
    }

    /// GitLab's name for the failure; `runner_interrupted` only where GitLab lists it, else the reason that all know.
    fn word_reason(&mut self, failure: Failure) {
        let interrupted = failure == Failure::Killed && !self.m.record.knows_interrupted;
        if let State::Releasing { verdict: Some(verdict), .. } = &mut self.m.record.state {
            let reason = if interrupted { "runner_system_failure" } else { failure.reason() };
            verdict.failure_reason = Some(reason.to_owned());
        }
    }

    async fn carry_out(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::TakeMachine => self.m.take_machine(false).await.err(),
            Command::ResumeMachine => self.m.take_machine(true).await.err(),
            Command::ReplaceMachine => {
                self.m
                    .own_line(|now| {
                        lines::note(now, "dayfly: the machine was lost before it was ready; taking another.")
                    })
                    .await;
                self.m.metrics().job().machines_replaced.inc();
                if self.m.release_for_another() { None } else { self.m.take_machine(false).await.err() }
            }
            // The payload itself goes out in `guest`, which holds the reply.
            Command::HandOut | Command::HandOutAgain | Command::HandNothing => None,
            Command::CloseGuest => {
                self.m.close_guest().await;
                None
            }
            // A verdict that only memory knows is another one after a restart, and our last lines the guest's.
            Command::Fail(_) | Command::Deliver(_) if self.write_again.is_some() => {
                self.verdict_waits = Some(Instant::now() + END_PATIENCE);
                None
            }
            Command::Fail(_) | Command::Deliver(_) => {
                self.deliver().await;
                None
            }
            Command::Abandon => {
                self.m.abandon();
                None
            }
            Command::Arm(grace) => {
                let limits = &self.m.parts.limits;
                self.graced = match grace {
                    Grace::Canceling => limits.canceling_grace,
                    Grace::Over => limits.cancel_grace,
                    Grace::PowerOff => limits.power_off_grace,
                    Grace::Door => DOOR_PAUSE,
                }
                .get();
                self.untold = grace == Grace::Over;
                if self.untold {
                    // A silent guest would learn it after up to 30 s; what it could end by then GitLab takes no more.
                    self.graced = self.graced.min(limits.guest_update_interval.get() + UNTOLD_SLACK);
                }
                self.grace = Some(self.m.parts.awake.now());
                None
            }
            Command::ReleaseMachine => self.m.release_machine().await.then_some(Event::MachineReleased),
            Command::Finish => {
                self.m.finish().await;
                None
            }
        }
    }

    /// Plans the author's lines, after the last byte of the guest.
    async fn explain(&mut self, failure: Failure) {
        let limits = &self.m.parts.limits;
        let limit = match failure {
            Failure::BootDeadline => limits.boot_deadline.get().min(self.m.elapsed()),
            Failure::Silent => limits.silence_deadline.get(),
            Failure::Timeout => self.m.timeout(),
            Failure::HostPaused => self.paused.map_or(Duration::ZERO, |since| since.elapsed()),
            _ => self.graced,
        };
        let (job, image) = (self.m.record.key.id.0, self.m.image().to_owned());
        if failure.is_refusal() {
            // Its cause was logged where it was met.
            tracing::info!(failure = failure.words(), "the job is not run here");
        } else {
            tracing::warn!(failure = failure.words(), "the job ends without a verdict of its guest");
        }
        let booting = self.m.record.guest_base.is_none();
        let lost =
            matches!(failure, Failure::Died(_) | Failure::DiedBooting(_) | Failure::HostMemory | Failure::BootDeadline);
        let console = self.m.console_tail();
        let words = |of: fn(&str) -> Option<String>| console.as_deref().and_then(of);
        let hints = lines::Hints {
            runner_exited: self.runner_exited,
            guest: self.guest_failed.as_deref().and_then(|text| self.m.masked(text)),
            console: words(lines::kernel_words),
            runner: words(lines::runner_words).filter(|_| failure == Failure::NotTaken),
        };
        let tail = console.filter(|_| lost && (booting || !self.m.guest_has_written()));
        if let Some(tail) = &tail {
            let what = if booting { "the machine that never asked for its job" } else { "a machine that wrote no log" };
            tracing::warn!(console = tail, "the console of {what}");
        }
        self.m
            .plan_last_lines(|now| {
                let mut text = lines::failure(now, failure, job, limit, &image);
                if matches!(failure, Failure::Died(_) | Failure::Silent | Failure::NotTaken) {
                    text.push_str(&hints.lines(now));
                }
                text.extend(tail.map(|tail| lines::console(now, &tail)));
                text
            })
            .await;
    }

    /// Whether the kernel has ended processes for want of memory in this task's time.
    async fn host_ran_out_of_memory(&self) -> bool {
        let now = oom_kills(self.m.parts.files.as_ref()).await;
        self.oom_kills.zip(now).is_some_and(|(before, now)| now > before)
    }

    /// The last lines, if any, to the spool and that to disk, as the record is already, then the verdict to
    /// the uploader.
    async fn deliver(&mut self) {
        self.m.write_last_lines().await;
        if let State::Releasing { verdict: Some(verdict), .. } = &self.m.record.state {
            let word = if verdict.success { "success" } else { "failed" };
            if self.m.outbox(verdict.clone()) {
                self.m.metrics().job().verdicts.inc(word);
            }
        }
    }

    /// GitLab's second 201 for this job. One machine, whatever it says. With another token than the
    /// first it is GitLab's newest word: before the hand-out it takes the first one's place, after
    /// that the guest goes on and GitLab may be told by either token.
    async fn given_again(&mut self, payload: JobPayload) -> GivenAgain {
        let state = self.m.record.state.word();
        if self.m.record.job_token.matches(payload.token.expose()) {
            tracing::warn!(state, "GitLab assigned this job again; it goes on as it is");
            return GivenAgain::UnderWay;
        }
        match &self.m.record.state {
            State::Accepted | State::Booting { .. } => {
                tracing::warn!(state, "GitLab assigned this job anew before it has started; the newer one is run");
                match self.m.renew(payload).await {
                    Ok(true) => {}
                    Ok(false) => return GivenAgain::Another,
                    Err(event) => self.feed(event).await,
                }
            }
            State::Running { .. } | State::Releasing { verdict: Some(_), delivered: false, .. } => {
                tracing::warn!(state, "GitLab assigned this job anew after it has started; the first goes on");
                self.m.note_newer_token(payload.token.clone()).await;
            }
            State::Releasing { .. } | State::Ended => {
                tracing::warn!(state, "GitLab assigned this job anew when it had ended here");
                return GivenAgain::Another;
            }
        }
        GivenAgain::UnderWay
    }

    fn publish(&self) {
        self.view.send_if_modified(|view| {
            view.state = self.m.record.state.word();
            view.vm = self.m.record.machine.as_ref().map(|m| m.id.to_string());
            true
        });
    }
}
