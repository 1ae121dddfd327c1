//! The machine of one job and its door: planned, written down, made, adopted, taken down.

use super::Machinery;
use crate::failpoint::{Point, reached};
use crate::gitlab::JobPayload;
use crate::guest::{self, Admission};
use crate::guest_config::{GuestParts, guest_config};
use crate::job::journal::Record;
use crate::job::lines;
use crate::job::state::Event;
use crate::machine_spec::MachineSpec;
use crate::secret::Secret;
use crate::supply::{Blueprint, MachineRecord, Order, Supply};
use crate::telemetry::chain;
use crate::vm::DoorListener;
use dayfly_guest_config::{GuestConfig, Pass};
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// Ports tried for one door before the job's machine counts as failed.
const PORT_TRIES: u32 = 8;

/// How long a door of before is tried to be bound again: less than the relay's patience.
const REBIND_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two tries.
const REBIND_PAUSE: Duration = Duration::from_millis(500);

/// The guest runner's `--wait-timeout` beyond the boot deadline: it must outlast us.
const WAIT_MARGIN: Duration = Duration::from_secs(60);

/// Machines that are gone, and whose ports a record on disk may still name. What is left when the job is over is free.
pub(super) struct LetGo {
    supply: Supply,
    /// Each with whether its port is somebody else's.
    machines: Vec<(MachineRecord, bool)>,
}

impl LetGo {
    pub(super) fn new(supply: Supply) -> Self {
        Self { supply, machines: Vec::new() }
    }

    /// No record names them any more.
    pub(super) fn free(&mut self) {
        for (machine, in_use) in self.machines.drain(..) {
            self.supply.forget(&machine, in_use);
        }
    }
}

impl Drop for LetGo {
    fn drop(&mut self) {
        self.free();
    }
}

impl Machinery {
    /// The last lines of the machine's console, without what the job's log masks; `None`: there is no machine, or what
    /// to mask is not known any more.
    pub(in crate::job) fn console_tail(&self) -> Option<String> {
        self.masked(&self.machine.as_ref()?.console_tail())
    }

    /// What a machine has said, without what the job's log masks; `None`: that is not known any more.
    pub(in crate::job) fn masked(&self, text: &str) -> Option<String> {
        Some(lines::masked(text, &self.payload.as_ref()?.masks))
    }

    /// Writes the machine's names down, opens its door, and has it made. `resume`: it must exist.
    pub(in crate::job) async fn take_machine(&mut self, resume: bool) -> Result<(), Event> {
        if self.payload.is_none() {
            tracing::warn!("the job's payload did not survive; was the host restarted?");
            return Err(Event::CannotGoOn);
        }
        let spec = self.record.machine_spec.clone();
        // A guest that has its job needs nothing of the image any more.
        let made_of = match spec.filter(|_| !resume) {
            None if resume => None,
            // Said when it was looked for.
            None => return Err(Event::ImageUnusable),
            Some(spec) => match self.parts.images.load_version(&spec.image).await {
                Ok(image) => Some((spec, image)),
                Err(error) => {
                    tracing::error!(image = spec.image.name, error = chain(&error), "the job's image cannot be used");
                    if self.record.machine.is_none() {
                        return Err(Event::ImageUnusable);
                    }
                    // The machine of before may run already.
                    None
                }
            },
        };
        let (machine, config, listener) = match (self.record.machine.clone(), &made_of) {
            (Some(machine), made_of) => self.known_machine(machine, made_of.as_ref().map(|(spec, _)| spec)).await?,
            (None, Some((spec, _))) => self.new_machine(spec).await?,
            (None, None) => return Err(Event::CannotGoOn),
        };
        self.open_door(&machine, &config, listener)?;
        self.machine_task_lost = None;
        self.machine = Some(self.parts.supply.take(Order {
            machine,
            bound: (self.record.key.runner.clone(), self.record.key.id.0),
            config: config.to_line(),
            make: made_of.map(|(spec, image)| Blueprint::new(&spec, image)),
        }));
        Ok(())
    }

    fn open_door(
        &mut self,
        machine: &MachineRecord,
        config: &GuestConfig,
        listener: Box<dyn DoorListener>,
    ) -> Result<(), Event> {
        let Some(pass) = Pass::from_text(&config.pass) else { return Err(Event::CannotGoOn) };
        self.last_spoke = self.parts.awake.now();
        self.door = Some(guest::admit(Admission {
            vm: machine.id.clone(),
            listener,
            pass,
            guest_token: Secret::new(guest_token(config)),
            job: self.record.key.id,
            job_token: self.record.job_token.clone(),
            dependencies: self.payload.as_ref().map(|payload| payload.dependencies.clone()).unwrap_or_default(),
            spool: self.trace.spool.writer(),
            client: self.trace.client.clone(),
            direct_download: self.record.machine_spec.as_ref().is_some_and(|spec| spec.runner.direct_download),
            events: self.guest_out.clone(),
            view: self.guest_view.subscribe(),
            limits: self.parts.door_limits.clone(),
            rng: self.parts.rng.clone(),
            clock: self.parts.clock.clone(),
            metrics: self.parts.metrics.clone(),
        }));
        Ok(())
    }

    /// The job of a newer 201 takes the place of the one that no guest has been given yet; the
    /// machine goes on booting. `false`: it could not be written down, and all is as it was.
    pub(in crate::job) async fn renew(&mut self, payload: JobPayload) -> Result<bool, Event> {
        let record = Record {
            job_token: payload.token.clone(),
            received: self.parts.clock.now(),
            received_uptime_ms: u64::try_from(self.parts.clock.uptime().as_millis()).ok(),
            timeout_s: payload.timeout.map(|timeout| timeout.as_secs()),
            name: payload.name.clone(),
            project: payload.project.clone(),
            debug_trace: self.record.debug_trace || payload.debug_trace,
            knows_interrupted: payload.failure_reasons.iter().any(|reason| reason == "runner_interrupted"),
            ..self.record.clone()
        };
        if let Err(error) = self.parts.journal.accept(&record, payload.raw().clone()).await {
            tracing::error!(error = chain(&error), "write the newer job down");
            return Ok(false);
        }
        self.record = record;
        self.times.begin_anew(&self.parts);
        self.trace.debug_trace.send_replace(self.record.debug_trace);
        self.trace.client.renew(payload.token.clone());
        self.payload = Some(payload);
        // The door holds its guest to the token of before. Its relay waits meanwhile.
        if let (Some(machine), true, false) = (self.record.machine.clone(), self.door.is_some(), self.another) {
            self.close_door().await;
            let (machine, config, listener) = self.known_machine(machine, None).await?;
            self.open_door(&machine, &config, listener)?;
        }
        Ok(true)
    }

    /// GitLab has given out the job that the guest works at once more. It is told by the token that
    /// the guest knows as long as it takes that, and by the newer one from then on.
    pub(in crate::job) async fn note_newer_token(&mut self, token: Secret) {
        self.record.newer_token = Some(token.clone());
        self.trace.newer_token.send_replace(Some(token));
        self.put().await;
    }

    /// A machine of the record, after a restart: its pass is in the runtime directory. `made_of`: it may be made from this.
    async fn known_machine(
        &mut self,
        machine: MachineRecord,
        made_of: Option<&MachineSpec>,
    ) -> Result<(MachineRecord, GuestConfig, Box<dyn DoorListener>), Event> {
        let kept = match self.parts.journal.guest(&self.record.key).await {
            Ok(line) => Some(GuestConfig::from_line(&line).map_err(|error| {
                tracing::error!(error = chain(&error), "read the kept guest config");
                Event::CannotGoOn
            })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(error = chain(&error), "read the kept guest config");
                return Err(Event::HostDiskFailed);
            }
        };
        // None, or that of the machine before: the crash came between record and guest config, and nothing of this
        // machine was made.
        let config = match (kept.filter(|config| config.vm == machine.id.as_str()), made_of) {
            (Some(config), _) => config,
            (None, Some(spec)) => self.write_config(&machine, spec).await?,
            (None, None) if self.record.guest_base.is_none() => return Err(Event::ImageUnusable),
            (None, None) => {
                tracing::error!("the guest config of a machine that has its job is not there any more");
                return Err(Event::HostDiskFailed);
            }
        };
        let since = Instant::now();
        let listener = loop {
            let error = match self.listen(&machine).await {
                Ok(listener) => break listener,
                Err(error) => error,
            };
            if self.parts.leave.is_cancelled() {
                // The next process binds it: nothing is lost with a try of this one.
                return Err(Event::NoDoor);
            }
            // The process before may still be closing it; the guest's relay waits.
            if since.elapsed() >= REBIND_PATIENCE {
                tracing::error!(error = chain(&error), port = machine.lease.port, "bind the guest's door again");
                return Err(Event::CannotGoOn);
            }
            tokio::time::sleep(REBIND_PAUSE).await;
        };
        Ok((machine, config, listener))
    }

    /// A new machine: names, record, guest config, door, in this order.
    async fn new_machine(
        &mut self,
        spec: &MachineSpec,
    ) -> Result<(MachineRecord, GuestConfig, Box<dyn DoorListener>), Event> {
        if !self.let_go.machines.is_empty() && !self.put().await {
            return Err(Event::HostDiskFailed);
        }
        for _ in 0..PORT_TRIES {
            let machine = self.parts.supply.plan().map_err(|error| {
                tracing::warn!(error = chain(&error), "choose a door for the guest; the job waits for one");
                Event::NoDoor
            })?;
            self.record.machine = Some(machine.clone());
            if !self.put().await {
                self.let_go(false).await;
                return Err(Event::HostDiskFailed);
            }
            // The record names a machine now, and nothing of it is there.
            reached(Point::K4);
            match self.listen(&machine).await {
                Ok(listener) => {
                    reached(Point::K7);
                    return match self.write_config(&machine, spec).await {
                        Ok(config) => {
                            reached(Point::K6);
                            Ok((machine, config, listener))
                        }
                        Err(event) => {
                            drop(listener);
                            self.let_go(false).await;
                            Err(event)
                        }
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    tracing::info!(port = machine.lease.port, "somebody else listens at this port; trying another");
                    if !self.let_go(true).await {
                        return Err(Event::HostDiskFailed);
                    }
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), port = machine.lease.port, "bind a door");
                    self.let_go(false).await;
                    return Err(Event::MachineFailed);
                }
            }
        }
        Err(Event::MachineFailed)
    }

    /// Nothing of the machine is there, or all of it is gone. Its port is free once the record on disk does not name it
    /// any more: after a restart a job binds the door of its record. `false`: that could not be written.
    async fn let_go(&mut self, in_use: bool) -> bool {
        self.let_go.machines.extend(self.record.machine.take().map(|machine| (machine, in_use)));
        self.put().await
    }

    async fn listen(&self, machine: &MachineRecord) -> io::Result<Box<dyn DoorListener>> {
        self.parts.supply.hypervisor().listen(machine.lease.listen_address()).await
    }

    async fn write_config(&self, machine: &MachineRecord, spec: &MachineSpec) -> Result<GuestConfig, Event> {
        let limits = &self.parts.limits;
        let config = guest_config(
            &GuestParts {
                vm: &machine.id,
                lease: &machine.lease,
                spec,
                installation_machine_id: &self.parts.machine_id,
                wait_timeout: limits.boot_deadline.get() + WAIT_MARGIN,
                door_patience: limits.door_patience.get(),
                power_off_after: limits.guest_power_off.get(),
            },
            &self.parts.clock,
            &self.parts.rng,
        );
        self.parts.journal.put_guest(&self.record.key, config.to_line()).await.map_err(|error| {
            tracing::error!(error = chain(&error), "keep the guest config");
            Event::HostDiskFailed
        })?;
        Ok(config)
    }

    /// Takes the machine down. `true`: there is none.
    pub(in crate::job) async fn release_machine(&mut self) -> bool {
        self.another = false;
        if self.machine.is_none() {
            let Some(machine) = self.record.machine.clone() else {
                self.close_door().await;
                return true;
            };
            self.machine = Some(self.parts.supply.reap(machine));
        }
        if let Some(machine) = &self.machine {
            machine.release();
        }
        false
    }

    /// Whether the machine is on its way out, and another will be made.
    pub(in crate::job) fn is_being_replaced(&self) -> bool {
        self.another
    }

    /// Takes the machine down so that another can be made. `false`: there is none.
    pub(in crate::job) fn release_for_another(&mut self) -> bool {
        self.another = true;
        match &self.machine {
            Some(machine) => machine.release(),
            None => match self.record.machine.clone() {
                Some(machine) => {
                    let machine = self.parts.supply.reap(machine);
                    machine.release();
                    self.machine = Some(machine);
                }
                None => self.another = false,
            },
        }
        self.another
    }

    /// The machine is gone: its door closes. `true`: another is wanted.
    pub(in crate::job) async fn machine_released(&mut self) -> bool {
        self.machine = None;
        self.close_door().await;
        if self.another {
            self.let_go(false).await;
        } else if let Some(gone) = self.record.machine.take() {
            // A job that is over opens no door after a restart.
            self.parts.supply.forget(&gone, false);
        }
        std::mem::take(&mut self.another)
    }

    async fn close_door(&mut self) {
        if let Some(door) = self.door.take() {
            door.revoke().await;
        }
        // Events of the machine that was must not be taken for the next one's.
        while self.guest_in.try_recv().is_ok() {}
    }
}

/// The guest token, out of the config.toml that carries it.
fn guest_token(config: &GuestConfig) -> String {
    let parsed = config.runner.config_toml.parse::<toml_edit::DocumentMut>().ok();
    let token = parsed.as_ref().and_then(|doc| doc.get("runners")?.get(0)?.get("token")?.as_str().map(str::to_owned));
    token.unwrap_or_default()
}
