//! The machine of one job and its door: planned, written down, made, adopted, taken down.

use super::{Machinery, cached};
use crate::failpoint::{Point, reached};
use crate::gitlab::JobPayload;
use crate::guest::{self, Admission};
use crate::guest_config::{GuestParts, guest_config, guest_token};
use crate::image::manifest::Ability;
use crate::job::journal::Record;
use crate::job::lines;
use crate::job::state::Event;
use crate::machine_spec::MachineSpec;
use crate::metrics::Phase;
use crate::network::{Entrance, LeaseError, Terms};
use crate::secret::Secret;
use crate::supply::{Binding, Claim};
use crate::telemetry::chain;
use crate::vm::VmName;
use dayfly_guest_config::{GuestConfig, Pass};
use std::io;
use std::time::Duration;
use tokio::time::Instant;

/// How long a door of before is tried to be bound again: less than the relay's patience.
const REBIND_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two tries.
const REBIND_PAUSE: Duration = Duration::from_millis(500);

/// The guest runner's `--wait-timeout` beyond the boot deadline: it must outlast us.
const WAIT_MARGIN: Duration = Duration::from_secs(60);

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
        // One of a former daemon may be half made.
        let adopted = self.record.machine.is_some();
        let (claim, config, entrance) = match (self.record.machine.clone(), &made_of) {
            (Some(mut claim), made_of) => {
                self.adopt_clone(&mut claim).await;
                self.known_machine(claim, made_of.as_ref().map(|(spec, _)| spec)).await?
            }
            (None, Some((spec, image))) => self.new_machine(spec, image.manifest.can(Ability::Clone)).await?,
            (None, None) => return Err(Event::CannotGoOn),
        };
        self.open_door(&claim, &config, entrance)?;
        self.machine_task_lost = None;
        self.came_from = "cold";
        if made_of.is_some() && !adopted {
            self.begin_phase(Phase::Overlay);
        }
        let job = (self.record.key.runner.clone(), self.record.key.id.0);
        let machine = match made_of {
            Some((spec, image)) => self.parts.supply.start(claim, &spec, image, job, &config),
            None => self.parts.supply.resume(claim),
        };
        machine.bind(Binding { egress: self.terms(&config), config: config.to_line() });
        if let Some(payload) = &self.payload {
            self.looks.at(machine.console(), payload.masks.clone());
        }
        self.machine = Some(machine);
        Ok(())
    }

    /// What is told to who carries the machine's egress, by the record; `None`: it has a network card.
    fn terms(&self, config: &GuestConfig) -> Option<Terms> {
        let policy =
            self.record.machine_spec.as_ref().filter(|_| config.network.relay)?.egress.clone().unwrap_or_default();
        Some(Terms { pass: Pass::from_text(&config.pass)?, policy })
    }

    fn open_door(&mut self, machine: &Claim, config: &GuestConfig, entrance: Entrance) -> Result<(), Event> {
        let Some(pass) = Pass::from_text(&config.pass) else { return Err(Event::CannotGoOn) };
        self.last_spoke = self.parts.awake.now();
        self.door = Some(guest::admit(Admission {
            vm: machine.id.clone(),
            entrance,
            pass,
            guest_token: guest_token(config),
            job: self.record.key.id,
            job_token: self.record.job_token.clone(),
            dependencies: self.payload.as_ref().map(|payload| payload.dependencies.clone()).unwrap_or_default(),
            spool: self.trace.spool.writer(),
            client: self.trace.client.clone(),
            cache: self.cache.clone(),
            forwards: self.record.machine_spec.as_ref().map(|spec| spec.forwards.clone()).unwrap_or_default(),
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
        self.cache = cached::of(&self.parts, &self.record, self.payload.as_ref());
        // The door holds its guest to the token of before. Its relay waits meanwhile.
        if let (Some(machine), true, false) = (self.record.machine.clone(), self.door.is_some(), self.another) {
            self.close_door().await;
            let (machine, config, entrance) = self.known_machine(machine, None).await?;
            self.open_door(&machine, &config, entrance)?;
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
        machine: Claim,
        made_of: Option<&MachineSpec>,
    ) -> Result<(Claim, GuestConfig, Entrance), Event> {
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
        let entrance = loop {
            let error = match self.parts.supply.listen(&machine).await {
                Ok(entrance) => break entrance,
                Err(error) => error,
            };
            if self.parts.leave.is_cancelled() {
                // The next process binds it: nothing is lost with a try of this one.
                return Err(Event::NoDoor);
            }
            // The process before may still be closing it; the guest's relay waits.
            if since.elapsed() >= REBIND_PATIENCE {
                tracing::error!(error = chain(&error), lease = %machine.lease, "bind the guest's door again");
                return Err(Event::CannotGoOn);
            }
            tokio::time::sleep(REBIND_PAUSE).await;
        };
        Ok((machine, config, entrance))
    }

    /// A new machine: names and door, record, guest config, in this order.
    async fn new_machine(
        &mut self,
        spec: &MachineSpec,
        takes_clone: bool,
    ) -> Result<(Claim, GuestConfig, Entrance), Event> {
        if !self.gone.is_empty() && !self.put().await {
            return Err(Event::HostDiskFailed);
        }
        let mut machine = self.parts.supply.claim(spec.network, spec.door()).await.map_err(|error| match error {
            LeaseError::NoFreePort(_) | LeaseError::NoFreeUser(_) => {
                tracing::warn!(error = chain(&error), "choose the lease of a new machine; the job waits for one");
                Event::NoDoor
            }
            LeaseError::Listen { .. } => {
                tracing::error!(error = chain(&error), "bind a door");
                Event::MachineFailed
            }
        })?;
        reached(Point::K7);
        self.begin_clone(&mut machine, takes_clone);
        let begun = self.begin_machine(&mut machine, spec).await;
        if begun.is_err() {
            self.release_clone().await;
            self.let_go().await;
        }
        let (config, entrance) = begun?;
        Ok((machine, config, entrance))
    }

    async fn begin_machine(
        &mut self,
        machine: &mut Claim,
        spec: &MachineSpec,
    ) -> Result<(GuestConfig, Entrance), Event> {
        self.record.machine = Some(machine.clone());
        self.past.vm = Some(VmName::from(machine.id.clone()).to_string());
        if !self.put().await {
            return Err(Event::HostDiskFailed);
        }
        // The record names a machine now, and nothing of it is there.
        reached(Point::K4);
        self.prepare_clone(machine).await;
        let config = self.write_config(machine, spec).await?;
        reached(Point::K6);
        let entrance = self.parts.supply.listen(machine).await.map_err(|error| {
            tracing::error!(error = chain(&error), "open the door of a new machine");
            Event::MachineFailed
        })?;
        Ok((config, entrance))
    }

    /// Nothing of the machine is there, or all of it is gone.
    async fn let_go(&mut self) {
        self.gone.extend(self.record.machine.take());
        self.put().await;
    }

    /// No record on disk names what is gone any more: its leases are given back.
    pub(super) async fn release_leases(&mut self) {
        let mut stuck = Vec::new();
        for machine in std::mem::take(&mut self.gone) {
            if let Err(error) = self.parts.supply.release(&machine).await {
                tracing::warn!(vm = %machine.id, error = chain(&error), "give a lease back; trying again");
                stuck.push(machine);
            }
        }
        self.gone = stuck;
    }

    async fn write_config(&self, machine: &Claim, spec: &MachineSpec) -> Result<GuestConfig, Event> {
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
                log_mib_max: limits.spool_mib,
                cache: self.cache.is_some(),
                clone: machine.clone.as_ref(),
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
        if !self.take_down() {
            self.close_door().await;
            return true;
        }
        false
    }

    /// Leaves the machine as it is for an operator, until then. It must exist: one of a former daemon is only watched.
    pub(in crate::job) fn keep_machine(&mut self, until: Instant) -> Result<(), Event> {
        if self.machine.is_none() {
            let Some(claim) = self.record.machine.clone() else { return Err(Event::MachineReleased) };
            let machine = self.parts.supply.resume(claim);
            if let Some(payload) = &self.payload {
                self.looks.at(machine.console(), payload.masks.clone());
            }
            self.machine = Some(machine);
        }
        if let Some(machine) = &self.machine {
            machine.stay(until);
        }
        Ok(())
    }

    /// Has the machine taken down. `false`: there is none.
    fn take_down(&mut self) -> bool {
        self.begin_phase(Phase::CleanUp);
        if let Some(machine) = &self.machine {
            machine.take_down();
            return true;
        }
        self.machine = self.record.machine.clone().map(|claim| self.parts.supply.reap(claim));
        self.machine.is_some()
    }

    /// Whether the machine is on its way out, and another will be made.
    pub(in crate::job) fn is_being_replaced(&self) -> bool {
        self.another
    }

    /// Takes the machine down so that another can be made. `false`: there is none.
    pub(in crate::job) fn release_for_another(&mut self) -> bool {
        self.another = self.take_down();
        self.another
    }

    /// The machine is gone: its door closes. `true`: another is wanted.
    pub(in crate::job) async fn machine_released(&mut self) -> bool {
        self.past.console = self.console_kept().filter(|_| !self.another);
        self.machine = None;
        self.end_phase(Phase::CleanUp);
        self.release_clone().await;
        self.close_door().await;
        if self.another {
            self.let_go().await;
        } else {
            // The job's new state is about to be written down.
            self.gone.extend(self.record.machine.take());
        }
        std::mem::take(&mut self.another)
    }

    /// Closes the guest's door.
    pub(in crate::job) async fn close_door(&mut self) {
        if let Some(door) = self.door.take() {
            door.revoke().await;
        }
        // Events of the machine that was must not be taken for the next one's.
        while self.guest_in.try_recv().is_ok() {}
    }
}
