//! Where does this job's machine come from, who takes it down?
//!
//! Alone makes overlay, domain and address. Cold today; a restored or a warm machine is taken the
//! same way, so that the job's states need not know. Each machine has a task of its own
//! ([`machine`]), which alone calls the hypervisor for it, so a call that hangs holds up that one
//! machine and nobody else. What exists is asked of the hypervisor in one list for all machines.

mod losses;
mod machine;

pub use machine::{Machine, MachineEvent};

use crate::clock::Clock;
use crate::image::stamp::Stamp;
use crate::image::store::Image;
use crate::latest::Latest;
use crate::machine_spec::MachineSpec;
use crate::metrics::Metrics;
use crate::network::Lease;
use crate::network::{Network, NoFreePort, PortRange};
use crate::rng::Rng;
use crate::vm::{Accel, Boot, Host, Hypervisor, InstallationId, VmId, VmName, VmState};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::losses::Losses;

/// The names of one VM's things, from before any is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineRecord {
    /// Its id; all names follow from it.
    pub id: VmId,
    /// Its door.
    pub lease: Lease,
}

/// How often the hypervisor is asked for its list: a VM's end is seen within this time even if
/// nothing else tells it (threats.md V8).
const LIST_INTERVAL: Duration = Duration::from_secs(2);

/// Where machines are made. Clones share it.
#[derive(Clone)]
pub struct Supply(Arc<Shared>);

struct Shared {
    host: Host,
    clock: Clock,
    rng: Rng,
    network: Network,
    place: Place,
    metrics: Metrics,
    listing: Latest<Listing>,
    /// VMs that have a task here, so that no sweep takes them for orphans. Held for one line each.
    driven: Mutex<BTreeMap<VmId, Driven>>,
    losses: Losses,
}

/// The tasks of one VM in this daemon, of which one is at work: a second one waits for the call under way of a first
/// whose job's task has died.
#[derive(Clone, Default)]
struct Driven {
    tasks: usize,
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// What all machines of this daemon have in common.
#[derive(Clone, Debug)]
pub struct Place {
    /// Whose they are.
    pub installation: InstallationId,
    /// How they run.
    pub accel: Accel,
    /// Where overlays are.
    pub overlay_dir: PathBuf,
    /// Where the sockets of channel and console are.
    pub socket_dir: PathBuf,
}

/// The hypervisor's newest list.
#[derive(Clone, Debug, Default)]
struct Listing {
    /// When it was asked; a VM started later may be missing.
    asked: Option<Instant>,
    vms: BTreeMap<VmName, VmState>,
}

/// What one machine is made from.
pub struct Order {
    /// Its names, in the job's record already.
    pub machine: MachineRecord,
    /// Runner entry and job, for people.
    pub bound: (String, u64),
    /// The guest config, as a line: its pass is in it, so an order never prints.
    pub config: Vec<u8>,
    /// What to make the VM from if there is none. `None`: its guest has its job already; a VM that
    /// is gone has stopped, and no other is made.
    pub make: Option<Blueprint>,
}

/// A VM that does not exist yet.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Virtual disk, GiB.
    pub disk_gib: u64,
    /// The base image's disk.
    pub base: PathBuf,
    /// How it boots.
    pub boot: Boot,
    /// By what the image's files were known when they were checked.
    pub stamp: Stamp,
}

impl Blueprint {
    /// The machine of this spec, from its image.
    #[must_use]
    pub fn new(spec: &MachineSpec, image: Image) -> Self {
        Self {
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            disk_gib: spec.disk_gib,
            base: image.disk,
            boot: image.boot,
            stamp: image.stamp,
        }
    }
}

impl Supply {
    /// A supply, and the task that asks for the list; it ends with `stop`.
    #[must_use]
    pub fn new(
        host: Host,
        clock: Clock,
        rng: Rng,
        network: Network,
        place: Place,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let listing = Latest::new(Listing::default());
        let shared = Arc::new(Shared {
            host,
            clock,
            rng,
            network,
            place,
            metrics,
            listing,
            driven: Mutex::default(),
            losses: Losses::default(),
        });
        let supply = Self(shared);
        let lister = supply.clone();
        #[expect(clippy::disallowed_methods, reason = "joined by daemon")]
        let task = tokio::spawn(async move { lister.keep_listing(stop).await });
        (supply, task)
    }

    /// Chooses the names of a new machine, its door's port among them. Nothing is made yet.
    ///
    /// # Errors
    /// [`NoFreePort`].
    pub fn plan(&self) -> Result<MachineRecord, NoFreePort> {
        Ok(MachineRecord { id: VmId::random(&self.0.rng), lease: self.0.network.lease()? })
    }

    /// Another range of ports for the doors to come.
    pub fn set_ports(&self, range: PortRange) {
        self.0.network.set_ports(range);
    }

    /// Takes a recorded plan up again, after a restart.
    pub fn adopt(&self, machine: &MachineRecord) {
        self.0.network.adopt(&machine.lease);
    }

    /// Gives a plan back: nothing was made of it, or all of it is gone and its door closed. `in_use`: its port is somebody else's.
    pub fn forget(&self, machine: &MachineRecord, in_use: bool) {
        if in_use {
            self.0.network.release_in_use(&machine.lease);
        } else {
            self.0.network.release(&machine.lease);
        }
    }

    /// Makes a machine, or goes on with one of this name that runs already. Returns at once; the
    /// machine's events tell how it went.
    #[must_use]
    pub fn take(&self, order: Order) -> Machine {
        Machine::make(self.clone(), order)
    }

    /// Takes down whatever there is of a machine whose maker is gone.
    #[must_use]
    pub fn reap(&self, machine: MachineRecord) -> Machine {
        Machine::reap(self.clone(), machine)
    }

    /// The common part of all machines.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// The hypervisor.
    #[must_use]
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.0.host.hypervisor
    }

    /// The host: machines, and what lies beside them.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.0.host
    }

    /// A machine was lost before its guest showed the pass; why, in words for operators.
    pub fn machine_was_lost(&self, why: &'static str) {
        self.0.losses.lost_booting(why);
    }

    /// A machine was stopped in mid-job, by nothing that its guest can bring about at will; why, likewise.
    pub fn machine_was_stopped(&self, why: &'static str) {
        self.0.losses.stopped(why);
    }

    /// A guest has shown its pass: machines can be made here.
    pub fn machine_came_up(&self) {
        self.0.losses.came_up();
    }

    /// A job came to its own end: machines live here.
    pub fn machine_did_well(&self) {
        self.0.losses.did_well();
    }

    /// Why jobs had better run elsewhere: this host loses one machine after the other. In words for operators.
    #[must_use]
    pub fn unfit(&self) -> Option<String> {
        self.0.losses.unfit()
    }

    /// The VMs that have a task in this daemon.
    #[must_use]
    pub fn driven(&self) -> BTreeSet<VmId> {
        self.0.driven.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// One task more for this VM; what it must hold while it works.
    fn begin(&self, id: &VmId) -> Arc<tokio::sync::Mutex<()>> {
        let mut driven = self.0.driven.lock().unwrap_or_else(PoisonError::into_inner);
        let driven = driven.entry(id.clone()).or_default();
        driven.tasks += 1;
        driven.turn.clone()
    }

    /// One less.
    fn end(&self, id: &VmId) {
        let mut driven = self.0.driven.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tasks) = driven.get_mut(id).map(|driven| &mut driven.tasks) else { return };
        *tasks -= 1;
        if *tasks == 0 {
            driven.remove(id);
        }
    }

    fn overlay(&self, id: &VmId) -> PathBuf {
        overlay_path(&self.0.place.overlay_dir, id)
    }

    async fn keep_listing(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                // Both are cancel safe; the stop goes first.
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LIST_INTERVAL) => {}
            }
            if self.driven().is_empty() {
                continue;
            }
            let asked = Instant::now();
            match self.0.host.hypervisor.list(&self.0.place.installation).await {
                Ok(vms) => {
                    let vms = vms.into_iter().map(|vm| (vm.name, vm.state)).collect();
                    self.0.listing.send(Listing { asked: Some(asked), vms });
                }
                // Machines live on without us looking; each call of theirs reports its own trouble.
                Err(error) => tracing::debug!(error = crate::telemetry::chain(&error), "list VMs"),
            }
        }
    }
}

/// Path of a VM's overlay. Parses back by [`overlay_id`].
#[must_use]
pub fn overlay_path(dir: &Path, id: &VmId) -> PathBuf {
    dir.join(format!("df-{id}.qcow2"))
}

/// The VM whose overlay this is; `None`: not one of ours.
#[must_use]
pub fn overlay_id(path: &Path) -> Option<VmId> {
    path.file_name()?.to_str()?.strip_prefix("df-")?.strip_suffix(".qcow2")?.parse().ok()
}
