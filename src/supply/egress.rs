//! The egress of a machine without a network card: begun with the machine, begun again if it dies, ended after it.
//!
//! It is not the machine's task that carries it, nor this daemon: a process does, which lives on (`network::egress`). So
//! there is nothing to adopt: whoever watches the machine finds it at work, or begins another.

use super::Supply;
use super::wires::{Wires, stays_until};
use crate::network::{EgressError, EgressOf, Lease, Terms};
use crate::retry::Backoff;
use crate::telemetry::chain;
use crate::vm::{VmError, VmId, VmName};
use dayfly_egress::audit::Destination;
use std::io;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// One that has lived so long is begun again as if it were the first: what its VM can bring about comes more often.
const STEADY: Duration = Duration::from_secs(60);

/// Before one that has died for the first time is begun again. Mostly its machine has ended with it.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Tries to begin the one of a new machine.
const TRIES: u32 = 3;

/// How long an audit may take to be read: a job's end waits for it.
const AUDIT_PATIENCE: Duration = Duration::from_millis(500);

impl Supply {
    fn egress_of(&self, vm: &VmId) -> EgressOf {
        EgressOf { socket_dir: self.0.setup.socket_dir.clone(), vm: vm.clone() }
    }

    /// What a machine has reached so far; `None`: it has a network card, or that could not be read within half a second.
    pub async fn audit(&self, vm: &VmId, lease: &Lease) -> Option<Vec<Destination>> {
        if *lease != Lease::Relay {
            return None;
        }
        let of = self.egress_of(vm);
        let read = timeout(AUDIT_PATIENCE, self.0.network.egress().audit(&of)).await;
        match read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut)).and_then(|read| read) {
            Ok(destinations) => Some(destinations),
            Err(error) => {
                tracing::warn!(%vm, error = chain(&error), "read what a job has reached; its log goes without");
                None
            }
        }
    }

    /// Begins the egress of a machine that has just been made: without one its job would reach nothing.
    ///
    /// # Errors
    /// After some tries.
    pub(super) async fn begin_egress(&self, vm: &VmId, terms: &Terms) -> Result<(), VmError> {
        let of = self.egress_of(vm);
        let mut backoff = Backoff::hypervisor();
        let mut tries = 0;
        loop {
            let error = match self.0.network.egress().ensure(&of, terms).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tries += 1;
            if tries == TRIES || matches!(error, EgressError::NoProgram) {
                return Err(VmError::refused("start the egress of VM", &VmName::from(vm.clone()), error));
            }
            tokio::time::sleep(backoff.next(&self.0.rng)).await;
        }
    }

    /// Ends the egress of a machine that is gone; none is fine.
    ///
    /// # Errors
    /// It cannot be ended.
    pub(super) async fn end_egress(&self, vm: &VmId) -> Result<(), VmError> {
        let ended = self.0.network.egress().end(&self.egress_of(vm)).await;
        ended.map_err(|error| VmError::refused("end the egress of VM", &VmName::from(vm.clone()), error))
    }
}

impl Wires {
    /// What who carries the egress is told, once the guest is bound; `None`: the machine has a network card, or nobody will
    /// bind it any more.
    pub(super) async fn terms(&self) -> Option<Terms> {
        let mut binding = self.binding.clone();
        binding.wait_for(Option::is_some).await.ok()?.as_ref()?.egress.clone()
    }

    /// Sees to it that a process carries the machine's egress, for as long as it is watched and its job goes on. For ever.
    pub(super) async fn keep_egress(self) {
        let mut stay = self.stay.clone();
        tokio::select! {
            biased;
            // What is dropped here has begun a process or has not; it is ended below.
            Some(_) = stays_until(&mut stay) => {}
            () = self.clone().carry_egress() => return,
        }
        let mut backoff = Backoff::hypervisor();
        while let Err(error) = self.supply.end_egress(&self.id).await {
            tracing::warn!(vm = %self.id, error = chain(&error), "end the egress of a machine that is kept; trying again");
            tokio::time::sleep(backoff.next(&self.supply.0.rng)).await;
        }
    }

    async fn carry_egress(self) {
        let Some(terms) = self.terms().await else { return };
        let of = self.supply.egress_of(&self.id);
        let egress = self.supply.0.network.egress();
        let metrics = self.supply.0.metrics.job();
        let (mut backoff, mut calm) = (Backoff::hypervisor(), true);
        // Whether one has died here, and whether the trouble since has been told.
        let (mut died, mut told) = (false, false);
        loop {
            let began = Instant::now();
            match egress.ensure(&of, &terms).await {
                Ok(()) => {
                    if std::mem::take(&mut died) {
                        metrics.egress_restarted.inc();
                        tracing::warn!(vm = %self.id, "the egress of a machine had ended; another carries it now");
                    }
                    told = false;
                    egress.gone(&of).await;
                    died = true;
                    if began.elapsed() >= STEADY {
                        (backoff, calm) = (Backoff::hypervisor(), true);
                    }
                }
                // It has ended with its machine, of which others tell.
                Err(error) if error.is_of_vm() => {
                    tracing::debug!(vm = %self.id, error = chain(&error), "look for the egress port of a machine");
                }
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::error!(vm = %self.id, error = chain(&error), "carry the egress of a machine; its job reaches nothing new; trying again");
                    }
                }
            }
            let pause = if std::mem::take(&mut calm) { FIRST_PAUSE } else { backoff.next(&self.supply.0.rng) };
            tokio::time::sleep(pause).await;
        }
    }
}
