//! Disks of single machines that are written until their jobs are handed out: whose there are, and which are left over.

use crate::files::{Files, child};
use crate::telemetry::chain;
use crate::vm::{VmId, VmName};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SUFFIX: &str = ".img";

/// All of them.
pub(super) struct Slots {
    directory: PathBuf,
    /// Those that a job of this daemon has. Held for a line.
    taken: Arc<Mutex<BTreeSet<VmId>>>,
}

/// A machine's. Dropping it unlinks nothing: the sweep does, once its machine is gone.
#[derive(Debug)]
pub(super) struct Slot {
    path: PathBuf,
    vm: VmId,
    taken: Arc<Mutex<BTreeSet<VmId>>>,
}

fn lock(taken: &Mutex<BTreeSet<VmId>>) -> MutexGuard<'_, BTreeSet<VmId>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.vm);
    }
}

impl Slots {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, taken: Arc::default() }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A machine's: its name follows from the machine's, and parses back.
    pub(super) fn take(&self, vm: &VmId) -> Slot {
        lock(&self.taken).insert(vm.clone());
        Slot { path: self.path(vm), vm: vm.clone(), taken: self.taken.clone() }
    }

    /// Where a machine's is, if it has one.
    pub(super) fn path(&self, vm: &VmId) -> PathBuf {
        child(&self.directory, &format!("{}{SUFFIX}", VmName::from(vm.clone())))
    }

    /// Removes those whose machines are not among the living, and that no job has.
    pub(super) async fn sweep(&self, files: &dyn Files, living: &BTreeSet<VmId>) {
        let Ok(entries) = files.list(&self.directory).await else { return };
        for entry in entries {
            let vm = entry.name.strip_suffix(SUFFIX).and_then(VmName::parse);
            let is_used = vm.is_some_and(|vm| living.contains(vm.id()) || lock(&self.taken).contains(vm.id()));
            if !is_used && let Err(error) = files.remove(&child(&self.directory, &entry.name)).await {
                tracing::warn!(error = chain(&error), "remove a disk that a machine has left");
            }
        }
    }
}
