//! 12: each VM serves one job; no overlay, name or pass is used twice, no door by two VMs; base images are not written.

use super::{Checker, Findings};
use crate::event::{Event, FileOp, GuestDoes};
use crate::ledger::{Ledger, VmNote};
use dayfly::gitlab::JobId;
use dayfly_doubles::fake::Op;
use std::collections::BTreeMap;

#[derive(Default)]
pub(crate) struct OneJobPerVm {
    jobs: BTreeMap<String, JobId>,
    started: BTreeMap<String, u32>,
    passes: BTreeMap<String, String>,
}

impl Checker for OneJobPerVm {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Guest { vm, job, does: GuestDoes::Payload { .. } } => {
                let first = *self.jobs.entry((*vm).to_owned()).or_insert(*job);
                findings.unless(first == *job, 12, || format!("{vm} was given a second job"));
            }
            Event::Guest { vm, does: GuestDoes::Configured { pass }, .. } => {
                let first = self.passes.entry((*pass).to_owned()).or_insert_with(|| (*vm).to_owned());
                findings.unless(first == *vm, 12, || format!("{vm} has a pass that another VM had"));
            }
            Event::Vm { name, word: "started" } => {
                let Some(vm) = ledger.vms.get(*name).filter(|vm| vm.ours) else { return };
                // A daemon that finds its booting VM gone may make it again, on a new overlay: it cannot know whether
                // it ever was there.
                let last = self.started.insert((*name).to_owned(), ledger.lives);
                let handed = vm.job.and_then(|job| ledger.jobs.get(&job)).is_some_and(|note| !note.handed.is_empty());
                let anew = vm.overlay_at > vm.ended_at.as_ref().map(|(at, _)| *at);
                if last.is_some_and(|life| life == ledger.lives || handed || !anew) {
                    findings.add(12, format!("{name} was started a second time"));
                }
                let port = vm.port;
                let lost =
                    |vm: &VmNote| vm.job.and_then(|job| ledger.jobs.get(&job)).is_some_and(|note| note.lost.is_some());
                // Nobody listens any more for the VM of a record that was damaged.
                let others =
                    ledger.vms.iter().filter(|(other, vm)| *other != name && vm.lives() && vm.ours && !lost(vm));
                if port != 0 && !ledger.stale_records && others.clone().any(|(_, vm)| vm.port == port) {
                    findings.add(12, format!("{name} shares door {port} with another VM"));
                }
            }
            Event::Calls { op: Op::CreateOverlay, subject, .. } => {
                let path = std::path::Path::new(subject);
                if !path.starts_with("/state/overlays") {
                    findings.add(12, format!("an overlay is made at {subject}"));
                }
            }
            Event::File { op, path, .. } => {
                let writes =
                    !matches!(op, FileOp::Read | FileOp::ReadAt | FileOp::Length | FileOp::List | FileOp::FreeBytes);
                if writes && path.starts_with("/images") {
                    findings.add(12, format!("the base images are written to: {}", path.display()));
                }
            }
            _ => {}
        }
    }
}
