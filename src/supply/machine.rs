//! One machine, from its overlay to its end: one task, which alone calls the hypervisor for it.
//!
//! ```text
//! make: overlay ─► start ─► channel, config ─► watch ──(release)──► destroy ─► overlay, sockets, lease
//!            └───────┴─ failed: reported; the job decides, then releases
//! ```
//!
//! Every step may run twice, so a machine found running after a restart of the daemon enters at
//! "channel". On `leave` (hand-over) the task ends and the machine lives on.

use super::MachineRecord;
use super::{Order, Supply};
use crate::failpoint::{Point, reached};
use crate::retry::Backoff;
use crate::telemetry::chain;
use crate::vm::console::{Ring, TAIL_BYTES_MAX};
use crate::vm::{Ending, Pause, Stream, VmError, VmName, VmSpec, VmState};
use dayfly_guest_config::{ClockQuestion, REPORT_LINE_MAX, Report};
use prometheus_client::metrics::gauge::Gauge;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Events that may wait for the job.
const EVENTS_MAX: usize = 64;

/// Reports of a guest that are passed on in one second; more are dropped.
const REPORTS_PER_SECOND: u32 = 20;

/// Pause before the channel or the console is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

/// What a machine's task tells its job.
#[derive(Debug)]
pub enum MachineEvent {
    /// The overlay is there.
    DiskReady,
    /// The VM has been started, or was found running.
    Started,
    /// What the guest program says; a hint, see [`Report`].
    Report(Report),
    /// It could not be made. It must still be released.
    Failed(VmError),
    /// It ended by itself, like this.
    Stopped(Ending),
    /// Its CPUs were stopped, and why.
    Paused(Pause),
    /// It goes on after a pause.
    Resumed,
    /// All of it is gone: VM, overlay, sockets. The last event. Its door and lease are the job's.
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Keep,
    Release,
    Leave,
}

/// The job's handle to its machine.
pub struct Machine {
    record: MachineRecord,
    events: mpsc::Receiver<MachineEvent>,
    wish: watch::Sender<Wish>,
    console: Arc<Mutex<Ring>>,
    greeted: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Machine {
    pub(super) fn make(supply: Supply, order: Order) -> Self {
        let record = order.machine.clone();
        Self::spawn(supply, record, move |driver| async move { driver.make(order).await })
    }

    pub(super) fn reap(supply: Supply, record: MachineRecord) -> Self {
        Self::spawn(supply, record, |mut driver| async move { driver.take_down().await })
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(
        supply: Supply,
        record: MachineRecord,
        run: impl FnOnce(Driver) -> F + Send + 'static,
    ) -> Self {
        let (events_out, events) = mpsc::channel(EVENTS_MAX);
        let (wish, wish_in) = watch::channel(Wish::Keep);
        let console = Arc::new(Mutex::new(Ring::default()));
        let greeted = Arc::new(AtomicBool::new(false));
        let turn = supply.begin(&record.id);
        let driver = Driver {
            name: VmName::from(record.id.clone()),
            record: record.clone(),
            supply,
            events: events_out,
            wish: wish_in,
            console: console.clone(),
            greeted: greeted.clone(),
        };
        #[expect(clippy::disallowed_methods, reason = "joined by the job, through `leave` or the last event")]
        let task = tokio::spawn(async move {
            let mut wish = driver.wish.clone();
            let leave = async { wish.wait_for(|wish| *wish == Wish::Leave).await.is_ok() };
            let _turn = tokio::select! {
                biased;
                // Both are cancel safe.
                turn = turn.lock_owned() => turn,
                true = leave => return,
            };
            run(driver).await;
        });
        Self { record, events, wish, console, greeted, task }
    }

    /// Its names.
    #[must_use]
    pub fn record(&self) -> &MachineRecord {
        &self.record
    }

    /// The next event; `None` after the last. Cancel safe.
    pub async fn event(&mut self) -> Option<MachineEvent> {
        self.events.recv().await
    }

    /// The guest has shown its pass: it has its config, which is not written again.
    pub fn greeted(&self) {
        self.greeted.store(true, Ordering::Relaxed);
    }

    /// Takes it down, for ever trying; [`MachineEvent::Released`] tells the end.
    pub fn release(&self) {
        self.wish.send_replace(Wish::Release);
    }

    /// The last bytes of its console, escaped.
    #[must_use]
    pub fn console_tail(&self) -> String {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).tail(TAIL_BYTES_MAX)
    }

    /// Lets go of it: the VM lives on for the next daemon.
    pub async fn leave(self) {
        // Also in mid-release: the next daemon finishes it, this one must end in seconds.
        self.wish.send_replace(Wish::Leave);
        drop(self.events);
        // Ends after the call to the hypervisor that is under way, each of which has a deadline.
        let _ = self.task.await;
    }
}

struct Driver {
    supply: Supply,
    record: MachineRecord,
    name: VmName,
    events: mpsc::Sender<MachineEvent>,
    wish: watch::Receiver<Wish>,
    console: Arc<Mutex<Ring>>,
    greeted: Arc<AtomicBool>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.supply.end(&self.record.id);
    }
}

impl Driver {
    /// What the job wants. A handle that was dropped without a wish is a job's task that has died: the machine is let
    /// go of, for nobody must make one that nobody knows.
    fn wish(&self) -> Wish {
        let wish = *self.wish.borrow();
        if wish == Wish::Keep && self.wish.has_changed().is_err() { Wish::Leave } else { wish }
    }

    async fn tell(&self, event: MachineEvent) {
        // Nobody listens after `leave`: the record holds what the next daemon needs.
        let _ = self.events.send(event).await;
    }

    async fn make(mut self, order: Order) {
        let mut wish = self.wish.clone();
        let started = tokio::select! {
            biased;
            // As for a call that hangs while the VM is taken down.
            Ok(_) = wish.wait_for(|wish| *wish == Wish::Leave) => return,
            started = self.start(&order) => started,
        };
        match started {
            Ok(None) => self.watch(&order.config).await,
            Ok(Some(ending)) => {
                self.tell(MachineEvent::Stopped(ending)).await;
                self.wait_for_wish().await;
            }
            // Its guest has shown the pass: it runs, whatever became of the call's answer.
            Err(error) if self.greeted.load(Ordering::Relaxed) => {
                tracing::warn!(vm = %self.record.id, error = chain(&error), "make a VM that runs already; it goes on");
                self.watch(&order.config).await;
            }
            Err(error) => {
                self.tell(MachineEvent::Failed(error)).await;
                self.wait_for_wish().await;
            }
        }
        if self.wish() == Wish::Release {
            self.take_down().await;
        }
    }

    /// Makes overlay and VM, unless the VM runs already. `Some`: it should have, and has ended.
    async fn start(&mut self, order: &Order) -> Result<Option<Ending>, VmError> {
        let host = self.supply.host().clone();
        let mut state = self.look(order.make.is_none()).await?;
        if state != VmState::Gone && order.make.is_some() {
            match (self.is_ours().await?, state) {
                // What is left of it is in the way of another of this name.
                (true, VmState::Ended(ending)) => return Ok(Some(ending)),
                (true, _) => {}
                (false, VmState::Ended(_)) => state = VmState::Gone,
                (false, _) => {
                    return Err(VmError::Refused {
                        what: "start VM",
                        name: self.name.to_string(),
                        source: "a VM of this name is somebody else's".into(),
                    });
                }
            }
        }
        if let Some(ending) = state.ending() {
            let Some(make) = &order.make else { return Ok(Some(ending)) };
            let place = self.supply.place();
            let overlay = self.supply.overlay(&self.record.id);
            host.sockets.remove(&place.socket_dir, &self.record.id).await.map_err(|source| VmError::Refused {
                what: "remove sockets of",
                name: self.name.to_string(),
                source: source.into(),
            })?;
            host.disks.create(&overlay, &make.base, make.disk_gib).await?;
            reached(Point::K5);
            self.tell(MachineEvent::DiskReady).await;
            if self.wish() != Wish::Keep {
                return Ok(None);
            }
            let spec = VmSpec {
                id: self.record.id.clone(),
                installation: place.installation.clone(),
                bound: Some(order.bound.clone()),
                cpus: make.cpus,
                memory_mib: make.memory_mib,
                accel: place.accel,
                boot: make.boot.clone(),
                overlay,
                base: make.base.clone(),
                attachment: self.record.lease.attachment(),
                socket_dir: place.socket_dir.clone(),
            };
            reached(Point::K8);
            host.hypervisor.start(&spec).await?;
            // QEMU has the files open by now: what is exchanged later does not matter to this machine.
            if !make.stamp.holds().await {
                return Err(VmError::Refused {
                    what: "start VM",
                    name: self.name.to_string(),
                    source: format!("base image `{}` was changed while the VM was being made", make.base.display())
                        .into(),
                });
            }
            // It runs, and we have not heard of it.
            reached(Point::K8);
        }
        self.tell(MachineEvent::Started).await;
        reached(Point::K9);
        Ok(None)
    }

    /// The VM's state. For a guest that has its job "I could not look" is not "it is gone": it is
    /// asked again until there is an answer, or a wish.
    async fn look(&mut self, patiently: bool) -> Result<VmState, VmError> {
        let mut backoff = Backoff::hypervisor();
        loop {
            let error = match self.supply.hypervisor().state(&self.name).await {
                Ok(state) => return Ok(state),
                Err(error) if patiently && error.is_transient() => error,
                Err(error) => return Err(error),
            };
            tracing::warn!(vm = %self.record.id, error = chain(&error), "look for the VM of a running job; trying again");
            let pause = backoff.next(&self.supply.0.rng);
            tokio::select! {
                biased;
                // Both cancel safe. With a wish the state no longer matters: it is taken down, or left.
                _ = self.wish.wait_for(|wish| *wish != Wish::Keep) => return Ok(VmState::Running),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Whether the hypervisor lists it as this installation's. A name alone proves nothing (threats.md H16, H17).
    async fn is_ours(&self) -> Result<bool, VmError> {
        let listed = self.supply.hypervisor().list(&self.supply.place().installation).await?;
        Ok(listed.iter().any(|vm| vm.name == self.name))
    }

    async fn wait_for_wish(&mut self) {
        // An error means that the handle was dropped: the job task died, and recovery reaps.
        let _ = self.wish.wait_for(|wish| *wish != Wish::Keep).await;
    }

    /// Serves channel and console, and waits for the VM's end or a wish.
    async fn watch(&mut self, config: &[u8]) {
        let mut wires = JoinSet::new();
        let (ended_out, mut ended) = mpsc::channel(1);
        self.serve_console(&mut wires);
        self.serve_channel(&mut wires, config.to_vec(), ended_out);
        let started = Instant::now();
        let mut listing = self.supply.0.listing.clone();
        let mut told = VmState::Running;
        while self.wish() == Wish::Keep {
            let mut seen = tokio::select! {
                biased;
                // All cancel safe. The wish first: a release needs no further news.
                wished = self.wish.changed() => {
                    if wished.is_err() {
                        // The job's task died; another takes the VM up, or the sweep reaps it.
                        return;
                    }
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
            told = seen;
            if let VmState::Paused(why @ (Pause::Disk | Pause::Itself)) = seen {
                let qemu = self.supply.hypervisor().last_words(&self.name).await;
                let (why, qemu) = (why.words(), qemu.unwrap_or_default());
                tracing::warn!(vm = %self.record.id, why, qemu, "a machine was stopped");
            }
            self.tell(match seen {
                VmState::Gone => MachineEvent::Stopped(Ending::Unseen),
                VmState::Ended(ending) => MachineEvent::Stopped(ending),
                VmState::Paused(why) => MachineEvent::Paused(why),
                VmState::Running => MachineEvent::Resumed,
            })
            .await;
        }
    }

    /// Writes the config until the guest has been seen, passes its reports on and tells it the time when it asks.
    fn serve_channel(&self, wires: &mut JoinSet<()>, config: Vec<u8>, ended: mpsc::Sender<()>) {
        let (supply, id, greeted, events) =
            (self.supply.clone(), self.record.id.clone(), self.greeted.clone(), self.events.clone());
        wires.spawn(async move {
            loop {
                if let Ok(stream) = supply.host().sockets.channel(&supply.place().socket_dir, &id).await {
                    let (reader, mut writer) = tokio::io::split(stream);
                    // One at a time: a guest that asks and does not read waits for itself.
                    let (questions_out, mut questions) = mpsc::channel::<ClockQuestion>(1);
                    let write = async {
                        if !greeted.load(Ordering::Relaxed) {
                            // An error shows at the reading half too.
                            let _ = writer.write_all(&config).await;
                            let _ = writer.flush().await;
                        }
                        while let Some(question) = questions.recv().await {
                            let answer = question.answer(supply.0.clock.now().as_microsecond());
                            let _ = writer.write_all(format!("{answer}\n").as_bytes()).await;
                            let _ = writer.flush().await;
                        }
                        std::future::pending::<()>().await;
                    };
                    tokio::select! {
                        biased;
                        // Reading ends with the stream; writing never ends by itself.
                        () = read_reports(reader, &events, &questions_out) => {}
                        () = write => {}
                    }
                }
                // A full queue holds the same news already.
                let _ = ended.try_send(());
                tokio::time::sleep(REOPEN_PAUSE).await;
            }
        });
    }

    /// Drains the console: an unread one stalls the guest.
    fn serve_console(&self, wires: &mut JoinSet<()>) {
        let (supply, id, console) = (self.supply.clone(), self.record.id.clone(), self.console.clone());
        wires.spawn(async move {
            loop {
                if let Ok(mut stream) = supply.host().sockets.console(&supply.place().socket_dir, &id).await {
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        console.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..read]);
                    }
                }
                tokio::time::sleep(REOPEN_PAUSE).await;
            }
        });
    }

    /// Takes down all there may be, in the order in which nothing can be left over. For ever: a
    /// stuck VM keeps its reservation, and nobody else's.
    async fn take_down(&mut self) {
        let host = self.supply.host().clone();
        let overlay = self.supply.overlay(&self.record.id);
        let mut backoff = Backoff::hypervisor();
        let mut wish = self.wish.clone();
        let mut stuck = None;
        loop {
            let attempt = async {
                // What is not listed is gone, or is not ours to destroy.
                if self.is_ours().await? {
                    host.hypervisor.destroy(&self.name).await?;
                }
                reached(Point::K16);
                let sockets = host.sockets.remove(&self.supply.place().socket_dir, &self.record.id).await;
                sockets.map_err(|source| VmError::Refused {
                    what: "remove sockets of",
                    name: self.name.to_string(),
                    source: source.into(),
                })?;
                // Last: with its record lost, a machine that is half taken down is known by its overlay.
                host.disks.remove(&overlay).await?;
                reached(Point::K17);
                Ok::<_, VmError>(())
            };
            let result = tokio::select! {
                biased;
                // A call that hangs must not hold a hand-over up: what is dropped here may take effect
                // or not, and the next daemon looks. A dropped handle disables the first branch.
                Ok(_) = wish.wait_for(|wish| *wish == Wish::Leave) => return,
                result = attempt => result,
            };
            match result {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(vm = %self.record.id, error = chain(&error), "could not take a VM down; trying again");
                    stuck.get_or_insert_with(|| Stuck::count(&self.supply));
                    let pause = backoff.next(&self.supply.0.rng);
                    tokio::select! {
                        biased;
                        // Both cancel safe. A dropped handle disables the first branch: go on trying.
                        Ok(_) = wish.wait_for(|wish| *wish == Wish::Leave) => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
        self.tell(MachineEvent::Released).await;
    }
}

/// A VM that could not be taken down, counted as long as that is so.
struct Stuck(Gauge);

impl Stuck {
    fn count(supply: &Supply) -> Self {
        let gauge = supply.0.metrics.job().stuck_domains.clone();
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Reads report lines until the stream ends. Long or too many lines are dropped: the guest is hostile.
async fn read_reports(
    reader: tokio::io::ReadHalf<Box<dyn Stream>>,
    events: &mpsc::Sender<MachineEvent>,
    questions: &mpsc::Sender<ClockQuestion>,
) {
    let mut reader = BufReader::with_capacity(REPORT_LINE_MAX + 1, reader);
    let mut line = Vec::new();
    let (mut window, mut count) = (Instant::now(), 0);
    loop {
        let piece = match reader.fill_buf().await {
            Ok([]) | Err(_) => return,
            Ok(piece) => piece,
        };
        let (taken, ended) = match piece.iter().position(|b| *b == b'\n') {
            Some(end) => (end + 1, true),
            None => (piece.len(), false),
        };
        if line.len() <= REPORT_LINE_MAX {
            line.extend_from_slice(&piece[..taken]);
        }
        reader.consume(taken);
        if !ended {
            continue;
        }
        if window.elapsed() >= Duration::from_secs(1) {
            (window, count) = (Instant::now(), 0);
        }
        count += 1;
        let bounded = count <= REPORTS_PER_SECOND && line.len() <= REPORT_LINE_MAX;
        let text = std::str::from_utf8(&line).ok().filter(|_| bounded).map(str::trim_end);
        if let Some(report) = text.and_then(Report::parse) {
            // Only a hint: dropped if the job is busy.
            let _ = events.try_send(MachineEvent::Report(report));
        } else if let Some(question) = text.and_then(ClockQuestion::parse) {
            let _ = questions.try_send(question);
        }
        line.clear();
    }
}
