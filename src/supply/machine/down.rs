//! How one VM is taken down, with all that lies beside it.

use super::{Desired, Driver, MachineEvent};
use crate::failpoint::{Point, reached};
use crate::retry::Backoff;
use crate::supply::Supply;
use crate::telemetry::chain;
use crate::vm::VmError;
use prometheus_client::metrics::gauge::Gauge;

impl Driver {
    /// Takes down all there may be, in the order in which nothing can be left over. For ever: a
    /// stuck VM keeps its reservation, and nobody else's.
    pub(super) async fn take_down(&mut self) {
        let host = self.supply.host().clone();
        let overlay = self.supply.overlay(&self.id);
        let mut backoff = Backoff::hypervisor();
        let mut desired = self.desired.clone();
        let mut stuck = None;
        loop {
            let attempt = async {
                // What is not listed is gone, or is not ours to destroy.
                if self.is_ours().await? {
                    host.hypervisor.destroy(&self.name).await?;
                }
                reached(Point::K16);
                self.supply.end_egress(&self.id).await?;
                self.remove_sockets().await?;
                // Last: with its record lost, a machine that is half taken down is known by its overlay.
                host.disks.remove(&overlay).await?;
                reached(Point::K17);
                Ok::<_, VmError>(())
            };
            let result = tokio::select! {
                biased;
                // A call that hangs must not hold a hand-over up: what is dropped here may take effect
                // or not, and the next daemon looks. A dropped handle disables the first branch.
                Ok(_) = desired.wait_for(|desired| *desired == Desired::Left) => return,
                result = attempt => result,
            };
            match result {
                Ok(()) => break,
                Err(error) => {
                    let error = chain(&error);
                    if stuck.is_none() {
                        tracing::warn!(vm = %self.id, error, "could not take a VM down; trying again");
                    } else {
                        tracing::debug!(vm = %self.id, error, "could not take a VM down; trying again");
                    }
                    stuck.get_or_insert_with(|| Stuck::count(&self.supply));
                    let pause = backoff.next(&self.supply.0.rng);
                    tokio::select! {
                        biased;
                        // Both cancel safe. A dropped handle disables the first branch: go on trying.
                        Ok(_) = desired.wait_for(|desired| *desired == Desired::Left) => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
        if stuck.is_some() {
            tracing::info!(vm = %self.id, "the VM is taken down after all");
        }
        self.tell(MachineEvent::Gone).await;
    }
}

/// A VM that could not be taken down, counted as long as that is so.
struct Stuck(Gauge);

impl Stuck {
    fn count(supply: &Supply) -> Self {
        let gauge = supply.0.metrics.job().machines_stuck.clone();
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.0.dec();
    }
}
