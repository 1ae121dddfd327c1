//! The jobs that are under way: the list that `daemon` joins and publishes.
//!
//! Shared by pollers (which add), the daemon (which joins) and the control socket (which reads and
//! kills). One mutex around the list, held for a few lines.

use super::journal::JobKey;
use super::{JobCommand, JobHandle, JobView, Looks, Reassigned};
use crate::capacity::Held;
use crate::control::KillOutcome;
use crate::gitlab::{JobId, JobPayload};
use crate::vm::VmId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// The list. Clones share it.
#[derive(Clone)]
pub struct Jobs {
    entries: Arc<Mutex<BTreeMap<JobKey, Entry>>>,
    tasks: mpsc::UnboundedSender<Started>,
    count: watch::Sender<usize>,
}

/// A job's task, to be joined, and what it holds.
pub(crate) struct Started {
    pub(crate) key: JobKey,
    pub(crate) task: JoinHandle<()>,
    pub(crate) reservation: Held,
}

struct Entry {
    inbox: mpsc::Sender<JobCommand>,
    view: watch::Receiver<JobView>,
    console: Looks,
}

impl Jobs {
    /// An empty list, and where its tasks come out to be joined. The channel is bounded by the
    /// capacity: one message per reservation.
    #[must_use]
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Started>) {
        let (tasks, out) = mpsc::unbounded_channel();
        let (count, _) = watch::channel(0);
        (Self { entries: Arc::default(), tasks, count }, out)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobKey, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job that has been started.
    pub fn add(&self, handle: JobHandle) {
        let count = {
            let mut entries = self.lock();
            entries
                .insert(handle.key.clone(), Entry { inbox: handle.inbox, view: handle.view, console: handle.console });
            entries.len()
        };
        self.count.send_replace(count);
        // The daemon's loop outlives all that add.
        let _ = self.tasks.send(Started { key: handle.key, task: handle.task, reservation: handle.reservation });
    }

    /// Takes a job off whose task has ended.
    pub(crate) fn remove(&self, key: &JobKey) {
        let count = {
            let mut entries = self.lock();
            entries.remove(key);
            entries.len()
        };
        self.count.send_replace(count);
    }

    /// Whether this job is under way.
    #[must_use]
    pub fn contains(&self, key: &JobKey) -> bool {
        self.lock().contains_key(key)
    }

    /// Waits until this job is not under way any more. Cancel safe.
    pub async fn gone(&self, key: &JobKey) {
        let mut count = self.count.subscribe();
        // The sender is ours, so this ends with the condition only.
        let _ = count.wait_for(|_| !self.contains(key)).await;
    }

    /// How many there are; for waiting.
    #[must_use]
    pub(crate) fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// Their views.
    #[must_use]
    pub fn views(&self) -> Vec<JobView> {
        self.lock().values().map(|entry| entry.view.borrow().clone()).collect()
    }

    /// The view of this job, and its machine's console.
    #[must_use]
    pub fn look(&self, key: &JobKey) -> Option<(JobView, Looks)> {
        self.lock().get(key).map(|entry| (entry.view.borrow().clone(), entry.console.clone()))
    }

    /// The views of all, and their machines' consoles.
    #[must_use]
    pub fn looks(&self) -> Vec<(JobView, Looks)> {
        self.lock().values().map(|entry| (entry.view.borrow().clone(), entry.console.clone())).collect()
    }

    /// Runner entries of which a job of this id is under way.
    #[must_use]
    pub fn runners(&self, id: JobId) -> BTreeSet<String> {
        self.lock().keys().filter(|key| key.id == id).map(|key| key.runner.clone()).collect()
    }

    /// VMs of theirs.
    #[must_use]
    pub(crate) fn vms(&self) -> BTreeSet<VmId> {
        self.views().into_iter().filter_map(|view| view.vm?.parse().ok()).collect()
    }

    /// Tells one job to end; its author reads `reason`.
    #[must_use]
    pub fn kill(&self, job: JobId, runner: Option<&str>, reason: Option<String>) -> KillOutcome {
        let entries = self.lock();
        let mut found = entries.iter().filter(|(key, _)| key.id == job && runner.is_none_or(|r| r == key.runner));
        match (found.next(), found.next()) {
            (None, _) => KillOutcome::Unknown,
            (Some((key, entry)), None) => {
                // A full inbox holds a kill, or a flood of GitLab's: then the operator may ask again.
                let _ = entry.inbox.try_send(JobCommand::Kill { reason });
                KillOutcome::Told { runner: key.runner.clone() }
            }
            (Some(_), Some(_)) => {
                let of_job = entries.keys().filter(|key| key.id == job);
                KillOutcome::Ambiguous { runners: of_job.map(|key| key.runner.clone()).collect() }
            }
        }
    }

    /// Tells a job that GitLab has given it out once more; what becomes of that is in its answer.
    /// `None`: it is not under way here.
    pub fn reassign(&self, key: &JobKey, payload: &JobPayload) -> Option<oneshot::Receiver<Reassigned>> {
        let entries = self.lock();
        let entry = entries.get(key)?;
        let (payload, (reply, answer)) = (Box::new(payload.clone()), oneshot::channel());
        // If it has ended in between, or hears nothing more, the reply is dropped.
        let _ = entry.inbox.try_send(JobCommand::Reassign { payload, reply });
        Some(answer)
    }

    /// Tells all jobs to end.
    pub(crate) fn kill_all(&self) {
        for entry in self.lock().values() {
            let _ = entry.inbox.try_send(JobCommand::Kill { reason: None });
        }
    }
}
