//! Plain QEMU, without libvirt: started by us so that it outlives us, found again by what it holds, watched over QMP.
//!
//! For trials, CI and hosts that have no libvirtd. QEMU runs as ourselves, as at libvirt's session, and needs no root.
//! All of a machine is in one directory, which belongs to one daemon:
//!
//! | file | what | whose |
//! | --- | --- | --- |
//! | `df-<id>.vm` | whose machine it is, and what became of it; its lock is the machine: [`record`] | ours |
//! | `df-<id>.qmp` | QEMU's monitor: [`qmp`], listened to by one task: [`watch`] | QEMU's |
//! | `df-<id>.log` | what QEMU complains of, its first 16 KiB: [`log`] | ours |
//! | `df-<id>.mig` | for the moment in which a machine is frozen or restored: [`frozen`] | ours, or QEMU's |
//! | `df-<id>.guest`, `.door`, `.con`, `.egress` | channel, door, console and egress, as with any back end | QEMU's |
//!
//! A start that is cut at any point leaves a record without a lock, which the next look removes, or a QEMU that holds
//! one, which `list` shows. A number of a process is never kept, so none is ever mistaken.

mod apart;
mod args;
mod frozen;
mod log;
mod qmp;
mod record;
mod watch;

use super::sockets::check_path;
use super::{
    Ending, HostInfo, Hypervisor, InstallationId, Usage, VmError, VmName, VmSpec, VmState, VmSummary, own_memory_mib,
};
use crate::BoxFuture;
use crate::process::{Program, bounded_log, start_outliving};
use apart::Apart;
use log::Log;
use record::{Found, Owner, Records};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OnceCell, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use watch::{Question, Watch};

/// The program; `process` knows where to look.
const EMULATOR: &str = "qemu-system-x86_64";

/// `--version` takes 30 ms.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Takes 0.1 s on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Takes milliseconds, unless the kernel holds the process.
const DESTROY_DEADLINE: Duration = Duration::from_secs(30);

/// Takes milliseconds.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// How long each kinder way to end a QEMU is waited for: QMP, then SIGTERM.
const PATIENCE: Duration = Duration::from_secs(3);

/// Between two looks at a machine that is coming or going.
const GLANCE: Duration = Duration::from_millis(5);

/// One machine's listener; whoever has it may connect.
type Slot = Arc<tokio::sync::Mutex<Option<Watch>>>;

/// Machines as processes of QEMU's. Clones are the same.
#[derive(Clone)]
pub struct Qemu(Arc<Inner>);

struct Inner {
    emulator: PathBuf,
    records: Records,
    /// Held while a record is looked at or made: a look takes its lock for a moment. Never across an await.
    looking: Mutex<()>,
    watches: Mutex<BTreeMap<VmName, Slot>>,
    apart: OnceCell<Apart>,
}

impl fmt::Debug for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Qemu").field(&self.0.records.directory).finish()
    }
}

impl Qemu {
    /// The machines of this directory, a short path that nobody else may pass.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self::with_emulator(directory, Path::new(EMULATOR))
    }

    fn with_emulator(directory: &Path, emulator: &Path) -> Self {
        Self(Arc::new(Inner {
            emulator: emulator.to_owned(),
            records: Records { directory: directory.to_owned() },
            looking: Mutex::new(()),
            watches: Mutex::default(),
            apart: OnceCell::new(),
        }))
    }

    /// Runs blocking calls where they may block, one at a time. `subject`: a VM, or whose VMs.
    async fn one_at_a_time<T: Send + 'static>(
        &self,
        what: &'static str,
        subject: &(impl fmt::Display + Sync),
        work: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> Result<T, VmError> {
        let inner = self.0.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = inner.looking.lock().unwrap_or_else(PoisonError::into_inner);
            work(&inner)
        });
        let done = done.await.map_err(io::Error::other).and_then(|done| done);
        done.map_err(|source| VmError::refused(what, subject, source))
    }

    /// The same, for calls on records alone.
    async fn records<T: Send + 'static>(
        &self,
        what: &'static str,
        name: &VmName,
        work: impl FnOnce(&Records) -> io::Result<T> + Send + 'static,
    ) -> Result<T, VmError> {
        self.one_at_a_time(what, name, |inner| work(&inner.records)).await
    }

    async fn look(&self, what: &'static str, name: &VmName) -> Result<Found, VmError> {
        let wanted = name.clone();
        self.records(what, name, move |records| records.look(&wanted)).await
    }

    /// Waits until a machine's process has gone. `false`: not by then.
    async fn await_gone(&self, what: &'static str, name: &VmName, until: Instant) -> Result<bool, VmError> {
        while matches!(self.look(what, name).await?, Found::Alive { .. }) {
            if Instant::now() >= until {
                return Ok(false);
            }
            sleep(GLANCE).await;
        }
        Ok(true)
    }

    fn slot(&self, name: &VmName) -> Slot {
        self.0.watches.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default().clone()
    }

    /// Nobody listens to this machine any more: it is gone.
    fn forget(&self, name: &VmName) {
        self.0.watches.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// What `of` tells of the listener of a machine, which is made if there is none.
    async fn listening<T>(&self, name: &VmName, of: impl FnOnce(&Watch) -> T) -> Result<T, VmError> {
        let slot = self.slot(name);
        let mut slot = slot.lock().await;
        if let Some(watch) = slot.as_ref().filter(|watch| watch.is_at_work()) {
            return Ok(of(watch));
        }
        // The connection of before goes first: QEMU serves one at a time.
        *slot = None;
        let watch = Watch::begin(&self.0.records, name).await.map_err(|source| VmError::Unreachable {
            uri: self.0.records.path(name, "qmp").display().to_string(),
            source: source.into(),
        })?;
        Ok(of(slot.insert(watch)))
    }

    /// QEMU has answered, so this machine has been one.
    async fn note_up(&self, what: &'static str, name: &VmName) -> Result<(), VmError> {
        let noted = name.clone();
        self.records(what, name, move |records| records.note_up(&noted)).await
    }

    async fn ask_state(&self, name: &VmName) -> Result<Option<VmState>, VmError> {
        let questions = self.listening(name, Watch::questions).await?;
        let (reply, answer) = oneshot::channel();
        // An error of either: the listener has ended, most likely with its QEMU.
        if questions.send(Question::State(reply)).await.is_err() {
            return Ok(None);
        }
        Ok(answer.await.ok())
    }

    /// Bytes that were written to its disks.
    async fn written(&self, name: &VmName) -> Option<u64> {
        let questions = self.listening(name, Watch::questions).await.ok()?;
        let (reply, answer) = oneshot::channel();
        questions.send(Question::Disks(reply)).await.ok()?;
        written(&answer.await.ok()?)
    }

    async fn state_of(&self, name: &VmName) -> Result<VmState, VmError> {
        const WHAT: &str = "read state of VM";
        let until = Instant::now() + LOOK_DEADLINE;
        let late = || VmError::late(WHAT, name, LOOK_DEADLINE);
        loop {
            let (up, ended) = match self.look(WHAT, name).await? {
                Found::Nothing => return Ok(VmState::Gone),
                Found::Gone { ended: Some(ending) } => return Ok(VmState::Ended(ending)),
                Found::Gone { ended: None } => {
                    let log = self.log(WHAT, name).await?;
                    return Ok(VmState::Ended(log::of_process(&self.all_of(WHAT, name, log).await?)));
                }
                Found::Alive { up, ended, .. } => (up, ended),
            };
            let state = match ended {
                Some(ending) => Some(VmState::Ended(ending)),
                None => match timeout_at(until, self.ask_state(name)).await.map_err(|_| late())? {
                    // It is coming up, or going.
                    Err(error) if Instant::now() + GLANCE >= until => return Err(error),
                    Err(_) => None,
                    Ok(state) => state,
                },
            };
            match state {
                Some(state) => {
                    if !up {
                        self.note_up(WHAT, name).await?;
                    }
                    if !stays(state) {
                        // Its QEMU has been told to go, or is about to; what will not go is for `destroy`.
                        self.await_gone(WHAT, name, until.min(Instant::now() + PATIENCE)).await?;
                    }
                    return Ok(state);
                }
                None if Instant::now() >= until => return Err(late()),
                None => sleep(GLANCE).await,
            }
        }
    }

    async fn log(&self, what: &'static str, name: &VmName) -> Result<Log, VmError> {
        let path = self.0.records.path(name, "log");
        self.records(what, name, move |_| Ok(Log::open(&path))).await
    }

    /// All that a QEMU has said which has gone: its last words may still be on their way to the log.
    async fn all_of(&self, what: &'static str, name: &VmName, log: Log) -> Result<String, VmError> {
        let until = Instant::now() + PATIENCE;
        while !log.is_whole() && Instant::now() < until {
            sleep(GLANCE).await;
        }
        self.records(what, name, move |_| Ok(log.read())).await
    }

    async fn start_one(&self, spec: &VmSpec) -> Result<(), VmError> {
        const WHAT: &str = "start VM";
        let name = VmName::from(spec.id.clone());
        let until = Instant::now() + START_DEADLINE;
        let qmp = self.0.records.path(&name, "qmp");
        for path in spec.sockets().iter().chain([&qmp]) {
            check_path(path).map_err(|error| VmError::refused(WHAT, &name, error))?;
        }
        let moving = self.0.records.path(&name, "mig");
        check_path(&moving).map_err(|error| VmError::refused(WHAT, &name, error))?;
        let arguments = args::arguments(spec, &qmp).map_err(|error| VmError::refused(WHAT, &name, error))?;
        let apart = *self.0.apart.get_or_init(Apart::find).await;
        let properties = apart::properties(spec);
        let (program, arguments, environment) =
            apart.command(self.0.emulator.as_os_str(), Some(&name), &properties, &arguments);
        let owner = Owner { installation: spec.installation.clone(), vm: spec.id.clone() };
        let wanted = name.clone();
        let theirs = self.records(WHAT, &name, move |records| {
            match records.look(&wanted)? {
                Found::Alive { owner: found, .. } => return Ok(found.installation != owner.installation),
                Found::Nothing | Found::Gone { .. } => records.remove(&wanted)?,
            }
            let lock = records.create(&wanted, &owner)?;
            let log = bounded_log(&records.path(&wanted, "log"), log::BYTES_MAX)?;
            start_outliving(&program, &arguments, &environment, lock, log)?;
            Ok(false)
        });
        if theirs.await? {
            return Err(VmError::refused(WHAT, &name, "a VM of this name is somebody else's"));
        }
        loop {
            match timeout_at(until, self.listening(&name, |_| ())).await {
                Ok(Ok(())) => break,
                _ if Instant::now() >= until => {
                    return Err(VmError::late(WHAT, &name, START_DEADLINE));
                }
                _ => {}
            }
            // Its log before the look: that removes what a QEMU which never came up has left.
            let log = self.log(WHAT, &name).await?;
            if !matches!(self.look(WHAT, &name).await?, Found::Alive { .. }) {
                let said = self.all_of(WHAT, &name, log).await?;
                let said = log::head(&said).unwrap_or_else(|| "QEMU ended at once, without a word".into());
                return Err(VmError::refused(WHAT, &name, said));
            }
            sleep(GLANCE).await;
        }
        self.note_up(WHAT, &name).await?;
        match &spec.frozen {
            Some(frozen) => self.restore(&name, frozen, &moving, until).await,
            None => Ok(()),
        }
    }

    async fn destroy_one(&self, name: &VmName) -> Result<(), VmError> {
        const WHAT: &str = "destroy VM";
        let until = Instant::now() + DESTROY_DEADLINE;
        if let Found::Alive { ended, .. } = self.look(WHAT, name).await? {
            if ended.is_none() {
                // Else the next daemon, if we die here, would take it for a crash. On a full disk it does.
                let noted = name.clone();
                let _ = self.records(WHAT, name, move |records| records.note_ended(&noted, Ending::Destroyed)).await;
            }
            let asked = timeout(PATIENCE, async {
                let questions = self.listening(name, Watch::questions).await?;
                let (reply, answer) = oneshot::channel();
                let _ = questions.send(Question::Quit(reply)).await;
                let _ = answer.await;
                Ok::<_, VmError>(())
            });
            // One that does not answer is not asked for long.
            let asked = matches!(asked.await, Ok(Ok(())));
            let mut gone = asked && self.await_gone(WHAT, name, Instant::now() + PATIENCE).await?;
            for (signal, patience) in [(Signal::TERM, PATIENCE), (Signal::KILL, DESTROY_DEADLINE)] {
                if !gone {
                    let wanted = name.clone();
                    self.records(WHAT, name, move |records| records.signal(&wanted, signal)).await?;
                    gone = self.await_gone(WHAT, name, until.min(Instant::now() + patience)).await?;
                }
            }
            if !gone {
                return Err(VmError::late(WHAT, name, DESTROY_DEADLINE));
            }
        }
        self.forget(name);
        let wanted = name.clone();
        self.records(WHAT, name, move |records| match records.look(&wanted)? {
            // Somebody has started it again.
            Found::Alive { .. } => Ok(()),
            Found::Nothing | Found::Gone { .. } => records.remove(&wanted),
        })
        .await
    }

    async fn list_of(&self, installation: &InstallationId) -> Result<Vec<VmSummary>, VmError> {
        let wanted = installation.clone();
        let found = self.one_at_a_time("list VMs of", installation, move |inner| {
            let mut found = Vec::new();
            let names = inner.records.names()?;
            // Whoever has gone without being destroyed is listened to no more.
            inner.watches.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| names.contains(name));
            for name in names {
                match inner.records.look(&name)? {
                    Found::Alive { owner, ended, .. } if owner.installation == wanted => found.push((name, ended)),
                    _ => {}
                }
            }
            Ok(found)
        });
        let found = found.await?;
        let mut asked = JoinSet::new();
        for (name, ended) in found {
            let qemu = self.clone();
            asked.spawn(async move {
                let known = match ended {
                    Some(ending) => VmState::Ended(ending),
                    // One that does not answer is there all the same, and holds up no other.
                    None => {
                        let known = timeout(LOOK_DEADLINE / 2, qemu.listening(&name, Watch::known)).await;
                        known.ok().and_then(Result::ok).unwrap_or(VmState::Running)
                    }
                };
                VmSummary { name, state: known }
            });
        }
        let mut vms = asked.join_all().await;
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(vms)
    }
}

/// The sum of what went to all disks, by an answer to `query-blockstats`.
fn written(disks: &serde_json::Value) -> Option<u64> {
    let of = |disk: &serde_json::Value| disk.get("stats")?.get("wr_bytes")?.as_u64();
    let disks: Vec<u64> = disks.as_array()?.iter().filter_map(of).collect();
    (!disks.is_empty()).then(|| disks.iter().fold(0, |sum, bytes| u64::saturating_add(sum, *bytes)))
}

/// Whether something of a machine in this state is kept until it is destroyed.
fn stays(state: VmState) -> bool {
    match state {
        VmState::Running | VmState::Paused(_) => true,
        VmState::Ended(Ending::Panicked | Ending::Slept | Ending::Hung) => true,
        VmState::Ended(_) | VmState::Gone => false,
    }
}

impl Hypervisor for Qemu {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(async move {
            let version = Program::new(&self.0.emulator, PROBE_DEADLINE).arg("--version").run().await;
            let version = version.map_err(|source| VmError::Unreachable {
                uri: self.0.emulator.display().to_string(),
                source: source.into(),
            })?;
            let text = version.text();
            let first = text.lines().next().unwrap_or_default().replace(" emulator version", "");
            let kvm = tokio::task::spawn_blocking(|| {
                std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
            });
            Ok(HostInfo {
                version: first,
                cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
                memory_mib: own_memory_mib(),
                kvm_offered: kvm.await.unwrap_or(false),
            })
        })
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        // The effect does not depend on who waits: a machine that was begun is watched from its first word.
        Box::pin(self.start_one(spec))
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        Box::pin(self.state_of(name))
    }

    fn last_words<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Option<String>> {
        Box::pin(async move {
            const WHAT: &str = "read the log of VM";
            let read = timeout(LOOK_DEADLINE, async {
                let log = self.log(WHAT, name).await?;
                self.records(WHAT, name, move |_| Ok(log.read())).await
            });
            log::head(&read.await.ok()?.ok()?)
        })
    }

    fn usage<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Usage> {
        Box::pin(async move {
            let wanted = name.clone();
            let process = self.records("look at the use of VM", name, move |records| records.usage(&wanted));
            let disks = timeout(LOOK_DEADLINE, self.written(name));
            let (process, disks) = tokio::join!(process, disks);
            Usage { disk_written_bytes: disks.ok().flatten(), ..process.unwrap_or_default() }
        })
    }

    fn can_freeze(&self) -> bool {
        true
    }

    fn freeze<'a>(&'a self, name: &'a VmName, state: &'a Path) -> BoxFuture<'a, Result<[u8; 32], VmError>> {
        Box::pin(self.freeze_one(name, state))
    }

    fn go_on<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(self.go_on_one(name))
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(self.destroy_one(name))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        Box::pin(self.list_of(installation))
    }
}

#[cfg(test)]
mod tests;
