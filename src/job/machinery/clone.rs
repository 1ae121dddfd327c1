//! What the job's machine has of its repository: begun with the machine, closed with the hand-out, gone with the machine.

use super::Machinery;
use crate::clones::{Access, JobClone, Repository, Told};
use crate::job::lines;
use crate::supply::Claim;

impl Machinery {
    /// Begins to fetch for a new machine, whose disks the claim names from then on. Nothing of that is made yet.
    pub(super) fn begin_clone(&mut self, machine: &mut Claim, image_can: bool) {
        self.clone = self.new_clone(machine, image_can);
        machine.clone = self.attached();
    }

    fn new_clone(&self, machine: &Claim, image_can: bool) -> Option<JobClone> {
        let clones = self.parts.clones.as_ref().filter(|_| image_can)?;
        let payload = self.payload.as_ref().filter(|payload| !payload.asked.no_clone)?;
        let repository = Repository::of(&self.record.gitlab, &payload.source)?;
        let entry = &self.runner.config;
        let access = Access {
            token: payload.token.clone(),
            ca_file: entry.tls_ca_file.clone(),
            client: entry.tls_cert_file.clone().zip(entry.tls_key_file.clone()),
        };
        Some(clones.begin(repository, access, &machine.id))
    }

    /// Makes what it needs on the disk, once the record names it.
    pub(super) async fn prepare_clone(&mut self, machine: &mut Claim) {
        if let Some(clone) = &mut self.clone {
            clone.prepare().await;
            machine.clone = self.attached();
        }
    }

    /// Takes up what a machine of the record has, which may not have been started.
    pub(super) async fn adopt_clone(&mut self, machine: &mut Claim) {
        let Some(attached) = machine.clone.take() else { return };
        let Some(clones) = self.parts.clones.clone() else { return };
        let mut clone = clones.adopt(&machine.id, &attached).await;
        clone.prepare().await;
        self.clone = Some(clone);
        machine.clone = self.attached();
    }

    fn attached(&self) -> Option<crate::clones::Attached> {
        self.clone.as_ref().map(|clone| clone.attached().clone()).filter(|attached| !attached.is_empty())
    }

    /// Its machine has been started.
    pub(in crate::job) fn clone_is_up(&self) {
        if let Some(clone) = &self.clone {
            clone.machine_is_up();
        }
    }

    /// The job is handed out: nothing more comes to its machine, and its author is told what did.
    pub(super) async fn close_clone(&mut self) {
        let Some(clone) = &mut self.clone else { return };
        let told: Told = clone.close().await;
        let Some(text) = lines::clone(&told) else { return };
        tracing::info!(here = told.here, fetched = told.fetched.map(|(bytes, _)| bytes), "{text}");
        self.own_line(|now| lines::note(now, &format!("  {text}"))).await;
    }

    /// The machine is gone.
    pub(super) async fn release_clone(&mut self) {
        if let Some(clone) = self.clone.take() {
            return clone.release().await;
        }
        // One of a former daemon that was on its way out already.
        let slot = |machine: &&Claim| machine.clone.as_ref().is_some_and(|attached| attached.slot.is_some());
        let machine = self.record.machine.as_ref().filter(slot);
        if let (Some(machine), Some(clones)) = (machine, &self.parts.clones) {
            clones.release(&machine.id).await;
        }
    }
}
