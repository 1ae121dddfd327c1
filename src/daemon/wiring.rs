//! What the pollers are made from: at the start, and again with each reload.

use super::{Backends, Installation, Jobs};
use crate::capacity::{Bounds, Capacity, Resources};
use crate::config::{Class, Config};
use crate::job::{Parts, Runner};
use crate::machine_spec::Size;
use crate::poller::{Poller, PollerView};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Memory kept for the host itself where nobody configured a bound, MiB.
const HOST_MEMORY_MIB: u64 = 1024;

/// What QEMU takes besides the guest's memory under TCG: translation cache and its own (decision D3).
const TCG_OVERHEAD_MIB: u64 = 256 + 150;

/// What QEMU takes besides the guest's memory under KVM.
const KVM_OVERHEAD_MIB: u64 = 150;

/// What QEMU takes besides a guest's memory.
pub(crate) fn overhead_mib(is_tcg: bool) -> u64 {
    if is_tcg { TCG_OVERHEAD_MIB } else { KVM_OVERHEAD_MIB }
}

/// A runner and what its poller says.
#[derive(Clone)]
pub(super) struct View {
    pub(super) runner: Arc<Runner>,
    pub(super) poller: watch::Receiver<PollerView>,
    /// What one job of it takes.
    pub(super) needs: Resources,
    /// Jobs at once of it.
    pub(super) limit: u32,
}

/// What was learnt at the start, and the configuration in force.
pub(super) struct Wiring {
    pub(super) config: Config,
    pub(super) backends: Backends,
    pub(super) installation: Installation,
    pub(super) capacity: Capacity,
    pub(super) jobs: Jobs,
    /// Of the host.
    pub(super) memory_mib: u64,
    /// For all virtual disks, if nobody configured a bound.
    pub(super) disk_gib: u64,
    /// Whether that counts.
    pub(super) disk_is_found: Arc<AtomicBool>,
    /// What the hypervisor takes besides a guest's memory.
    pub(super) overhead_mib: u64,
    pub(super) overlay_dir: PathBuf,
}

impl Wiring {
    /// Starts a poller for each runner.
    pub(super) fn poll(
        &self,
        runners: &BTreeMap<String, Arc<Runner>>,
        parts: &Parts,
        stop: &CancellationToken,
        close: &CancellationToken,
        pollers: &mut JoinSet<()>,
    ) -> Vec<View> {
        let config = &self.config;
        let spool_bytes = config.limits.spool_mib.saturating_mul(1 << 20);
        let reserve = config.capacity.disk_reserve_gib.saturating_mul(1 << 30).saturating_add(spool_bytes);
        let mut views = Vec::new();
        for runner in runners.values() {
            let (state, poller) = watch::channel(PollerView::begin());
            let (needs, limit) = (needs(&runner.class, self.overhead_mib), runner.config.limit.unwrap_or(u32::MAX));
            views.push(View { runner: runner.clone(), poller, needs, limit });
            let poller = Poller {
                parts: parts.clone(),
                runner: runner.clone(),
                capacity: self.capacity.clone(),
                resources: needs,
                limit,
                disk: (self.overlay_dir.clone(), reserve),
                jobs: self.jobs.clone(),
                state,
                stop: stop.clone(),
                close: close.clone(),
            };
            pollers.spawn(poller.run());
        }
        views
    }
}

/// What jobs may use of a host, as configured or as it was found.
pub(crate) fn bounds(config: &Config, memory_mib: u64, disk_gib: u64) -> Bounds {
    Bounds {
        jobs: config.concurrent,
        cpus: config.capacity.cpus.unwrap_or(u32::MAX),
        memory_mib: config.capacity.memory_mib.unwrap_or_else(|| memory_mib.saturating_sub(HOST_MEMORY_MIB)),
        disk_gib: config.capacity.disk_gib.unwrap_or(disk_gib),
    }
}

/// What one VM of this class takes of the host at most.
pub(crate) fn needs(class: &Class, overhead_mib: u64) -> Resources {
    let Size { cpus, memory_mib, disk_gib } = class.ceiling();
    Resources { cpus, memory_mib: memory_mib.saturating_add(overhead_mib), disk_gib }
}
