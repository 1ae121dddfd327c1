//! Where does this job's guest come from, who takes it down?
//!
//! The same steps for whoever owns it, and for whatever it comes from, so that the job's states need not know:
//!
//! | step | does | on the host then |
//! | --- | --- | --- |
//! | [`claim`](Supply::claim) | chooses all names, and the lease | nothing; the owner writes it down |
//! | [`listen`](Supply::listen) | opens the guest's door | a listener, if it is at a port |
//! | [`start`](Supply::start) | makes the VM | overlay, VM, sockets |
//! | [`bind`](Machine::bind) | gives the guest its guest config | the same; its guest is somebody |
//! | [`event`](Machine::event) | tells how it does | |
//! | [`take_down`](Machine::take_down) | takes it down, for ever trying | nothing; the record names it still |
//! | [`release`](Supply::release) | gives the lease back, when no record names it | nothing |
//!
//! Where a guest comes from, a boot or a machine that was frozen ([`goldens`]), shows in the events alone: one that cannot be
//! restored boots, and its owner hears of a line.
//!
//! Each VM has a task of its own ([`machine`]), which alone calls the hypervisor for it, so a call that hangs holds up
//! that one and nobody else. What exists is asked of the hypervisor in one list for all VMs.

mod egress;
pub mod goldens;
mod losses;
mod machine;
mod silence;
pub mod unassigned;
mod users;
mod wires;

pub use machine::{Binding, Machine, MachineEvent, Screen};
pub use users::Users;

use crate::clock::Clock;
use crate::clones::Attached;
use crate::image::store::Image;
use crate::latest::Latest;
use crate::machine_spec::MachineSpec;
use crate::metrics::Metrics;
use crate::network::{DoorKind, Entrance, Lease, LeaseError, Mode, Network, PortRange};
use crate::rng::Rng;
use crate::vm::sockets::DoorSocket;
use crate::vm::{
    Accel, Confinement, Frozen, Host, Hypervisor, InstallationId, ReadOnlyDisk, Usage, VmError, VmId, VmName, VmSpec,
    VmState, VmSummary, VmUser,
};
use dayfly_guest_config::{CLONE_SLOT_SERIAL, GuestConfig, clone_serial};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::goldens::{Goldens, Key};
use self::losses::Losses;
use self::machine::NewVm;
use self::silence::Silence;

/// The names of one VM's things, from before any is made. Plain data, for its owner's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Its id; all names follow from it.
    pub id: VmId,
    /// What it holds of the host's network, its door among that.
    pub lease: Lease,
    /// As whom its QEMU runs, of the host's users for VMs; none: as all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<VmUser>,
    /// Disks with what the host has of its job's repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone: Option<Attached>,
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
    setup: Setup,
    metrics: Metrics,
    listing: Latest<Listing>,
    /// VMs that have a task here, so that no sweep takes them for orphans. Held for one line each.
    driven: Mutex<BTreeMap<VmId, Driven>>,
    losses: Losses,
    silence: Silence,
    goldens: Goldens,
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
pub struct Setup {
    /// Whose they are.
    pub installation: InstallationId,
    /// How they run.
    pub accel: Accel,
    /// Where overlays are.
    pub overlay_dir: PathBuf,
    /// Where the sockets of channel, door and console are.
    pub socket_dir: PathBuf,
    /// As whom their QEMUs run.
    pub users: Users,
}

/// The hypervisor's newest list.
#[derive(Clone, Debug, Default)]
struct Listing {
    /// When it was asked; a VM started later may be missing.
    asked: Option<Instant>,
    vms: BTreeMap<VmName, VmState>,
}

impl Supply {
    /// A supply, and the task that asks for the list; it ends with `stop`.
    #[must_use]
    pub fn new(
        host: Host,
        clock: Clock,
        rng: Rng,
        network: Network,
        setup: Setup,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let listing = Latest::new(Listing::default());
        let shared = Arc::new(Shared {
            host,
            clock,
            rng,
            network,
            setup,
            metrics,
            listing,
            driven: Mutex::default(),
            losses: Losses::default(),
            silence: Silence::default(),
            goldens: Goldens::default(),
        });
        let supply = Self(shared);
        let lister = supply.clone();
        #[expect(clippy::disallowed_methods, reason = "joined by daemon")]
        let task = tokio::spawn(async move { lister.keep_listing(stop).await });
        (supply, task)
    }

    /// The same supply with another setup, whose VMs it takes down. No list is kept of those.
    pub(crate) fn at(&self, host: Host, setup: Setup) -> Self {
        let Shared { clock, rng, network, metrics, .. } = &*self.0;
        Self(Arc::new(Shared {
            host,
            clock: clock.clone(),
            rng: rng.clone(),
            network: network.clone(),
            setup,
            metrics: metrics.clone(),
            listing: Latest::new(Listing::default()),
            driven: Mutex::default(),
            losses: Losses::default(),
            silence: Silence::default(),
            // Whoever has a place of its own says itself what is restored there.
            goldens: Goldens::default(),
        }))
    }

    /// Chooses the names of a new VM, its lease among them. Nothing is made yet.
    ///
    /// # Errors
    /// [`LeaseError`].
    pub async fn claim(&self, network: Mode, door: DoorKind) -> Result<Claim, LeaseError> {
        let user = self.0.setup.users.take()?;
        match self.0.network.acquire(network, door).await {
            Ok(lease) => Ok(Claim { id: VmId::random(&self.0.rng), lease, user, clone: None }),
            Err(error) => {
                user.iter().for_each(|user| self.0.setup.users.release(user));
                Err(error)
            }
        }
    }

    /// Takes a recorded claim up again, after a restart: nobody else is given its lease.
    pub fn adopt(&self, claim: &Claim) {
        self.0.network.adopt(&claim.lease);
        claim.user.iter().for_each(|user| self.0.setup.users.adopt(user));
    }

    /// Opens the door of a guest.
    ///
    /// # Errors
    /// See [`Network::listen`].
    pub async fn listen(&self, claim: &Claim) -> io::Result<Entrance> {
        let wire = DoorSocket::new(self.0.host.sockets.clone(), self.0.setup.socket_dir.clone(), claim.id.clone());
        self.0.network.listen(&claim.lease, wire).await
    }

    /// Makes a VM for this job of a runner entry, from this image, or goes on with it if it runs already. Returns at
    /// once; the machine's events tell how it went. `config`: what its guest will be told ([`Machine::bind`]).
    #[must_use]
    pub fn start(
        &self,
        claim: Claim,
        spec: &MachineSpec,
        image: Image,
        job: (String, u64),
        config: &GuestConfig,
    ) -> Machine {
        let golden = self.0.goldens.find(spec, config, image.manifest.can_hold());
        self.start_from(claim, spec, image, job, golden)
    }

    /// The same from what was frozen here and stands in no list yet: the first to be restored from it.
    #[must_use]
    pub(crate) fn start_of(
        &self,
        claim: Claim,
        spec: &MachineSpec,
        image: Image,
        job: (String, u64),
        (key, frozen): (Key, Frozen),
    ) -> Machine {
        self.start_from(claim, spec, image, job, Some((key, frozen)))
    }

    fn start_from(
        &self,
        claim: Claim,
        spec: &MachineSpec,
        image: Image,
        job: (String, u64),
        golden: Option<(Key, Frozen)>,
    ) -> Machine {
        let setup = &self.0.setup;
        let new = NewVm {
            spec: VmSpec {
                id: claim.id.clone(),
                installation: setup.installation.clone(),
                bound: Some(job),
                cpus: spec.cpus,
                memory_mib: spec.memory_mib,
                accel: setup.accel,
                boot: image.boot,
                overlay: self.overlay(&claim.id),
                base: image.disk,
                frozen: None,
                attachment: claim.lease.attachment(),
                read_only: read_only(claim.clone.as_ref()),
                nested: spec.nested,
                confine: Confinement { user: claim.user.clone(), limits: spec.limits.clone() },
                socket_dir: setup.socket_dir.clone(),
            },
            disk_gib: spec.disk_gib,
            stamp: image.stamp,
            golden,
        };
        Machine::start(self.clone(), claim, Some(new))
    }

    /// Goes on with a VM that must run: its guest has its job already. One that is gone has stopped, and no other is
    /// made.
    #[must_use]
    pub fn resume(&self, claim: Claim) -> Machine {
        Machine::start(self.clone(), claim, None)
    }

    /// Takes down whatever there is of a claim.
    #[must_use]
    pub fn reap(&self, claim: Claim) -> Machine {
        Machine::reap(self.clone(), claim.id.clone(), Some(claim))
    }

    /// Takes down whatever there is of a VM that no record names.
    #[must_use]
    pub fn reap_orphan(&self, id: VmId) -> Machine {
        Machine::reap(self.clone(), id, None)
    }

    /// Gives the lease of a claim back: nothing was made of it, or all of it is gone, its door is closed, and no record
    /// on disk names it any more.
    ///
    /// # Errors
    /// See [`Network::release`].
    pub async fn release(&self, claim: &Claim) -> Result<(), LeaseError> {
        self.0.network.release(&claim.lease).await?;
        claim.user.iter().for_each(|user| self.0.setup.users.release(user));
        Ok(())
    }

    /// Another range of ports for the doors to come.
    pub fn set_ports(&self, range: PortRange) {
        self.0.network.set_ports(range);
    }

    /// The common part of all machines.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.0.setup
    }

    /// What machines are restored from.
    #[must_use]
    pub fn goldens(&self) -> &Goldens {
        &self.0.goldens
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

    /// What a VM that runs has used so far, as far as is known within `deadline`.
    pub async fn usage(&self, id: &VmId, deadline: Duration) -> Usage {
        let name = VmName::from(id.clone());
        tokio::time::timeout(deadline, self.hypervisor().usage(&name)).await.unwrap_or_default()
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

    /// This installation's VMs. What becomes of the question is noted: see [`Supply::silence`].
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn list(&self) -> Result<Vec<VmSummary>, VmError> {
        let listed = self.0.host.hypervisor.list(&self.0.setup.installation).await;
        self.0.silence.note(&listed);
        listed
    }

    /// For how long the hypervisor has not answered, and what it said last; `None`: it answers, as far as is known.
    #[must_use]
    pub fn silence(&self) -> Option<(Duration, String)> {
        self.0.silence.lasts()
    }

    /// How many VMs of this daemon are in which state, as they were listed last.
    #[must_use]
    pub fn states(&self) -> Vec<(&'static str, u64)> {
        let driven = self.driven();
        let mut states = [("starting", 0), ("running", 0), ("paused", 0), ("ended", 0)];
        self.0.listing.clone().look(|listing| {
            for id in driven {
                let state = match listing.vms.get(&VmName::from(id)) {
                    None | Some(VmState::Gone) => 0,
                    Some(VmState::Running) => 1,
                    Some(VmState::Paused(_)) => 2,
                    Some(VmState::Ended(_)) => 3,
                };
                states[state].1 += 1;
            }
        });
        states.to_vec()
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
        overlay_path(&self.0.setup.overlay_dir, id)
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
            match self.list().await {
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

/// The disks of a clone, as its guest finds them.
fn read_only(clone: Option<&Attached>) -> Vec<ReadOnlyDisk> {
    let disks = clone.into_iter().flat_map(|clone| clone.disks.iter().enumerate());
    let disks = disks.map(|(n, path)| ReadOnlyDisk { serial: clone_serial(n), path: path.clone() });
    let slot = clone.and_then(|clone| clone.slot.as_ref());
    let slot = slot.map(|path| ReadOnlyDisk { serial: CLONE_SLOT_SERIAL.to_owned(), path: path.clone() });
    disks.chain(slot).collect()
}

/// Path of a VM's overlay. Parses back by [`overlay_id`].
#[must_use]
pub fn overlay_path(dir: &Path, id: &VmId) -> PathBuf {
    dir.join(format!("{}.qcow2", VmName::from(id.clone())))
}

/// The VM whose overlay this is; `None`: not one of ours.
#[must_use]
pub fn overlay_id(path: &Path) -> Option<VmId> {
    Some(VmName::parse(path.file_name()?.to_str()?.strip_suffix(".qcow2")?)?.id().clone())
}
