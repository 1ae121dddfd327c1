//! The fake hypervisor: VMs as scripts, disks as names, wires in memory, on Tokio's clock.
//!
//! Clones share one world, which outlives any daemon on it: drop the daemon's tasks and start
//! another with a clone, and the VMs, overlays and sockets are still there. Effects do not depend
//! on who waits: a call whose future is dropped still takes effect, as it does at a real libvirtd.
//! It has the timing that it is given, fails where it is told to, keeps a history of its calls,
//! and is held to the same contract suite as libvirt (`tests/backend`). Nothing in it reads real
//! time, and all its maps are ordered, so a simulation repeats.

mod faults;
mod guest;
mod wire;

pub use faults::{Fault, Op};
pub use guest::{Doors, GuestMachine, GuestScript, Power};
pub use wire::GuestEnd;

use super::{
    DoorListener, HostInfo, Hypervisor, InstallationId, Stream, VmError, VmId, VmName, VmSpec, VmState, VmSummary,
};
use crate::BoxFuture;
use faults::Faults;
use guest::{Control, Controlled};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout};
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
    console: Wire,
    control: Control,
}

struct World {
    birth: Instant,
    timing: Timing,
    host: HostInfo,
    reachable: bool,
    script: Arc<dyn GuestScript>,
    steps: Option<Arc<Semaphore>>,
    faults: Faults,
    vms: BTreeMap<VmName, Machine>,
    overlays: BTreeMap<PathBuf, Overlay>,
    sockets: BTreeSet<(PathBuf, VmId)>,
    doors: BTreeMap<SocketAddr, mpsc::Sender<DuplexStream>>,
    history: VecDeque<Entry>,
    forgotten: usize,
}

impl World {
    /// Notes a line; its number, for [`World::outcome`].
    fn note(&mut self, op: Option<Op>, subject: &str, outcome: &str) -> usize {
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
            Op::Start => self.timing.start,
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
            birth: Instant::now(),
            timing: Timing::default(),
            host: HostInfo { version: "fake 1".into(), cpus: 64, memory_mib: 256 * 1024, kvm_offered: true },
            reachable: true,
            script: Arc::new(|_machine: GuestMachine| std::future::pending()),
            steps: None,
            faults: Faults::default(),
            vms: BTreeMap::new(),
            overlays: BTreeMap::new(),
            sockets: BTreeSet::new(),
            doors: BTreeMap::new(),
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

    /// What [`Hypervisor::probe`] answers.
    pub fn set_host(&self, host: HostInfo) {
        self.world().host = host;
    }

    /// What guests do that are started from now on.
    pub fn set_guest(&self, script: impl GuestScript) {
        self.world().script = Arc::new(script);
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

    /// QEMU pauses a VM, as it does when the host's disk fails.
    pub fn pause(&self, id: &VmId) {
        self.set_state(id, VmState::Paused, "paused");
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
        machine.control.set(state == VmState::Paused, false);
        world.note(None, &name.to_string(), how);
    }

    /// A VM's QEMU dies (killed for want of memory, say).
    pub fn crash(&self, id: &VmId) {
        self.end(&VmName::from(id.clone()), "crashed");
    }

    /// The host reboots: VMs and the sockets in `/run` are gone, disks stay.
    pub fn reboot_host(&self) {
        let names: Vec<VmName> = self.world().vms.keys().cloned().collect();
        for name in names {
            self.end(&name, "gone with the host");
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

    fn end(&self, name: &VmName, how: &str) -> bool {
        let mut world = self.world();
        let Some(machine) = world.vms.remove(name) else { return false };
        machine.control.set(false, true);
        machine.channel.close();
        machine.console.close();
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

/// How calls run.
impl FakeHypervisor {
    /// Counts and notes a call; its number in the history, and its fault.
    fn begin(&self, op: Op, subject: &str) -> (usize, Option<Fault>) {
        let mut world = self.world();
        let planned = world.faults.next(op, subject);
        let fault = match planned {
            _ if op.needs_libvirtd() && !world.reachable => Some(Fault::Unreachable),
            Some(Fault::Unreachable) if !op.needs_libvirtd() => Some(Fault::Refused("injected failure")),
            planned => planned,
        };
        (world.note(Some(op), subject, "under way"), fault)
    }

    fn finish<T, E: std::error::Error>(&self, number: usize, result: Result<T, E>) -> Result<T, E> {
        let outcome = result.as_ref().map_or_else(|error| format!("{error}{}", cause(error)), |_| "ok".into());
        self.world().outcome(number, outcome);
        result
    }

    /// Runs a call that changes something. Its effect comes after its time, and a step where
    /// steps are asked for, even if nobody waits for it any more.
    async fn change<T: Send + 'static>(
        &self,
        op: Op,
        subject: String,
        effect: impl FnOnce(&Self) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, VmError> {
        let (number, fault) = self.begin(op, &subject);
        let takes = self.world().takes(op);
        let result = match fault {
            Some(Fault::Unreachable) => Err(unreachable(op)),
            Some(Fault::Refused(why)) => {
                sleep(takes).await;
                Err(refused(op, &subject, why))
            }
            Some(Fault::Hangs) => {
                sleep(op.deadline()).await;
                Err(no_answer(op, &subject))
            }
            None | Some(Fault::HangsAfterEffect | Fault::AnswerLost) => {
                let fake = self.clone();
                #[expect(
                    clippy::disallowed_methods,
                    reason = "stands for the other side, which goes on when its caller is gone"
                )]
                let done = tokio::spawn(async move {
                    sleep(takes).await;
                    fake.await_step().await;
                    effect(&fake)
                });
                let since = Instant::now();
                let answer = timeout(op.deadline(), done).await;
                if fault == Some(Fault::HangsAfterEffect) {
                    tokio::time::sleep_until(since + op.deadline()).await;
                }
                match (fault, answer) {
                    (Some(Fault::AnswerLost), Ok(_)) => Err(unreachable(op)),
                    (None, Ok(answer)) => answer.expect("effects do not panic"),
                    _ => Err(no_answer(op, &subject)),
                }
            }
        };
        self.finish(number, result)
    }

    /// Runs a call that only looks.
    async fn look<T>(&self, op: Op, subject: String, read: impl FnOnce(&World) -> T) -> Result<T, VmError> {
        let (number, fault) = self.begin(op, &subject);
        let result = match fault {
            None => Ok(read(&self.world())),
            Some(Fault::Refused(why)) => Err(refused(op, &subject, why)),
            Some(Fault::Unreachable | Fault::AnswerLost) => Err(unreachable(op)),
            Some(Fault::Hangs | Fault::HangsAfterEffect) => {
                sleep(op.deadline()).await;
                Err(no_answer(op, &subject))
            }
        };
        self.finish(number, result)
    }

    /// Runs a call on sockets, which is quick.
    fn wire<T>(&self, op: Op, subject: &str, act: impl FnOnce(&mut World) -> io::Result<T>) -> io::Result<T> {
        let (number, fault) = self.begin(op, subject);
        let result = match fault {
            None => act(&mut self.world()),
            Some(fault) => Err(io::Error::other(format!("injected: {fault:?}"))),
        };
        self.finish(number, result)
    }

    async fn await_step(&self) {
        let steps = self.world().steps.clone();
        if let Some(steps) = steps {
            // Closed means let go.
            if let Ok(permit) = steps.acquire().await {
                permit.forget();
            }
        }
    }

    /// The VM is there from here on; its guest boots.
    fn boot(&self, spec: VmSpec) {
        let name = VmName::from(spec.id.clone());
        let (channel, console, control) = (Wire::default(), Wire::default(), Control::default());
        let mut world = self.world();
        let (timing, script) = (world.timing, Arc::clone(&world.script));
        let machine = GuestMachine {
            spec: spec.clone(),
            channel: channel.guest_end(),
            console: console.guest_end(),
            doors: Doors(self.clone()),
            power: Power { hypervisor: self.clone(), id: spec.id.clone() },
        };
        world.sockets.insert((spec.socket_dir.clone(), spec.id.clone()));
        world.vms.insert(
            name.clone(),
            Machine { spec, state: VmState::Running, channel, console, control: control.clone() },
        );
        world.note(None, &name.to_string(), "started");
        drop(world);
        let fake = self.clone();
        let life = async move {
            sleep(timing.boot).await;
            fake.await_step().await;
            fake.world().note(None, &name.to_string(), "booted");
            let rest = timing.lifetime.map_or(Duration::MAX, |lifetime| lifetime.saturating_sub(timing.boot));
            // Returned or out of time: either way the guest powers off.
            let _ = timeout(rest, script.run(machine)).await;
            fake.end(&name, "powered off");
        };
        let script = Controlled { control, script: Box::pin(life) };
        #[expect(clippy::disallowed_methods, reason = "a guest is nobody's task: it ends with its VM")]
        tokio::spawn(script);
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map(|source| format!(": {source}")).unwrap_or_default()
}

fn unreachable(op: Op) -> VmError {
    VmError::Unreachable { uri: "fake:///".into(), source: format!("client socket is closed ({op})").into() }
}

fn refused(op: Op, subject: &str, why: &str) -> VmError {
    VmError::Refused { what: op.words(), name: subject.into(), source: why.into() }
}

fn no_answer(op: Op, subject: &str) -> VmError {
    VmError::Deadline { what: op.words(), name: subject.into(), seconds: op.deadline().as_secs() }
}

impl Hypervisor for FakeHypervisor {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(self.look(Op::Probe, "host".into(), |world| world.host.clone()))
    }

    fn create_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        let (path, made) = (overlay.to_owned(), Overlay { base: base.to_owned(), disk_gib });
        Box::pin(self.change(Op::CreateOverlay, overlay.display().to_string(), move |fake| {
            fake.world().overlays.insert(path, made);
            Ok(())
        }))
    }

    fn remove_overlay<'a>(&'a self, overlay: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        let path = overlay.to_owned();
        Box::pin(self.change(Op::RemoveOverlay, overlay.display().to_string(), move |fake| {
            fake.world().overlays.remove(&path);
            Ok(())
        }))
    }

    fn list_overlays<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<Vec<PathBuf>, VmError>> {
        Box::pin(self.look(Op::ListOverlays, dir.display().to_string(), move |world| {
            world.overlays.keys().filter(|path| path.parent() == Some(dir) && is_overlay(path)).cloned().collect()
        }))
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        let (name, spec) = (VmName::from(spec.id.clone()), spec.clone());
        Box::pin(self.change(Op::Start, name.to_string(), move |fake| {
            let refuse = |why| Err(refused(Op::Start, &name.to_string(), why));
            let world = fake.world();
            match world.vms.get(&name) {
                Some(machine) if machine.spec.installation == spec.installation => return Ok(()),
                Some(_) => return refuse("a VM of this name is somebody else's"),
                None if !world.overlays.contains_key(&spec.overlay) => return refuse("overlay does not exist"),
                None => drop(world),
            }
            fake.boot(spec);
            Ok(())
        }))
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        Box::pin(self.look(Op::State, name.to_string(), move |world| {
            world.vms.get(name).map_or(VmState::Gone, |machine| machine.state)
        }))
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        let gone = name.clone();
        Box::pin(self.change(Op::Destroy, name.to_string(), move |fake| {
            fake.end(&gone, "destroyed");
            Ok(())
        }))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        Box::pin(self.look(Op::List, installation.to_string(), move |world| {
            let ours = world.vms.iter().filter(|(_, machine)| machine.spec.installation == *installation);
            ours.map(|(name, machine)| VmSummary { name: name.clone(), state: machine.state }).collect()
        }))
    }

    fn open_channel<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let name = VmName::from(id.clone());
            let end = self.wire(Op::OpenChannel, &name.to_string(), |world| {
                machine(world, socket_dir, &name)?.channel.connect()
            })?;
            Ok(Box::new(end) as Box<dyn Stream>)
        })
    }

    fn open_console<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let name = VmName::from(id.clone());
            let end = self.wire(Op::OpenConsole, &name.to_string(), |world| {
                machine(world, socket_dir, &name)?.console.connect()
            })?;
            Ok(Box::new(end) as Box<dyn Stream>)
        })
    }

    fn remove_sockets<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.wire(Op::RemoveSockets, &VmName::from(id.clone()).to_string(), |world| {
                world.sockets.remove(&(socket_dir.to_owned(), id.clone()));
                Ok(())
            })
        })
    }

    fn prepare<'a>(&'a self, _: &'a Path, _: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move {
            self.wire(Op::Listen, &address.to_string(), |world| {
                if world.doors.contains_key(&address) {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                let (sender, connections) = mpsc::channel(DOOR_BACKLOG);
                world.doors.insert(address, sender);
                Ok(Box::new(FakeDoor { fake: self.clone(), address, connections }) as Box<dyn DoorListener>)
            })
        })
    }
}

/// The VM behind a socket, if the socket lies where it is looked for.
fn machine<'w>(world: &'w World, socket_dir: &Path, name: &VmName) -> io::Result<&'w Machine> {
    match world.vms.get(name) {
        _ if !world.sockets.contains(&(socket_dir.to_owned(), name.id().clone())) => {
            Err(io::ErrorKind::NotFound.into())
        }
        Some(machine) => Ok(machine),
        None => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

/// Whether a path is named as overlays are.
fn is_overlay(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".qcow2"));
    name.is_some_and(|name| VmName::parse(name).is_some())
}

struct FakeDoor {
    fake: FakeHypervisor,
    address: SocketAddr,
    connections: mpsc::Receiver<DuplexStream>,
}

impl DoorListener for FakeDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let stream = self.connections.recv().await.expect("the world holds the sender for as long as this listens");
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

impl Drop for FakeDoor {
    fn drop(&mut self) {
        self.fake.world().doors.remove(&self.address);
    }
}

#[cfg(test)]
mod tests;
