//! 14: never more VMs at once than configured, stuck ones counted.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::Ledger;
use crate::plan::Plan;

pub(crate) struct Concurrency {
    most: usize,
}

impl Concurrency {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { most: usize::try_from(plan.concurrent).unwrap_or(usize::MAX) }
    }
}

impl Checker for Concurrency {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Vm { word: "started", .. } = event else { return };
        // VMs of a damaged record are nobody's until the sweep finds them.
        let known = |vm: &&crate::ledger::VmNote| {
            // So is one whose making was under way when its job's task died.
            let lost = vm
                .job
                .and_then(|job| ledger.jobs.get(&job))
                .is_some_and(|note| note.lost.is_some() || note.panicked.is_some());
            vm.ours && vm.lives() && !lost
        };
        let now = ledger.vms.values().filter(known).count();
        if now > self.most {
            findings.add(14, format!("{now} VMs run at once, {} are configured", self.most));
        }
    }
}
