//! One job's part in it: its machine's disks, what is on its way to them, and what its author is told.

use super::slots::Slot;
use super::store::{Shelf, UpdateError};
use super::workshop::FetchError;
use super::{Attached, Clones};
use crate::telemetry::chain;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What a job's machine has of its repository. To be kept until the machine is gone.
pub struct JobClone {
    clones: Clones,
    attached: Attached,
    /// Bytes of the packs on its disks.
    bytes: u64,
    shelves: Vec<Arc<Shelf>>,
    slot: Option<Slot>,
    progress: Progress,
}

/// What its author is told, once the job is handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Bytes of packs that were there before the job.
    pub here: u64,
    /// Bytes that came while its machine booted, and how long that took.
    pub fetched: Option<(u64, Duration)>,
    /// Why no more came.
    pub missing: Option<&'static str>,
}

impl JobClone {
    pub(super) fn new(
        clones: Clones,
        attached: Attached,
        bytes: u64,
        shelves: Vec<Arc<Shelf>>,
        slot: Option<Slot>,
        progress: Progress,
    ) -> Self {
        Self { clones, attached, bytes, shelves, slot, progress }
    }

    /// The disks, for the record.
    #[must_use]
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Makes what the machine needs besides: once the record names it. Without a disk for it nothing comes later.
    pub async fn prepare(&mut self) {
        if let Some(slot) = &self.slot
            && let Err(error) = self.clones.make_slot(slot.path()).await
        {
            tracing::warn!(error = chain(&error), "make a disk for what is being fetched; the machine does without");
            self.progress.over.send_replace(true);
            self.attached.slot = None;
        }
    }

    /// Its machine has been started: its disks are open.
    pub fn machine_is_up(&self) {
        self.progress.up.send_replace(true);
    }

    /// The job is handed out, or never will be: nothing more goes to its machine. What it has, for its author.
    pub async fn close(&mut self) -> Told {
        self.progress.over.send_replace(true);
        self.clones.note_use(&self.shelves).await;
        let missing = match &*self.progress.outcome.borrow() {
            _ if self.slot.is_none() => None,
            Outcome::Filled(bytes, took) => {
                return Told { here: self.bytes, fetched: Some((*bytes, *took)), missing: None };
            }
            Outcome::Running => Some("what is new there was not fetched in time"),
            Outcome::Ended(why) => Some(*why),
        };
        Told { here: self.bytes, fetched: None, missing }
    }

    /// The machine is gone: so goes what was its own.
    pub async fn release(self) {
        self.progress.over.send_replace(true);
        if let Some(slot) = &self.slot
            && let Err(error) = self.clones.remove_slot(slot.path()).await
        {
            // The sweep tries it again.
            tracing::warn!(error = chain(&error), "remove a machine's disk for what was fetched");
        }
        self.clones.let_go(self.shelves).await;
    }
}

/// How far an update is.
#[derive(Clone, Debug)]
enum Outcome {
    Running,
    /// The machine has it.
    Filled(u64, Duration),
    /// It has come to nothing, and why, for authors.
    Ended(&'static str),
}

/// The job's ends of it.
pub(super) struct Progress {
    up: watch::Sender<bool>,
    over: watch::Sender<bool>,
    outcome: watch::Receiver<Outcome>,
}

/// The update's.
pub(super) struct Watched {
    up: watch::Receiver<bool>,
    over: watch::Receiver<bool>,
    outcome: watch::Sender<Outcome>,
}

impl Progress {
    pub(super) fn new() -> (Self, Watched) {
        let ((up, up_in), (over, over_in)) = (watch::channel(false), watch::channel(false));
        let (outcome, outcome_in) = watch::channel(Outcome::Running);
        (Self { up, over, outcome: outcome_in }, Watched { up: up_in, over: over_in, outcome })
    }
}

impl Watched {
    /// Waits until the machine has its disks open. `false`: it is too late for it, or there will be none.
    pub(super) async fn machine_is_up(&self) -> bool {
        let (mut up, mut over) = (self.up.clone(), self.over.clone());
        let up = tokio::select! {
            biased;
            // Both are cancel safe. An error: the job is gone.
            _ = over.wait_for(|over| *over) => false,
            up = up.wait_for(|up| *up) => up.is_ok(),
        };
        up && !*self.over.borrow()
    }

    /// Turns true when nothing more may go to the machine.
    pub(super) fn over(&self) -> watch::Receiver<bool> {
        self.over.clone()
    }

    pub(super) fn filled(&self, bytes: u64, took: Duration) {
        self.outcome.send_replace(Outcome::Filled(bytes, took));
    }

    pub(super) fn ended(&self, error: &UpdateError) {
        let why = match error {
            UpdateError::Fetch(FetchError::Refused(_)) => "GitLab did not let this host fetch what is new there",
            UpdateError::Fetch(FetchError::TooLarge) => "what is new there is more than this host keeps",
            UpdateError::Fetch(FetchError::Late) => "what is new there was not fetched in time",
            UpdateError::Fetch(FetchError::Failed(_) | FetchError::Io(_)) | UpdateError::Io(_) => {
                "what is new there could not be fetched"
            }
            UpdateError::NoRoom => "this host has no room for more",
            UpdateError::Rests => "it could not be fetched lately",
        };
        self.outcome.send_replace(Outcome::Ended(why));
    }
}
