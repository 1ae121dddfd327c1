//! What of ours belongs to nobody, and who takes it down meanwhile?
//!
//! At start and every minute [`recovery::orphans`] is asked, and what [`abandoned`] owners have left; each is reaped by a
//! task of its own, so that one that is stuck delays nobody, and holds room of the host as long as it is there:
//! a VM without a job is a VM all the same (threats.md, invariant 14).

use super::Jobs;
use crate::capacity::{Capacity, Held, Resources};
use crate::job::Parts;
use crate::recovery::{self, Orphan};
use crate::repeats::Repeats;
use crate::supply::unassigned::{Abandoned, abandoned};
use crate::telemetry::chain;
use crate::vm::{self, VmId};
use std::collections::BTreeSet;
use std::path::PathBuf;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Whose room an orphan takes, in the list of runner entries.
const NOBODY: &str = "(no runner)";

pub(super) struct Sweeper {
    pub(super) parts: Parts,
    pub(super) jobs: Jobs,
    /// VMs of records that nobody can serve now.
    pub(super) kept: BTreeSet<VmId>,
    pub(super) capacity: Capacity,
    /// What an orphan may take, of which no record tells.
    pub(super) unknown: Resources,
    /// Below which VMs without a job are written down.
    pub(super) workspaces: [PathBuf; 2],
    /// The hypervisor that is looked at: they are written down with its name.
    pub(super) hypervisor: vm::Config,
    /// Sweeps that saw nothing.
    pub(super) unseen: Repeats,
}

impl Sweeper {
    /// Sweeps until `stop`, in a task of `background`. What is returned ends with the first sweep,
    /// when all that it found has gone.
    pub(super) fn begin(
        self,
        stop: CancellationToken,
        background: &mut JoinSet<&'static str>,
    ) -> impl Future<Output = ()> + use<> {
        let first = CancellationToken::new();
        let swept = first.clone();
        background.spawn(async move {
            let mut reapers = JoinSet::new();
            self.sweep(&mut reapers, &stop).await;
            let mut first = Some(first.drop_guard());
            let mut next = tokio::time::Instant::now() + recovery::SWEEP_INTERVAL;
            loop {
                if reapers.is_empty() {
                    first = None;
                }
                tokio::select! {
                    biased;
                    // All are cancel safe. A reaper that panics leaves its orphan to the next sweep.
                    () = stop.cancelled() => break,
                    Some(_) = reapers.join_next() => {}
                    () = tokio::time::sleep_until(next) => {
                        self.sweep(&mut reapers, &stop).await;
                        next = tokio::time::Instant::now() + recovery::SWEEP_INTERVAL;
                    }
                }
            }
            drop(first);
            while reapers.join_next().await.is_some() {}
            "sweeper"
        });
        async move { swept.cancelled().await }
    }

    async fn sweep(&self, reapers: &mut JoinSet<()>, stop: &CancellationToken) {
        self.parts.history.prune().await;
        self.parts.consoles.prune().await;
        let owned = || {
            let mut owned = self.jobs.vms();
            owned.extend(self.kept.iter().cloned());
            owned
        };
        let orphans = recovery::orphans(&self.parts, &owned).await.unwrap_or_else(|error| {
            self.unseen.log(|line| tracing::warn!(error = chain(&error), "{line}"));
            Vec::new()
        });
        for orphan in orphans {
            let room: Option<Held> = orphan.is_vm.then(|| self.capacity.adopt(NOBODY, self.unknown).into());
            reapers.spawn(reap(self.parts.clone(), orphan, room, stop.clone()));
        }
        if let Some(caches) = &self.parts.caches {
            caches.sweep().await;
        }
        if let Some(clones) = &self.parts.clones {
            clones.sweep(&owned()).await;
        }
        for directory in &self.workspaces {
            for left in abandoned(&*self.parts.files, directory, &self.hypervisor).await {
                let room: Held = self.capacity.adopt(NOBODY, self.unknown).into();
                reapers.spawn(take_down(self.parts.clone(), left, self.hypervisor.clone(), room, stop.clone()));
            }
        }
    }
}

/// Takes one down, for ever trying.
async fn reap(parts: Parts, orphan: Orphan, room: Option<Held>, stop: CancellationToken) {
    let mut machine = recovery::reap(&parts, &orphan);
    tokio::select! {
        biased;
        // Both are cancel safe; the next daemon finds it again.
        () = stop.cancelled() => return machine.leave().await,
        () = machine.release() => {}
    }
    if let Some(room) = room {
        room.release();
    }
}

/// Takes down what a dead owner has left, for ever trying.
async fn take_down(parts: Parts, left: Abandoned, hypervisor: vm::Config, room: Held, stop: CancellationToken) {
    let path = left.directory().to_owned();
    tracing::warn!(path = %path.display(), "the owner of a VM without a job is gone; taking it down");
    tokio::select! {
        biased;
        // Both are cancel safe; the next daemon finds it again.
        () = stop.cancelled() => return,
        taken = left.take_down(&parts.supply, &hypervisor) => if let Err(error) = taken {
            tracing::warn!(path = %path.display(), error = chain(&error), "take it down; trying again in a minute");
        },
    }
    room.release();
}
