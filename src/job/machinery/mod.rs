//! The moving parts of one job: spool, uploader, machine, door, record. `task` decides, this acts.

mod cached;
mod clone;
mod machine;
mod past;
mod phases;
mod reached;
mod repeated;
mod times;
mod trace;

use self::phases::Phases;
use self::repeated::Repeated;
use self::times::Times;
pub(super) use self::times::age;
use self::trace::Trace;
use super::journal::Record;
use super::keeper::Kept;
use super::past::{Looks, Past};
use super::state::State;
use super::{Parts, Runner, forget};
use crate::awake::Moment;
use crate::cache::JobCache;
use crate::clones::JobClone;
use crate::failpoint::{Point, reached};
use crate::gitlab::{JobPayload, JobStatus};
use crate::guest::{DoorHandle, GuestEvent, GuestView};
use crate::metrics::Metrics;
use crate::spool::Spool;
use crate::supply::{Claim, Machine, MachineEvent};
use crate::telemetry::chain;
use crate::uploader::UploaderEvent;
use dayfly_egress::audit::Destination;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinError;
use tokio::time::Instant;

/// Events that may wait for the job from its guest; a full queue makes them wait.
const EVENTS_MAX: usize = 64;

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
    /// When the guest gave its last sign of life, or its door was opened.
    pub(super) last_spoke: Moment,
    runner: Arc<Runner>,
    payload: Option<JobPayload>,
    /// What it may have of the caches.
    cache: Option<JobCache>,
    /// The image that could not be used when the job came.
    image: Option<String>,
    times: Times,
    phases: Phases,
    trace: Trace,
    door: Option<DoorHandle>,
    guest_out: mpsc::Sender<GuestEvent>,
    guest_in: mpsc::Receiver<GuestEvent>,
    guest_view: watch::Sender<GuestView>,
    machine: Option<Machine>,
    /// What its machine has of the job's repository.
    clone: Option<JobClone>,
    /// Machines that are gone, and whose leases a record on disk may still name.
    gone: Vec<Claim>,
    /// The task of the machine died of a bug: when that is news for the job.
    machine_task_lost: Option<Instant>,
    /// The machine is being released for another one.
    another: bool,
    /// All that the job has reached, until it is counted.
    reached: Vec<Destination>,
    /// The record was not taken by the disk at the last try.
    unkept: bool,
    /// Lines of the log that the guest may bring about.
    pub(super) repeated: Repeated,
    /// What is noted for the job's end.
    pub(super) past: Past,
    /// Where others look at the machine's console.
    looks: Looks,
    /// How its machine came to be, as far as is known: `cold`, `restored`.
    pub(super) came_from: &'static str,
}

impl Machinery {
    /// Starts the uploader. `image`: the one that could not be used when the job came.
    pub(super) fn new(
        parts: Parts,
        runner: Arc<Runner>,
        record: Record,
        journalled: Kept,
        payload: Option<JobPayload>,
        spool: Spool,
        (image, past, looks): (Option<String>, Past, Looks),
    ) -> Self {
        let (guest_out, guest_in) = mpsc::channel(EVENTS_MAX);
        let update_interval = parts.limits.guest_update_interval.get();
        let (guest_view, _) = watch::channel(GuestView { status: JobStatus::Running, verdict: None, update_interval });
        let cache = cached::of(&parts, &record, payload.as_ref());
        if let Some(cache) = &cache {
            cache.go_on(past.cache.clone());
        }
        Self {
            cache,
            times: Times::of(&parts, &record),
            phases: Phases::default(),
            trace: Trace::begin(&parts, &runner, &record, spool),
            last_spoke: parts.awake.now(),
            door: None,
            guest_out,
            guest_in,
            guest_view,
            machine: None,
            clone: None,
            gone: Vec::new(),
            machine_task_lost: None,
            another: false,
            reached: Vec::new(),
            unkept: false,
            repeated: Repeated::default(),
            past,
            looks,
            came_from: "cold",
            parts,
            record,
            journalled,
            runner,
            payload,
            image,
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
                Some(event) = self.trace.uploads.recv() => return match event {
                    UploaderEvent::Status(status) => Next::Gitlab(status),
                    UploaderEvent::Waits(what) => Next::Waits(what),
                    UploaderEvent::Done => {
                        reached(Point::K15);
                        Next::Delivered
                    }
                },
                Some(ended) = self.trace.tasks.join_next() => if let Err(error) = ended {
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
        let chosen = self.record.machine_spec.as_ref().map(|spec| &spec.image.name);
        chosen.or(self.image.as_ref()).unwrap_or(&self.runner.class.image)
    }

    /// Whether GitLab lists this failure reason, as far as the payload says.
    pub(super) fn gitlab_knows(&self, reason: &str) -> bool {
        self.payload.as_ref().is_some_and(|payload| payload.failure_reasons.iter().any(|known| known == reason))
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.parts.metrics
    }

    /// Writes the record. An error is logged here.
    pub(super) async fn put(&mut self) -> bool {
        match self.keep().await {
            Ok(()) => {
                if std::mem::take(&mut self.unkept) {
                    tracing::info!("the job's record is on disk again");
                }
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.unkept, true) {
                    self.repeated.record_unkept.log(|line| tracing::error!(error = chain(&error), "{line}"));
                }
                false
            }
        }
    }

    async fn keep(&mut self) -> io::Result<()> {
        self.journalled.put(&self.parts.journal, &self.record).await?;
        // It names no machine any more that is gone.
        self.release_leases().await;
        Ok(())
    }

    /// Writes the record of what a guest is told next; with its verdict the trace first, which that ends. `false`: not
    /// written, which is logged here.
    pub(super) async fn commit(&mut self, verdict: bool) -> bool {
        let sealed = if verdict { self.seal_trace().await } else { Ok(()) };
        if verdict && sealed.is_ok() {
            self.plan_sections().await;
        }
        let kept = match sealed {
            Ok(()) => self.keep().await,
            Err(error) => Err(error),
        };
        let Err(error) = kept else { return true };
        if verdict {
            // It goes on, and may reach more.
            (self.record.last_lines, self.record.reached) = (None, Vec::new());
        }
        let repeats = if verdict { &mut self.repeated.verdict_unkept } else { &mut self.repeated.hand_out_unkept };
        repeats.log(|line| tracing::error!(error = chain(&error), "{line}"));
        false
    }

    /// Removes all that is kept of the job.
    pub(super) async fn finish(&mut self) {
        self.let_caches_go().await;
        if self.journalled.leaves_files() && forget(&self.parts, &self.record.key).await {
            reached(Point::K18);
        }
    }

    /// Lets go of everything for the next daemon.
    pub(super) async fn leave(&mut self) {
        self.take_past_along().await;
        if let Some(machine) = self.machine.take() {
            machine.leave().await;
        }
        if let Some(door) = self.door.take() {
            door.revoke().await;
        }
        if self.record.state == State::Ended {
            self.release_leases().await;
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
