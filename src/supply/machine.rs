//! One VM, from its overlay to its end: one task, which alone calls the hypervisor for it.
//!
//! ```text
//! start: overlay ─► VM, egress ─► wires, config once bound ─► watch ──(take_down)──► destroy ─► egress, sockets, overlay
//!            └────────┴─ failed: reported; the owner decides, then takes it down
//! ```
//!
//! Every step may run twice, so a VM found running after a restart of the daemon enters at
//! "wires". On `leave` (hand-over) the task ends and the VM lives on. A machine that is restored takes the same steps; one
//! of which nothing comes is taken down here, and boots in its own stead, with the same names.

mod down;

use super::goldens::Key;
use super::wires::Wires;
use super::{Claim, Supply};
use crate::failpoint::{Point, reached};
use crate::image::stamp::Stamp;
use crate::network::Terms;
use crate::retry::Backoff;
use crate::telemetry::chain;
use crate::vm::console::{Ring, TAIL_BYTES_MAX};
use crate::vm::{Attachment, Ending, Frozen, Pause, VmError, VmId, VmName, VmSpec, VmState};
use dayfly_guest_config::Report;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Events that may wait for the owner.
const EVENTS_MAX: usize = 64;

/// How long a restored machine's guest may take to show its pass: 0.6 s, and ten times that on a busy host. It boots then,
/// within the same deadline.
const RESTORE_PATIENCE: Duration = Duration::from_secs(20);

/// What a machine's task tells its owner.
#[derive(Debug)]
pub enum MachineEvent {
    /// The overlay is there.
    DiskReady,
    /// The VM has been started, or was found running.
    Started,
    /// The VM has been restored from one that was frozen, in this time, and goes on.
    Restored(Duration),
    /// Nothing came of that: it boots.
    NotRestored,
    /// What the guest program says; a hint, see [`Report`].
    Report(Report),
    /// It could not be made. It must still be taken down.
    Failed(VmError),
    /// It ended by itself, like this.
    Stopped(Ending),
    /// Its CPUs were stopped, and why.
    Paused(Pause),
    /// It goes on after a pause.
    Resumed,
    /// VM, sockets and overlay are gone. The last event. Its lease is the owner's until no record names it any more.
    Gone,
}

/// What the owner of a VM wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Desired {
    Running,
    Gone,
    Left,
}

/// Who a machine's guest is.
#[derive(Clone, Debug)]
pub struct Binding {
    /// Its guest config, as a line.
    pub config: Vec<u8>,
    /// What is told to who carries its egress; `None`: it has a network card.
    pub egress: Option<Terms>,
}

/// A VM that does not exist yet.
pub(super) struct NewVm {
    pub(super) spec: VmSpec,
    pub(super) disk_gib: u64,
    /// By what the image's files were known when they were checked.
    pub(super) stamp: Stamp,
    /// What it is restored from, if anything comes of that.
    pub(super) golden: Option<(Key, Frozen)>,
}

/// How far a start came.
enum Made {
    /// It runs.
    Up,
    /// It runs: what it is.
    Restored(Key),
    /// It should have run, and has ended.
    Ended(Ending),
}

/// The owner's handle to its machine: a VM, and what is beside it.
pub struct Machine {
    supply: Supply,
    id: VmId,
    /// What it holds. None: it is not known, and nobody else's any more.
    claim: Option<Claim>,
    events: mpsc::Receiver<MachineEvent>,
    gone: bool,
    desired: watch::Sender<Desired>,
    binding: watch::Sender<Option<Binding>>,
    stay: watch::Sender<Option<Instant>>,
    console: Arc<Mutex<Ring>>,
    greeted: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Machine {
    /// Starts `new`, unless it runs already. `None`: it must run.
    pub(super) fn start(supply: Supply, claim: Claim, new: Option<NewVm>) -> Self {
        Self::spawn(supply, claim.id.clone(), Some(claim), move |driver| async move { driver.run(new).await })
    }

    /// Takes it down, whatever there is of it.
    pub(super) fn reap(supply: Supply, id: VmId, claim: Option<Claim>) -> Self {
        let machine = Self::spawn(supply, id, claim, |mut driver| async move { driver.take_down().await });
        machine.take_down();
        machine
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(
        supply: Supply,
        id: VmId,
        claim: Option<Claim>,
        run: impl FnOnce(Driver) -> F + Send + 'static,
    ) -> Self {
        let (events_out, events) = mpsc::channel(EVENTS_MAX);
        let (desired, desired_in) = watch::channel(Desired::Running);
        let (binding, binding_in) = watch::channel(None);
        let (stay, stay_in) = watch::channel(None);
        let turn = supply.begin(&id);
        let wires = Wires {
            supply: supply.clone(),
            id: id.clone(),
            events: events_out,
            binding: binding_in,
            stay: stay_in,
            greeted: Arc::default(),
            console: Arc::default(),
        };
        let (greeted, console) = (wires.greeted.clone(), wires.console.clone());
        let driver = Driver {
            name: VmName::from(id.clone()),
            id: id.clone(),
            supply: supply.clone(),
            desired: desired_in,
            wires,
        };
        #[expect(clippy::disallowed_methods, reason = "joined by the owner, through `leave` or the last event")]
        let task = tokio::spawn(async move {
            let mut desired = driver.desired.clone();
            let leave = async { desired.wait_for(|desired| *desired == Desired::Left).await.is_ok() };
            let _turn = tokio::select! {
                biased;
                // Both are cancel safe.
                turn = turn.lock_owned() => turn,
                true = leave => return,
            };
            run(driver).await;
        });
        Self { supply, id, claim, events, gone: false, desired, binding, stay, console, greeted, task }
    }

    /// The VM's id.
    #[must_use]
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// The next event; `None` after the last. Cancel safe.
    pub async fn event(&mut self) -> Option<MachineEvent> {
        let event = self.events.recv().await;
        self.gone |= matches!(event, Some(MachineEvent::Gone));
        event
    }

    /// Tells the guest who it is: once, whatever is said later.
    pub fn bind(&self, binding: Binding) {
        self.binding.send_if_modified(|bound| {
            let first = bound.is_none();
            bound.get_or_insert(binding);
            first
        });
    }

    /// Tells the guest to end its runner and to stay until then; what it sends out is not carried any more.
    pub fn stay(&self, until: Instant) {
        self.stay.send_replace(Some(until));
    }

    /// The guest has shown its pass: it has its config, which is not written again.
    pub fn greeted(&self) {
        self.greeted.store(true, Ordering::Relaxed);
    }

    /// The last bytes of its console, escaped.
    #[must_use]
    pub fn console_tail(&self) -> String {
        self.console().look(|ring| ring.tail(TAIL_BYTES_MAX))
    }

    /// Its console, for whoever looks at it; readable when the machine is gone, too.
    #[must_use]
    pub fn console(&self) -> Screen {
        Screen(self.console.clone())
    }

    /// Has VM, sockets and overlay taken down, for ever trying; [`MachineEvent::Gone`] tells the end. For an owner whose
    /// record names the lease until then: [`Supply::release`] gives that back.
    pub fn take_down(&self) {
        self.desired.send_replace(Desired::Gone);
    }

    /// Takes all of it down, for ever trying, and gives its lease back: for an owner without a record of it that would
    /// be read again. Cancel safe: called again it goes on. If its task has died of a bug, the sweep finds what is left.
    pub async fn release(&mut self) {
        self.take_down();
        while self.event().await.is_some() {}
        let mut backoff = Backoff::hypervisor();
        while let Some(claim) = self.claim.as_ref().filter(|_| self.gone) {
            match self.supply.release(claim).await {
                Ok(()) => self.claim = None,
                Err(error) => {
                    tracing::warn!(vm = %self.id, error = chain(&error), "give a lease back; trying again");
                    tokio::time::sleep(backoff.next(&self.supply.0.rng)).await;
                }
            }
        }
    }

    /// Lets go of it: the VM lives on for the next daemon.
    pub async fn leave(self) {
        // Also in mid-release: the next daemon finishes it, this one must end in seconds.
        self.desired.send_replace(Desired::Left);
        drop(self.events);
        // Ends after the call to the hypervisor that is under way, each of which has a deadline.
        let _ = self.task.await;
    }
}

/// What a machine's console has printed last. Clones look at the same.
#[derive(Clone, Debug)]
pub struct Screen(Arc<Mutex<Ring>>);

impl Screen {
    /// Looks at it, for a moment.
    pub fn look<T>(&self, look: impl FnOnce(&Ring) -> T) -> T {
        look(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Driver {
    supply: Supply,
    id: VmId,
    name: VmName,
    desired: watch::Receiver<Desired>,
    wires: Wires,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.supply.end(&self.id);
    }
}

impl Driver {
    /// What the owner wants. A handle that was dropped while its VM should run is an owner's task that has died: the VM
    /// is left, for nobody must make one that nobody knows.
    fn desired(&self) -> Desired {
        let desired = *self.desired.borrow();
        if desired == Desired::Running && self.desired.has_changed().is_err() { Desired::Left } else { desired }
    }

    async fn tell(&self, event: MachineEvent) {
        // Nobody listens after `leave`: the record holds what the next daemon needs.
        let _ = self.wires.events.send(event).await;
    }

    async fn run(mut self, mut new: Option<NewVm>) {
        let mut desired = self.desired.clone();
        loop {
            let started = tokio::select! {
                biased;
                // As for a call that hangs while the VM is taken down.
                Ok(_) = desired.wait_for(|desired| *desired == Desired::Left) => return,
                started = self.start(new.as_mut()) => started,
            };
            let Ok(Made::Restored(key)) = started else { break self.go_with(started).await };
            let Watched::Unheard(error) = self.watch(Some(&key)).await else { break };
            // Its guest has no job yet, and will have none.
            if let Err(error) = self.not_restored(&key, error).await {
                break self.go_with(Err(error)).await;
            }
        }
        if self.desired() == Desired::Gone {
            self.take_down().await;
        }
    }

    /// The life of a machine that has booted, or could not.
    async fn go_with(&mut self, started: Result<Made, VmError>) {
        match started {
            Ok(Made::Up | Made::Restored(_)) => drop(self.watch(None).await),
            Ok(Made::Ended(ending)) => {
                self.tell(MachineEvent::Stopped(ending)).await;
                self.wait_for_change().await;
            }
            // Its guest has shown the pass: it runs, whatever became of the call's answer.
            Err(error) if self.wires.greeted.load(Ordering::Relaxed) => {
                tracing::warn!(vm = %self.id, error = chain(&error), "make a VM that runs already; it goes on");
                self.watch(None).await;
            }
            Err(error) => {
                self.tell(MachineEvent::Failed(error)).await;
                self.wait_for_change().await;
            }
        }
    }

    /// Nothing came of a restore: noted, told in one line, and what there is of it taken down.
    async fn not_restored(&self, key: &Key, error: VmError) -> Result<(), VmError> {
        tracing::warn!(vm = %self.id, golden = %key, error = chain(&error), "restore a machine; it boots instead");
        self.supply.0.goldens.failed(key, &error);
        self.tell(MachineEvent::NotRestored).await;
        if self.is_ours().await? {
            self.supply.hypervisor().destroy(&self.name).await?;
        }
        self.supply.end_egress(&self.id).await?;
        self.remove_sockets().await
    }

    /// Makes overlay and VM, unless the VM runs already.
    async fn start(&mut self, mut new: Option<&mut NewVm>) -> Result<Made, VmError> {
        let mut state = self.look(new.is_none()).await?;
        if state != VmState::Gone && new.is_some() {
            match (self.is_ours().await?, state) {
                // What is left of it is in the way of another of this name.
                (true, VmState::Ended(ending)) => return Ok(Made::Ended(ending)),
                // A daemon may have died between its restore and its going on.
                (true, _) => match self.supply.hypervisor().go_on(&self.name).await {
                    Ok(()) => {}
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        tracing::warn!(vm = %self.id, error = chain(&error), "go on with a machine that is half made; it is made anew");
                        self.supply.hypervisor().destroy(&self.name).await?;
                        state = VmState::Gone;
                    }
                },
                (false, VmState::Ended(_)) => state = VmState::Gone,
                (false, _) => {
                    return Err(VmError::refused("start VM", &self.name, "a VM of this name is somebody else's"));
                }
            }
        }
        if let Some(ending) = state.ending() {
            let Some(new) = new.take() else { return Ok(Made::Ended(ending)) };
            if let Some((key, frozen)) = new.golden.take() {
                match self.restore(new, frozen).await {
                    Ok(false) => return Ok(Made::Up),
                    Ok(true) => return Ok(Made::Restored(key)),
                    Err(error) => self.not_restored(&key, error).await?,
                }
            }
            if !self.make(new, None).await? {
                return Ok(Made::Up);
            }
        }
        self.tell(MachineEvent::Started).await;
        reached(Point::K9);
        Ok(Made::Up)
    }

    /// Makes what was frozen go on in a new VM. `false`: it is not wanted any more.
    async fn restore(&mut self, new: &NewVm, frozen: Frozen) -> Result<bool, VmError> {
        let since = Instant::now();
        if !self.make(new, Some(frozen)).await? {
            return Ok(false);
        }
        self.supply.hypervisor().go_on(&self.name).await?;
        self.tell(MachineEvent::Restored(since.elapsed())).await;
        reached(Point::K9);
        Ok(true)
    }

    /// Makes overlay and VM. `false`: it is not wanted any more.
    async fn make(&mut self, new: &NewVm, frozen: Option<Frozen>) -> Result<bool, VmError> {
        let host = self.supply.host().clone();
        self.remove_sockets().await?;
        host.disks.create(&new.spec.overlay, &new.spec.base, new.disk_gib).await?;
        reached(Point::K5);
        self.tell(MachineEvent::DiskReady).await;
        if self.desired() != Desired::Running {
            return Ok(false);
        }
        let mut spec = VmSpec { frozen, ..new.spec.clone() };
        if spec.confine.user.is_some() {
            spec.boot = host.disks.lend(&spec.boot, &spec.overlay).await?;
        }
        reached(Point::K8);
        host.hypervisor.start(&spec).await?;
        // QEMU has the files open by now: what is exchanged later does not matter to this machine.
        if !new.stamp.holds().await {
            let base = new.spec.base.display();
            return Err(VmError::refused(
                "start VM",
                &self.name,
                format!("base image `{base}` was changed while the VM was being made"),
            ));
        }
        // It runs, and we have not heard of it.
        reached(Point::K8);
        if new.spec.attachment == Attachment::Egress {
            let mut desired = self.desired.clone();
            tokio::select! {
                biased;
                // What is to go does not wait for one, which may take three tries of 15 s: what is dropped here has begun
                // a process or has not, and taking the VM down ends it.
                Ok(_) = desired.wait_for(|desired| *desired != Desired::Running) => return Ok(false),
                // The guest of one that boots needs seconds before it wants one.
                begun = self.begin_egress() => begun?,
            }
        }
        Ok(true)
    }

    /// Begins what carries its egress, once it is bound.
    async fn begin_egress(&self) -> Result<(), VmError> {
        match self.wires.terms().await {
            Some(terms) => self.supply.begin_egress(&self.id, &terms).await,
            None => Ok(()),
        }
    }

    async fn remove_sockets(&self) -> Result<(), VmError> {
        let removed = self.supply.host().sockets.remove(&self.supply.setup().socket_dir, &self.id).await;
        removed.map_err(|error| VmError::refused("remove sockets of", &self.name, error))
    }

    /// The VM's state. For a guest that has its job "I could not look" is not "it is gone": it is
    /// asked again until there is an answer, or it is to go.
    async fn look(&mut self, patiently: bool) -> Result<VmState, VmError> {
        let mut backoff = Backoff::hypervisor();
        let mut told = false;
        loop {
            let error = match self.supply.hypervisor().state(&self.name).await {
                Ok(state) => return Ok(state),
                Err(error) if patiently && error.is_transient() => error,
                Err(error) => return Err(error),
            };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(vm = %self.id, error = chain(&error), "look for the VM of a running job; trying again");
            }
            let pause = backoff.next(&self.supply.0.rng);
            tokio::select! {
                biased;
                // Both cancel safe. If it is to go, the state no longer matters: it is taken down, or left.
                _ = self.desired.wait_for(|desired| *desired != Desired::Running) => return Ok(VmState::Running),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Whether the hypervisor lists it as this installation's. A name alone proves nothing (threats.md H16, H17).
    async fn is_ours(&self) -> Result<bool, VmError> {
        let listed = self.supply.list().await?;
        Ok(listed.iter().any(|vm| vm.name == self.name))
    }

    async fn wait_for_change(&mut self) {
        // An error means that the handle was dropped: the job task died, and recovery reaps.
        let _ = self.desired.wait_for(|desired| *desired != Desired::Running).await;
    }

    /// Serves channel and console, and waits for the VM's end or its owner's word. `golden`: it was restored from that, and is
    /// not heard of for ever.
    async fn watch(&mut self, golden: Option<&Key>) -> Watched {
        let mut wires = JoinSet::new();
        let (ended_out, mut ended) = mpsc::channel(1);
        wires.spawn(self.wires.clone().serve_console());
        wires.spawn(self.wires.clone().serve_channel(ended_out));
        wires.spawn(self.wires.clone().keep_egress());
        let started = Instant::now();
        let mut unheard = golden;
        let mut listing = self.supply.0.listing.clone();
        let mut told = VmState::Running;
        while self.desired() == Desired::Running {
            let mut seen = tokio::select! {
                biased;
                // All cancel safe. The owner first: what is to go needs no further news.
                changed = self.desired.changed() => {
                    if changed.is_err() {
                        // The owner's task died; another takes the VM up, or the sweep reaps it.
                        return Watched::ToTheEnd;
                    }
                    continue;
                }
                () = tokio::time::sleep_until(started + RESTORE_PATIENCE), if unheard.is_some() => {
                    if !self.wires.greeted.load(Ordering::Relaxed) {
                        return Watched::Unheard(VmError::late("hear of restored VM", &self.name, RESTORE_PATIENCE));
                    }
                    unheard = None;
                    continue;
                }
                // The channel's end tells QEMU's death within milliseconds …
                Some(()) = ended.recv() => self.supply.hypervisor().state(&self.name).await.ok(),
                // … the list within its interval, whatever becomes of the channel.
                () = listing.changed() => listing.look(|list| {
                    let newer = list.asked.is_some_and(|asked| asked > started);
                    newer.then(|| list.vms.get(&self.name).copied().unwrap_or(VmState::Gone))
                }),
            };
            if seen == Some(VmState::Gone) && told.ending().is_none() {
                // A list does not tell how. Without an answer it has ended all the same.
                let how = self.supply.hypervisor().state(&self.name).await.ok().and_then(VmState::ending);
                seen = how.map(VmState::Ended).or(seen);
            }
            // The end is told once, and a pause once until it is over.
            let Some(seen) = seen.filter(|seen| *seen != told && told.ending().is_none()) else { continue };
            if unheard.is_some() && seen.ending().is_some() && !self.wires.greeted.load(Ordering::Relaxed) {
                let why = "it ended before its guest had shown the pass";
                return Watched::Unheard(VmError::refused("hear of restored VM", &self.name, why));
            }
            told = seen;
            if let VmState::Paused(why @ (Pause::Disk | Pause::Itself)) = seen {
                let qemu = self.supply.hypervisor().last_words(&self.name).await;
                let (why, qemu) = (why.words(), qemu.unwrap_or_default());
                tracing::warn!(vm = %self.id, why, qemu, "a machine was stopped");
            }
            self.tell(match seen {
                VmState::Gone => MachineEvent::Stopped(Ending::Unseen),
                VmState::Ended(ending) => MachineEvent::Stopped(ending),
                VmState::Paused(why) => MachineEvent::Paused(why),
                VmState::Running => MachineEvent::Resumed,
            })
            .await;
        }
        if let Some(key) = golden.filter(|_| self.wires.greeted.load(Ordering::Relaxed)) {
            self.supply.0.goldens.did_well(key);
        }
        Watched::ToTheEnd
    }
}

/// How a watch ended.
#[derive(Debug)]
enum Watched {
    /// By the machine's owner.
    ToTheEnd,
    /// The guest of a restored machine has not shown its pass in time, or will not any more.
    Unheard(VmError),
}
