//! A job's trace and its guest: our lines before and after the guest's, what it is given, what GitLab is told.

use super::Machinery;
use crate::gitlab::{JobClient, JobStatus, Verdict};
use crate::guest::HandOut;
use crate::job::journal::{LastLines, Record};
use crate::job::state::State;
use crate::job::{Parts, Runner, lines};
use crate::metrics::Phase;
use crate::secret::Secret;
use crate::spool::Spool;
use crate::telemetry::chain;
use crate::uploader::{Outbox, Upload, UploaderEvent, upload};
use jiff::Timestamp;
use std::io;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// So much of the boot is not the author's: the guest gets the job's whole timeout (decision D8).
const BOOT_FREE: Duration = Duration::from_secs(60);

/// How long the guest's verdict may wait for what its machine has used.
const USAGE_PATIENCE: Duration = Duration::from_millis(500);

/// Events that may wait for the job from its uploader; a full queue makes it wait.
const EVENTS_MAX: usize = 64;

/// A job's trace, and the uploader that sends it.
pub(super) struct Trace {
    pub(super) spool: Spool,
    outbox: watch::Sender<Outbox>,
    pub(super) debug_trace: watch::Sender<bool>,
    pub(super) uploads: mpsc::Receiver<UploaderEvent>,
    /// The uploader; aborted when this is dropped.
    pub(super) tasks: JoinSet<()>,
    /// The job's calls, for uploader and door.
    pub(super) client: JobClient,
    /// The token of a newer 201, for the uploader.
    pub(super) newer_token: watch::Sender<Option<Secret>>,
    /// The boot section stands open in it.
    section_open: bool,
}

impl Trace {
    /// Starts the uploader.
    pub(super) fn begin(parts: &Parts, runner: &Runner, record: &Record, spool: Spool) -> Self {
        let limits = &parts.limits;
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
            keepalive: limits.keepalive.get(),
            keep: limits.outbox_keep.get(),
            trace_patience: limits.trace_patience.get(),
            guest_interval: limits.guest_update_interval.get(),
            awake: parts.awake.clone(),
            metrics: parts.metrics.clone(),
            rng: parts.rng.clone(),
            clock: parts.clock.clone(),
        };
        tasks.spawn(tracing::Instrument::in_current_span(upload(upload_parts)));
        let section_open = record.guest_base.is_none() && spool.view().length > 0;
        Self { spool, outbox, debug_trace, uploads, tasks, client, newer_token, section_open }
    }
}

impl Machinery {
    /// Since when the disk takes nothing of the guest's trace.
    pub(in crate::job) fn spool_failing_since(&self) -> Option<Instant> {
        self.trace.spool.failing_since()
    }

    pub(in crate::job) async fn own_line(&mut self, text: impl FnOnce(Timestamp) -> String) {
        let text = text(self.parts.clock.now());
        if let Err(error) = self.trace.spool.append_own(&text).await {
            tracing::warn!(error = chain(&error), "write a line of ours into the trace");
        }
    }

    /// Opens the trace of a job that begins. Not of one that a crash left half removed, its spool first: it has had its
    /// lines.
    pub(in crate::job) async fn begin_boot_section(&mut self) {
        let begins = matches!(self.record.state, State::Accepted | State::Booting { .. });
        if !begins || self.trace.spool.view().length > 0 {
            return;
        }
        let sections = self.record.trace_sections;
        self.own_line(|now| lines::boot_section_start(now, sections)).await;
        self.trace.section_open = true;
        let Some(spec) = &self.record.machine_spec else { return };
        let text = format!(
            "  image {}, {} CPUs, {} MiB memory, {} GiB disk",
            spec.image.name, spec.cpus, spec.memory_mib, spec.disk_gib
        );
        let notes = spec.notes.clone();
        self.own_line(|now| lines::note(now, &text)).await;
        for text in notes {
            self.own_line(|now| lines::note(now, &format!("  {text}"))).await;
        }
    }

    pub(in crate::job) async fn end_boot_section(&mut self) {
        if std::mem::take(&mut self.trace.section_open) {
            let sections = self.record.trace_sections;
            self.own_line(|now| lines::boot_section_end(now, sections)).await;
        }
    }

    /// Ends the guest's part of the trace and says in the record how ours ends it: with these lines.
    /// [`Machinery::write_last_lines`] puts them into the spool once the record is on disk.
    pub(in crate::job) async fn plan_last_lines(&mut self, text: impl FnOnce(Timestamp) -> String) {
        let now = self.parts.clock.now();
        let (offset, line_ended) = self.trace.spool.end().await;
        let mut lines = if line_ended { String::new() } else { "\n".to_owned() };
        if std::mem::take(&mut self.trace.section_open) {
            lines.push_str(&lines::boot_section_end(now, self.record.trace_sections));
        }
        lines.push_str(&text(now));
        self.record.last_lines = Some(LastLines { offset, text: lines });
    }

    /// Says in the record that the trace of a guest that has told its verdict ends with what its machine has used and
    /// reached, as far as that is known in time. The guest waits for its answer meanwhile, so the machine is there.
    pub(super) async fn plan_sections(&mut self) {
        let Some(id) = self.record.machine.as_ref().map(|claim| claim.id.clone()) else { return };
        let supply = self.parts.supply.clone();
        // Both at once: half a second in all.
        let (usage, ()) = tokio::join!(supply.usage(&id, USAGE_PATIENCE), self.look_at_reached());
        let (now, sections) = (self.parts.clock.now(), self.record.trace_sections);
        // What the log masks is not known any more after a restart of the host.
        let masks = self.payload.as_ref().map(|payload| payload.masks.as_slice());
        let mut section = lines::Section::of(&usage);
        self.add_cache_rows(&mut section);
        let mut text = masks.map_or_else(String::new, |masks| section.text(now, sections, masks));
        text.push_str(&self.reached_section(now));
        text.extend(self.kept_line(now));
        // Else there would be a record of no lines.
        if !text.is_empty() {
            self.plan_last_lines(|_| text).await;
        }
    }

    /// What the author reads of a machine that is kept, if it is.
    pub(in crate::job) fn kept_line(&self, now: Timestamp) -> Option<String> {
        let keep = self.record.machine_spec.as_ref()?.keep_failed.filter(|_| self.record.state.is_kept())?;
        Some(lines::kept(now, self.record.key.id.0, Duration::from_secs(keep.for_s)))
    }

    /// The lines that the record names, if they are not in the spool yet, and that to disk.
    pub(in crate::job) async fn write_last_lines(&mut self) {
        // A guest's verdict was kept after its last byte was durable.
        let Some(last) = &self.record.last_lines else { return };
        self.trace.spool.end_with(last.offset, &last.text).await;
        self.sync_spool().await;
    }

    async fn sync_spool(&self) {
        if let Err(error) = self.trace.spool.sync().await {
            tracing::error!(error = chain(&error), "make the trace's spool durable");
        }
    }

    pub(in crate::job) fn mark_debug(&mut self) {
        self.record.debug_trace = true;
        self.trace.debug_trace.send_replace(true);
    }

    /// Whether the guest has sent anything of its trace.
    pub(in crate::job) fn guest_has_written(&self) -> bool {
        self.record.guest_base.is_some_and(|base| self.trace.spool.view().length > base)
    }

    /// Gives the verdict to the uploader. `false`: it had it.
    pub(in crate::job) fn outbox(&self, verdict: Verdict) -> bool {
        let verdict = Outbox::Verdict(verdict);
        self.trace.outbox.send_if_modified(|outbox| {
            let news = *outbox != verdict;
            *outbox = verdict;
            news
        })
    }

    /// `true`: it had no verdict.
    pub(in crate::job) fn abandon(&self) -> bool {
        self.trace.outbox.send_replace(Outbox::Abandoned) == Outbox::Empty
    }

    /// What is left of the job's own time, in whole seconds; `None`: it has no bound.
    fn time_left(&self) -> Option<Duration> {
        let timeout = self.payload.as_ref()?.timeout?;
        Some(Duration::from_secs(timeout.saturating_sub(self.elapsed().saturating_sub(BOOT_FREE)).as_secs()))
    }

    /// Whether there is a payload for the guest, and time for it.
    pub(in crate::job) fn is_in_time(&self) -> bool {
        self.payload.is_some() && self.time_left().is_none_or(|left| !left.is_zero())
    }

    /// The payload for the guest, its timeout less what the boot took beyond [`BOOT_FREE`] (decision D8). `None`: nothing
    /// is left of the job's time, or of the payload.
    pub(in crate::job) fn payload_for_guest(&self) -> Option<HandOut> {
        let payload = self.payload.as_ref()?;
        // Looked at once: it may end between two looks.
        let raw = match self.time_left() {
            Some(left) if left.is_zero() => return None,
            Some(left) => payload.with_timeout(left),
            None => payload.raw().clone(),
        };
        Some(HandOut { payload: raw, request_id: payload.request_id.clone() })
    }

    /// The trace is the guest's from here on.
    pub(in crate::job) async fn begin_guest(&mut self) {
        if self.record.guest_base.is_some() {
            return;
        }
        self.close_clone().await;
        let elapsed = self.elapsed();
        self.own_line(|now| lines::phase(now, "gitlab-runner asks for the job", elapsed)).await;
        self.end_boot_section().await;
        self.parts.metrics.job().boot_step("hand-out", elapsed);
        self.parts.metrics.job().start(self.came_from, elapsed);
        self.begin_phase(Phase::Run);
        tracing::info!(elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX), "job handed to its guest");
        self.record.guest_base = Some(self.trace.spool.begin_guest().await);
    }

    /// The guest writes no more, and what it has written is durable.
    pub(super) async fn seal_trace(&self) -> io::Result<()> {
        self.trace.spool.close_guest().await;
        self.trace.spool.sync().await
    }

    /// It goes on.
    pub(in crate::job) async fn reopen_guest(&self) {
        self.trace.spool.reopen_guest().await;
    }

    pub(in crate::job) fn tell_guest(&self, status: JobStatus) {
        self.guest_view.send_modify(|view| view.status = status);
    }

    pub(in crate::job) async fn close_guest(&self) {
        self.trace.spool.close_guest().await;
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

    pub(in crate::job) fn greeted(&self) {
        self.parts.supply.machine_came_up();
        if let Some(machine) = &self.machine {
            machine.greeted();
        }
    }
}
