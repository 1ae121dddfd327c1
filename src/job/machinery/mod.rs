//! The moving parts of one job: spool, uploader, machine, door, record. `task` decides, this acts.

mod machine;
mod repeated;

use self::machine::LetGo;
use self::repeated::Repeated;
use super::journal::{LastLines, Record};
use super::keeper::Kept;
use super::lines;
use super::state::{Event, State};
use super::{Parts, Runner, forget};
use crate::awake::Moment;
use crate::failpoint::{Point, reached};
use crate::gitlab::{JobClient, JobPayload, JobStatus, Verdict};
use crate::guest::{GuestEvent, GuestPass, GuestView, HandOut};
use crate::metrics::Metrics;
use crate::secret::Secret;
use crate::spool::Spool;
use crate::supply::{Machine, MachineEvent};
use crate::telemetry::chain;
use crate::uploader::{Outbox, Upload, UploaderEvent, upload};
use jiff::Timestamp;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

/// Events that may wait for the job from its guest or its uploader; a full queue makes them wait.
const EVENTS_MAX: usize = 64;

/// Time for a guest of before to find its door open again; a relay tries every 0.2 s.
const REOPENED_GRACE: Duration = Duration::from_secs(20);

/// Longest timeout that we count ourselves (GitLab's own bound is a month). The guest's runner is told GitLab's number.
const TIMEOUT_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// So much of the boot is not the author's: the guest gets the job's whole timeout (decision D8).
const BOOT_FREE: Duration = Duration::from_secs(60);

/// Pause before another task takes up the machine of one that died of a bug.
const SUCCESSOR_PAUSE: Duration = Duration::from_secs(1);

pub(super) enum Next {
    Guest(GuestEvent),
    Machine(MachineEvent),
    Gitlab(JobStatus),
    /// What GitLab does not take, for people.
    Waits(String),
    Delivered,
    /// The task of its machine did, a moment ago.
    Panicked,
}

pub(super) struct Machinery {
    pub(super) parts: Parts,
    pub(super) record: Record,
    /// What the journal has of the job.
    journalled: Kept,
    /// The record as it stands there, as far as is known.
    kept: Option<Vec<u8>>,
    /// When the guest gave its last sign of life, or its door was opened.
    pub(super) last_spoke: Moment,
    runner: Arc<Runner>,
    payload: Option<JobPayload>,
    /// When this task began, and how long after GitLab's 201 that was.
    started: Instant,
    awake_since: Moment,
    elapsed_before: Duration,
    spool: Spool,
    outbox: watch::Sender<Outbox>,
    debug_trace: watch::Sender<bool>,
    uploads: mpsc::Receiver<UploaderEvent>,
    /// The uploader; aborted when this is dropped.
    tasks: JoinSet<()>,
    /// The job's calls, for uploader and door.
    client: JobClient,
    /// The token of a newer 201, for the uploader.
    newer_token: watch::Sender<Option<Secret>>,
    door: Option<GuestPass>,
    guest_out: mpsc::Sender<GuestEvent>,
    guest_in: mpsc::Receiver<GuestEvent>,
    guest_view: watch::Sender<GuestView>,
    machine: Option<Machine>,
    let_go: LetGo,
    /// The task of the machine died of a bug: when that is news for the job.
    machine_task_lost: Option<Instant>,
    /// The machine is being released for another one.
    another: bool,
    /// Whether the boot section stands open in the trace.
    section_open: bool,
    /// Whether a former daemon had begun this job's machine.
    adopted: bool,
    /// Lines of the log that the guest may bring about.
    pub(super) repeated: Repeated,
}

impl Machinery {
    /// Starts the uploader.
    pub(super) fn new(
        parts: Parts,
        runner: Arc<Runner>,
        record: Record,
        journalled: Kept,
        payload: Option<JobPayload>,
        spool: Spool,
    ) -> Self {
        let (outbox, outbox_in) = watch::channel(Outbox::Empty);
        let (debug_trace, debug_in) = watch::channel(record.debug_trace);
        let (events, uploads) = mpsc::channel(EVENTS_MAX);
        let mut tasks = JoinSet::new();
        let client =
            JobClient::new(runner.transport.clone(), record.key.id, record.job_token.clone(), parts.rng.clone());
        let (newer_token, newer_token_in) = watch::channel(record.newer_token.clone());
        let upload_parts = Upload {
            client: client.clone(),
            newer_token: newer_token_in,
            spool: spool.reader(),
            outbox: outbox_in,
            events,
            debug_trace: debug_in,
            keepalive: parts.limits.keepalive.get(),
            keep: parts.limits.outbox_keep.get(),
            trace_patience: parts.limits.trace_patience.get(),
            guest_interval: parts.limits.guest_update_interval.get(),
            awake: parts.awake.clone(),
            metrics: parts.metrics.clone(),
            rng: parts.rng.clone(),
            clock: parts.clock.clone(),
        };
        tasks.spawn(tracing::Instrument::in_current_span(upload(upload_parts)));
        let (guest_out, guest_in) = mpsc::channel(EVENTS_MAX);
        let update_interval = parts.limits.guest_update_interval.get();
        let (guest_view, _) = watch::channel(GuestView { status: JobStatus::Running, verdict: None, update_interval });
        let since = match record.received_uptime_ms {
            Some(then) => parts.clock.uptime().saturating_sub(Duration::from_millis(then)),
            None => Duration::try_from(parts.clock.now().duration_since(record.received)).unwrap_or_default(),
        };
        Self {
            elapsed_before: since,
            started: Instant::now(),
            awake_since: parts.awake.now(),
            last_spoke: parts.awake.now(),
            section_open: record.guest_base.is_none() && spool.view().length > 0,
            adopted: record.machine.is_some(),
            spool,
            outbox,
            debug_trace,
            uploads,
            tasks,
            client,
            newer_token,
            door: None,
            guest_out,
            guest_in,
            guest_view,
            machine: None,
            let_go: LetGo::new(parts.supply.clone()),
            machine_task_lost: None,
            another: false,
            repeated: Repeated::default(),
            parts,
            record,
            journalled,
            kept: None,
            runner,
            payload,
        }
    }

    /// What happens next to the job. Cancel safe.
    ///
    /// # Panics
    /// If a task of the job's own has: that costs the job, as a panic of its own task does.
    pub(super) async fn next(&mut self) -> Next {
        loop {
            let machine = async {
                match &mut self.machine {
                    Some(machine) => machine.event().await,
                    None => std::future::pending().await,
                }
            };
            let door = async {
                match &mut self.door {
                    Some(door) => door.ended_early().await,
                    None => std::future::pending().await,
                }
            };
            let machine_task_lost = self.machine_task_lost;
            let successor = async {
                match machine_task_lost {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // All are receivers and timers, so cancel safe. GitLab's word first: it outranks the guest's.
                Some(event) = self.uploads.recv() => return match event {
                    UploaderEvent::Status(status) => Next::Gitlab(status),
                    UploaderEvent::Waits(what) => Next::Waits(what),
                    UploaderEvent::Done => {
                        reached(Point::K15);
                        Next::Delivered
                    }
                },
                Some(ended) = self.tasks.join_next() => if let Err(error) = ended {
                    resume(error, "the uploader of the job panicked");
                },
                Some(event) = self.guest_in.recv() => return Next::Guest(event),
                event = machine => match event {
                    Some(event) => return Next::Machine(event),
                    // What it had made is still there, and another task takes that down; not at once,
                    // for it may die of the same.
                    None => {
                        tracing::error!("the task of the job's machine panicked");
                        self.parts.metrics.job().panicked.inc();
                        self.machine = None;
                        self.machine_task_lost = Some(Instant::now() + SUCCESSOR_PAUSE);
                    }
                },
                () = successor => {
                    self.machine_task_lost = None;
                    return Next::Panicked;
                }
                error = door => resume(error, "the door of the job's guest panicked"),
            }
        }
    }

    /// Name of the base image of the job's machine.
    pub(super) fn image(&self) -> &str {
        self.record.machine_spec.as_ref().map_or(&self.runner.class.image, |spec| &spec.image.name)
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.parts.metrics
    }

    /// Time since GitLab's 201.
    pub(super) fn elapsed(&self) -> Duration {
        self.elapsed_before + self.started.elapsed()
    }

    /// The instant `after` GitLab's 201; at the earliest when this task began.
    pub(super) fn since_received(&self, after: Duration) -> Instant {
        self.started + after.saturating_sub(self.elapsed_before)
    }

    /// Whether the host's uptime has begun anew since GitLab's 201.
    pub(super) fn host_was_restarted(&self) -> bool {
        let up = self.parts.clock.uptime().as_millis();
        self.record.received_uptime_ms.is_some_and(|then| up < u128::from(then))
    }

    /// The same for what others must do meanwhile: time in which this process did not hear them is not counted.
    pub(super) fn awake_since_received(&self, after: Duration) -> Instant {
        self.parts.awake.deadline(self.awake_since, after.saturating_sub(self.elapsed_before))
    }

    /// Until when those who waited while this process slept are given time to be heard.
    pub(super) fn heard_after_sleep(&self) -> Instant {
        self.parts.awake.woke().map_or(self.started, |woke| woke + REOPENED_GRACE)
    }

    /// Since when the disk takes nothing of the guest's trace.
    pub(super) fn spool_failing_since(&self) -> Option<Instant> {
        self.spool.failing_since()
    }

    /// Until when a guest of before is given time to find its door open again.
    pub(super) fn reopened(&self) -> Instant {
        if self.adopted { self.started + REOPENED_GRACE } else { self.started }
    }

    /// The job's timeout, or the default for a job without one.
    pub(super) fn timeout(&self) -> Duration {
        let told = self.record.timeout_s.map(|seconds| Duration::from_secs(seconds).min(TIMEOUT_MAX));
        told.unwrap_or(self.parts.limits.default_timeout.get())
    }

    /// When the job's VM is destroyed at the latest, after GitLab's 201. A job without a timeout
    /// has nobody else to end it, so its default counts to the second.
    pub(super) fn cap(&self) -> Duration {
        let grace =
            if self.record.timeout_s.is_some() { self.parts.limits.timeout_grace.get() } else { Duration::ZERO };
        self.timeout().saturating_add(grace)
    }

    /// Writes `record` down, unless it stands there to the byte: hand-out and verdict are written before the state
    /// machine hears of them.
    async fn keep(&mut self, record: &Record) -> io::Result<()> {
        let bytes = serde_json::to_vec(record)?;
        if self.kept.as_ref() != Some(&bytes) {
            // What stands there once this was tried is known only if it succeeds.
            self.kept = None;
            self.journalled.put(&self.parts.journal, record).await?;
            self.kept = Some(bytes);
        }
        Ok(())
    }

    /// Writes the record. An error is logged here.
    pub(super) async fn put(&mut self) -> bool {
        let record = self.record.clone();
        match self.keep(&record).await {
            Ok(()) => {
                self.let_go.free();
                true
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "write the job's record");
                false
            }
        }
    }

    // ---- trace ----

    pub(super) async fn own_line(&mut self, text: impl FnOnce(Timestamp) -> String) {
        let text = text(self.parts.clock.now());
        if let Err(error) = self.spool.append_own(&text).await {
            tracing::warn!(error = chain(&error), "write a line of ours into the trace");
        }
    }

    /// Opens the trace of a job that begins. Not of one that a crash left half removed, its spool first: it has had its
    /// lines.
    pub(super) async fn begin_boot_section(&mut self) {
        let begins = matches!(self.record.state, State::Accepted | State::Booting { .. });
        if !begins || self.spool.view().length > 0 {
            return;
        }
        let sections = self.record.trace_sections;
        self.own_line(|now| lines::boot_section_start(now, sections)).await;
        self.section_open = true;
        let Some(spec) = &self.record.machine_spec else { return };
        let text = format!(
            "  image {}, {} CPUs, {} MiB memory, {} GiB disk",
            spec.image.name, spec.cpus, spec.memory_mib, spec.disk_gib
        );
        let containers = match &self.payload {
            Some(payload) if spec.executor == "shell" => lines::no_containers(&payload.containers),
            _ => None,
        };
        self.own_line(|now| lines::note(now, &text)).await;
        if let Some(text) = containers {
            self.own_line(|now| lines::note(now, &text)).await;
        }
    }

    pub(super) async fn end_boot_section(&mut self) {
        if std::mem::take(&mut self.section_open) {
            let sections = self.record.trace_sections;
            self.own_line(|now| lines::boot_section_end(now, sections)).await;
        }
    }

    /// Ends the guest's part of the trace and says in the record how ours ends it: with these lines.
    /// [`Machinery::write_last_lines`] puts them into the spool once the record is on disk.
    pub(super) async fn plan_last_lines(&mut self, text: impl FnOnce(Timestamp) -> String) {
        let now = self.parts.clock.now();
        let (offset, line_ended) = self.spool.end().await;
        let mut lines = if line_ended { String::new() } else { "\n".to_owned() };
        if std::mem::take(&mut self.section_open) {
            lines.push_str(&lines::boot_section_end(now, self.record.trace_sections));
        }
        lines.push_str(&text(now));
        self.record.last_lines = Some(LastLines { offset, text: lines });
    }

    /// The lines that the record names, if they are not in the spool yet, and that to disk.
    pub(super) async fn write_last_lines(&mut self) {
        // A guest's verdict was kept after its last byte was durable.
        let Some(last) = &self.record.last_lines else { return };
        self.spool.end_with(last.offset, &last.text).await;
        self.sync_spool().await;
    }

    async fn sync_spool(&self) {
        if let Err(error) = self.spool.sync().await {
            tracing::error!(error = chain(&error), "make the trace's spool durable");
        }
    }

    pub(super) fn mark_debug(&mut self) {
        self.record.debug_trace = true;
        self.debug_trace.send_replace(true);
    }

    /// Whether the guest has sent anything of its trace.
    pub(super) fn guest_has_written(&self) -> bool {
        self.record.guest_base.is_some_and(|base| self.spool.view().length > base)
    }

    /// Gives the verdict to the uploader. `false`: it had it.
    pub(super) fn outbox(&self, verdict: Verdict) -> bool {
        let verdict = Outbox::Verdict(verdict);
        self.outbox.send_if_modified(|outbox| {
            let news = *outbox != verdict;
            *outbox = verdict;
            news
        })
    }

    pub(super) fn abandon(&self) {
        self.outbox.send_replace(Outbox::Abandoned);
    }

    // ---- guest ----

    pub(super) fn tell_guest(&self, status: JobStatus) {
        self.guest_view.send_modify(|view| view.status = status);
    }

    pub(super) async fn close_guest(&self) {
        self.spool.close_guest().await;
        let verdict = match &self.record.state {
            State::Releasing { verdict, .. } => verdict.clone(),
            _ => None,
        };
        self.guest_view.send_modify(|view| {
            if verdict.is_none() {
                view.status = JobStatus::Over;
            }
            view.verdict = verdict;
        });
    }

    /// Keeps the guest's verdict: spool and record on disk, in this order. `false`: not kept.
    pub(super) async fn keep_verdict(&mut self, state: State) -> bool {
        self.spool.close_guest().await;
        let record = Record { state, ..self.record.clone() };
        let kept = match self.spool.sync().await {
            Ok(()) => self.keep(&record).await,
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            self.repeated.verdict_unkept.log(|line| tracing::error!(error = chain(&error), "{line}"));
            self.spool.reopen_guest().await;
            return false;
        }
        true
    }

    /// Writes down that the guest has its job. `false`: not written.
    pub(super) async fn keep_hand_out(&mut self) -> bool {
        let (state, _) = self.record.state.clone().on(Event::GuestAsked);
        let kept = self.keep(&Record { state, ..self.record.clone() }).await;
        if let Err(error) = &kept {
            self.repeated.hand_out_unkept.log(|line| tracing::error!(error = chain(error), "{line}"));
        }
        kept.is_ok()
    }

    pub(super) fn greeted(&self) {
        self.parts.supply.machine_came_up();
        if let Some(machine) = &self.machine {
            machine.greeted();
        }
    }

    /// The payload for the guest, its timeout less what the boot took beyond [`BOOT_FREE`] (decision D8); the trace is
    /// the guest's from here on. `None`: nothing is left of the job's time, or of the payload.
    pub(super) async fn hand_out(&mut self) -> Option<HandOut> {
        let payload = self.payload.clone()?;
        let elapsed = self.elapsed();
        let raw = match payload.timeout {
            None => payload.raw().clone(),
            Some(timeout) => {
                let left = timeout.saturating_sub(elapsed.saturating_sub(BOOT_FREE)).as_secs();
                if left == 0 {
                    return None;
                }
                payload.with_timeout(Duration::from_secs(left))
            }
        };
        if self.record.guest_base.is_none() {
            self.own_line(|now| lines::phase(now, "gitlab-runner asks for the job", elapsed)).await;
            self.end_boot_section().await;
            self.parts.metrics.job().phase("hand-out", elapsed);
            tracing::info!(
                elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                "job handed to its guest"
            );
            self.record.guest_base = Some(self.spool.begin_guest().await);
        }
        Some(HandOut { payload: raw, request_id: payload.request_id })
    }

    // ---- ends ----

    /// Removes all that is kept of the job.
    pub(super) async fn finish(&mut self) {
        if self.journalled.leaves_files() && forget(&self.parts, &self.record.key).await {
            reached(Point::K18);
        }
    }

    /// Lets go of everything for the next daemon.
    pub(super) async fn leave(&mut self) {
        if let Some(machine) = self.machine.take() {
            machine.leave().await;
        }
        if let Some(door) = self.door.take() {
            door.revoke().await;
        }
    }
}

/// Lets a panic of one of the job's tasks be the job's own.
fn resume(error: JoinError, what: &str) {
    tracing::error!("{what}");
    if let Ok(panic) = error.try_into_panic() {
        std::panic::resume_unwind(panic);
    }
}
