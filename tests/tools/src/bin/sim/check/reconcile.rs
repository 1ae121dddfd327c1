//! 17: a start, however often and however cut short, takes nothing from a job that goes on: no VM is destroyed whose
//! record says that its job boots or runs, and none is made for a guest that has its job.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::{Ledger, VmNote};
use dayfly::job::state::State;
use dayfly_doubles::fake::Op;

pub(crate) struct Reconcile;

impl Checker for Reconcile {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        if let Event::Vm { name, word: "started" } = event
            && let Some(vm) = ledger.vms.get(*name).filter(|vm| vm.ours && vm.job.is_some())
        {
            let same = |(other, note): &(&String, &VmNote)| *other != name && note.job == vm.job && note.lives();
            if let Some((other, _)) = ledger.vms.iter().find(same) {
                findings.add(17, format!("{name} is made for job {:?} beside {other}", vm.job));
            }
        }
        let Event::Calls { op, subject, .. } = event else { return };
        let of_vm = |(_, note): &(&dayfly::gitlab::JobId, &crate::ledger::JobNote)| {
            note.record
                .as_ref()
                .and_then(|record| record.machine.as_ref())
                .is_some_and(|m| subject.ends_with(m.id.as_str()))
        };
        let Some((job, note)) = ledger.jobs.iter().find(of_vm) else { return };
        let Some(record) = &note.record else { return };
        match (op, &record.state) {
            // A record that could not be written says what was before.
            _ if note.files_failed.is_some() => {}
            (Op::Destroy, State::Running { .. } | State::Booting { replaced: false } | State::Accepted) => {
                findings.add(
                    17,
                    format!("{subject} is destroyed while the record of job {job} says `{}`", record.state.word()),
                );
            }
            (Op::Start, State::Running { .. } | State::Releasing { .. }) => {
                findings
                    .add(17, format!("{subject} is made while the record of job {job} says `{}`", record.state.word()));
            }
            _ => {}
        }
    }
}
