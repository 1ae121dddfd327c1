//! The fake hypervisor: VMs as scripts, disks as names, wires in memory, on Tokio's clock.
//!
//! Clones share one world, which outlives any daemon on it: drop the daemon's tasks and start
//! another with a clone, and the VMs, overlays and sockets are still there. Effects do not depend
//! on who waits: a call whose future is dropped still takes effect, as it does at a real libvirtd.
//! It has the timing that it is given, fails where it is told to, keeps a history of its calls,
//! and is held to the same contract suite as libvirt (`tests/backend`). Nothing in it reads real
//! time, and all its maps are ordered, so a simulation repeats.

mod calls;
mod egress;
mod faults;
mod guest;
mod wire;

pub use faults::{Fault, Op};
pub use guest::{Doors, GuestMachine, GuestScript, Power};
pub use wire::GuestEnd;

use dayfly::vm::{Ending, HostInfo, Pause, Stream, Usage, VmId, VmName, VmSpec, VmState};
use egress::Carrier;
use faults::Faults;
use guest::Control;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use wire::Wire;

/// Calls and events kept. A long simulation reads the tail only.
const HISTORY_MAX: usize = 10_000;

/// Connections that wait to be accepted at a door.
const DOOR_BACKLOG: usize = 128;

/// Bytes under way in each direction of a connection to a door.
const DOOR_BYTES: usize = 64 * 1024;

/// How long things take, in virtual time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Making an overlay.
    pub overlay: Duration,
    /// The call that starts a VM.
    pub start: Duration,
    /// From the VM's start to its script's first line.
    pub boot: Duration,
    /// From the VM's start to a power-off of its own accord, if it does that.
    pub lifetime: Option<Duration>,
    /// The call that destroys a VM. Above 30 s the caller gets no answer in time.
    pub destroy: Duration,
}

impl Default for Timing {
    /// About what QEMU under TCG takes.
    fn default() -> Self {
        Self {
            overlay: Duration::from_millis(15),
            start: Duration::from_millis(350),
            boot: Duration::from_secs(5),
            lifetime: None,
            destroy: Duration::from_millis(200),
        }
    }
}

/// An overlay that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Its base image.
    pub base: PathBuf,
    /// Its size, GiB.
    pub disk_gib: u64,
}

/// One line of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Since the world was made.
    pub at: Duration,
    /// The call; `None` for what a VM did by itself.
    pub op: Option<Op>,
    /// VM name, path or address.
    pub subject: String,
    /// `ok`, the error, `under way`, or what the VM did.
    pub outcome: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.op.map_or("VM", Op::words);
        write!(f, "{:9.3} {words} {}: {}", self.at.as_secs_f64(), self.subject, self.outcome)
    }
}

/// How many of each thing exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// VMs, of any installation.
    pub vms: usize,
    /// Overlays.
    pub overlays: usize,
    /// VMs whose sockets lie in their directory.
    pub sockets: usize,
    /// Doors listened at.
    pub listeners: usize,
    /// Processes that carry egress.
    pub carriers: usize,
}

impl Counts {
    /// Whether nothing is left.
    #[must_use]
    pub fn is_clean(self) -> bool {
        self == Self::default()
    }
}

struct Machine {
    spec: VmSpec,
    state: VmState,
    channel: Wire,
    door: Wire,
    shell: Wire,
    console: Wire,
    control: Control,
}

/// Sees what VMs do by themselves and what is done to them and their overlays: VM name or overlay's path, and word.
/// See [`FakeHypervisor::set_witness`].
type Witness = Arc<dyn Fn(&str, &str) + Send + Sync>;

struct World {
    witness: Option<Witness>,
    birth: Instant,
    timing: Timing,
    /// What each VM has used, and how long it takes to tell.
    usage: (Duration, Usage),
    host: HostInfo,
    reachable: bool,
    script: Arc<dyn GuestScript>,
    steps: Option<Arc<Semaphore>>,
    faults: Faults,
    vms: BTreeMap<VmName, Machine>,
    /// How VMs have ended that are no more, while that is seen.
    endings: BTreeMap<VmName, Ending>,
    endings_seen: bool,
    overlays: BTreeMap<PathBuf, Overlay>,
    /// Whether VMs can be frozen, and what has been, by its file.
    freezes: bool,
    frozen: BTreeMap<PathBuf, [u8; 32]>,
    sockets: BTreeSet<(PathBuf, VmId)>,
    doors: BTreeMap<SocketAddr, mpsc::Sender<DuplexStream>>,
    carriers: BTreeMap<VmName, Carrier>,
    history: VecDeque<Entry>,
    forgotten: usize,
}

impl World {
    /// Notes a line; its number, for [`World::outcome`].
    fn note(&mut self, op: Option<Op>, subject: &str, outcome: &str) -> usize {
        if let Some(witness) = self.witness.as_ref().filter(|_| op.is_none()) {
            witness(subject, outcome);
        }
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
            self.forgotten += 1;
        }
        self.history.push_back(Entry {
            at: self.birth.elapsed(),
            op,
            subject: subject.into(),
            outcome: outcome.into(),
        });
        self.forgotten + self.history.len() - 1
    }

    fn outcome(&mut self, number: usize, outcome: String) {
        if let Some(entry) = number.checked_sub(self.forgotten).and_then(|i| self.history.get_mut(i)) {
            entry.outcome = outcome;
        }
    }

    fn takes(&self, op: Op) -> Duration {
        match op {
            Op::CreateOverlay => self.timing.overlay,
            Op::Start | Op::Freeze => self.timing.start,
            Op::Destroy => self.timing.destroy,
            _ => Duration::ZERO,
        }
    }
}

/// The fake; clones share its world.
#[derive(Clone)]
pub struct FakeHypervisor(Arc<Mutex<World>>);

impl fmt::Debug for FakeHypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeHypervisor")
    }
}

impl Default for FakeHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

/// Settings, and what a test does to the world.
impl FakeHypervisor {
    /// An empty host of 64 CPUs and 256 GiB that offers KVM. Its guests boot and then say nothing.
    /// Make it inside a runtime: its history counts from now.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(World {
            witness: None,
            birth: Instant::now(),
            timing: Timing::default(),
            usage: (Duration::ZERO, Usage::default()),
            host: HostInfo { version: "fake 1".into(), cpus: 64, memory_mib: 256 * 1024, kvm_offered: true },
            reachable: true,
            script: Arc::new(|_machine: GuestMachine| std::future::pending()),
            steps: None,
            faults: Faults::default(),
            vms: BTreeMap::new(),
            endings: BTreeMap::new(),
            endings_seen: true,
            overlays: BTreeMap::new(),
            freezes: false,
            frozen: BTreeMap::new(),
            sockets: BTreeSet::new(),
            doors: BTreeMap::new(),
            carriers: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: 0,
        })))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long things take from now on.
    pub fn set_timing(&self, timing: Timing) {
        self.world().timing = timing;
    }

    /// What each VM has used, from now on, and how long it takes to tell.
    pub fn set_usage(&self, takes: Duration, usage: Usage) {
        self.world().usage = (takes, usage);
    }

    /// What [`Hypervisor::probe`](dayfly::vm::Hypervisor::probe) answers.
    pub fn set_host(&self, host: HostInfo) {
        self.world().host = host;
    }

    /// What guests do that are started from now on.
    pub fn set_guest(&self, script: impl GuestScript) {
        self.world().script = Arc::new(script);
    }

    /// Whether VMs can be frozen here. They cannot, unless set otherwise.
    pub fn set_freezes(&self, freezes: bool) {
        self.world().freezes = freezes;
    }

    /// What was frozen into this file is not what it was any more.
    pub fn damage(&self, state: &Path) {
        if let Some(digest) = self.world().frozen.get_mut(state) {
            digest[0] ^= 1;
        }
    }

    /// Whether libvirtd answers. VMs, sockets and files do not mind.
    pub fn set_reachable(&self, reachable: bool) {
        self.world().reachable = reachable;
    }

    /// The `n`-th call from now (1: the next), of whatever kind, fails; without effect.
    pub fn fail_call(&self, n: u64) {
        self.world().faults.at_call(n, Fault::Unreachable);
    }

    /// The `n`-th call of this kind from now (1: the next) fails so.
    pub fn fail_nth(&self, op: Op, n: u64, fault: Fault) {
        self.world().faults.at_call_of(op, n, fault);
    }

    /// Each call of this kind fails so, until [`FakeHypervisor::heal`].
    pub fn fail_always(&self, op: Op, fault: Fault) {
        self.world().faults.always(op, None, fault);
    }

    /// Each call of this kind about this VM fails so, until [`FakeHypervisor::heal`].
    pub fn fail_always_for(&self, op: Op, id: &VmId, fault: Fault) {
        self.world().faults.always(op, Some(VmName::from(id.clone()).to_string()), fault);
    }

    /// Asks `judge` about each call (kind, and VM name, path or address): for seeded faults. It must
    /// not call the fake, which is locked meanwhile.
    pub fn judge_calls(&self, judge: impl FnMut(Op, &str) -> Option<Fault> + Send + 'static) {
        self.world().faults.judge(Box::new(judge));
    }

    /// Tells `witness` at once what the history keeps of VMs: `started`, `booted`, `powered off`, `crashed`, `paused`,
    /// `panicked`, `destroyed`…; and of overlays, by path: `overlay made`, `overlay removed`. It is the truth, whether or not the
    /// caller still waits for its answer. It must not call the fake, which is locked meanwhile.
    pub fn set_witness(&self, witness: impl Fn(&str, &str) + Send + Sync + 'static) {
        self.world().witness = Some(Arc::new(witness));
    }

    /// Forgets all faults to come, and the judge.
    pub fn heal(&self) {
        self.world().faults.heal();
    }

    /// From now on each transition (overlay made or removed, VM started, guest booted, VM destroyed) waits for
    /// a [`FakeHypervisor::step`], after the time that it takes. The trait's deadlines still run.
    pub fn hold(&self) {
        self.world().steps.get_or_insert_with(|| Arc::new(Semaphore::new(0)));
    }

    /// Lets one transition happen, the one that has waited longest, or the next.
    pub fn step(&self) {
        if let Some(steps) = &self.world().steps {
            steps.add_permits(1);
        }
    }

    /// Ends what [`FakeHypervisor::hold`] began.
    pub fn let_go(&self) {
        if let Some(steps) = self.world().steps.take() {
            steps.close();
        }
    }

    /// Whether it is told how a VM that is no more has ended. It is, unless set otherwise.
    pub fn set_endings_seen(&self, seen: bool) {
        self.world().endings_seen = seen;
    }

    /// A VM's CPUs are stopped.
    pub fn pause(&self, id: &VmId, why: Pause) {
        let word = match why {
            Pause::Disk => "paused",
            Pause::Operator => "paused by somebody",
            Pause::Itself => "stopped",
        };
        self.set_state(id, VmState::Paused(why), word);
    }

    /// The kernel of a VM's guest panics, or the guest goes to sleep: it has ended, and stays until it is destroyed.
    pub fn halt(&self, id: &VmId, how: Ending) {
        self.set_state(id, VmState::Ended(how), if how == Ending::Slept { "slept" } else { "panicked" });
    }

    /// Ends [`FakeHypervisor::pause`].
    pub fn resume(&self, id: &VmId) {
        self.set_state(id, VmState::Running, "resumed");
    }

    fn set_state(&self, id: &VmId, state: VmState, how: &str) {
        let name = VmName::from(id.clone());
        let mut world = self.world();
        let Some(machine) = world.vms.get_mut(&name) else { return };
        machine.state = state;
        machine.control.set(state != VmState::Running, false);
        world.note(None, &name.to_string(), how);
    }

    /// A VM's QEMU dies (killed for want of memory, say).
    pub fn crash(&self, id: &VmId) {
        self.end(&VmName::from(id.clone()), Ending::Died, "crashed");
    }

    /// The host reboots: VMs and the sockets in `/run` are gone, disks stay.
    pub fn reboot_host(&self) {
        let names: Vec<VmName> = self.world().vms.keys().cloned().collect();
        for name in names {
            self.end(&name, Ending::Unseen, "gone with the host");
        }
        self.world().sockets.clear();
    }

    /// Connects to a door as a guest does, see [`Doors::connect`].
    ///
    /// # Errors
    /// `ConnectionRefused`: nobody listens there, or its backlog is full.
    pub fn connect(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let (guest, host) = tokio::io::duplex(DOOR_BYTES);
        let world = self.world();
        let door = world.doors.get(&address).ok_or(io::ErrorKind::ConnectionRefused)?;
        door.try_send(host).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(guest))
    }

    fn end(&self, name: &VmName, ending: Ending, how: &str) -> bool {
        let mut world = self.world();
        let Some(machine) = world.vms.remove(name) else { return false };
        if world.endings_seen && ending != Ending::Unseen {
            world.endings.insert(name.clone(), ending);
        }
        machine.control.set(false, true);
        machine.channel.close();
        machine.door.close();
        machine.shell.close();
        machine.console.close();
        if let Some(carrier) = world.carriers.get_mut(name) {
            carrier.hang_up();
        }
        world.note(None, &name.to_string(), how);
        true
    }
}

/// What a test asks the world.
impl FakeHypervisor {
    /// How many of each thing exist.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let world = self.world();
        Counts {
            vms: world.vms.len(),
            overlays: world.overlays.len(),
            sockets: world.sockets.len(),
            listeners: world.doors.len(),
            carriers: world.carriers.values().filter(|carrier| carrier.is_alive()).count(),
        }
    }

    /// All VMs, of any installation, with their states.
    #[must_use]
    pub fn vms(&self) -> Vec<(VmSpec, VmState)> {
        self.world().vms.values().map(|machine| (machine.spec.clone(), machine.state)).collect()
    }

    /// All overlays.
    #[must_use]
    pub fn overlays(&self) -> BTreeMap<PathBuf, Overlay> {
        self.world().overlays.clone()
    }

    /// Addresses listened at.
    #[must_use]
    pub fn doors(&self) -> Vec<SocketAddr> {
        self.world().doors.keys().copied().collect()
    }

    /// Calls so far, of all kinds: `n` of [`FakeHypervisor::fail_call`] may go up to what is left.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.world().faults.calls()
    }

    /// Calls and events, oldest first; the last 10,000.
    #[must_use]
    pub fn history(&self) -> Vec<Entry> {
        self.world().history.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests;
