//! 16: nothing of a VM exists without a durable record that names it; no record without an owner at the end.

use super::{Checker, Findings};
use crate::event::{Event, FileOp};
use crate::ledger::{Ledger, VmNote, job_of, vm_of_overlay};
use dayfly_doubles::fake::Op;

pub(crate) struct JournalFirst;

impl Checker for JournalFirst {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        if let Event::File { op: FileOp::Remove, path, ok: true, .. } = event
            && path.starts_with("/state")
            && let Some((job, "")) = job_of(path)
            && let Some(note) = ledger.jobs.get(&job)
        {
            let exists = |vm: &VmNote| vm.lives() || vm.overlay_at.is_some() && vm.overlay_gone_at.is_none();
            if let Some(name) = note.vms.iter().find(|name| ledger.vms.get(*name).is_some_and(exists)) {
                findings.add(16, format!("the record of job {job} is removed, and {name} is still there"));
            }
        }
        let Event::Calls { op, subject, .. } = event else { return };
        let name = match op {
            Op::Start => subject,
            Op::CreateOverlay => vm_of_overlay(subject).unwrap_or(subject),
            _ => return,
        };
        let names = |note: &crate::ledger::JobNote| {
            note.record
                .as_ref()
                .and_then(|record| record.machine.as_ref())
                .is_some_and(|m| name.ends_with(m.id.as_str()))
        };
        if !ledger.jobs.values().any(names) {
            findings.add(16, format!("{op:?} of {name}, which no record names"));
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            if note.record.is_some() {
                findings.add(16, format!("the record of job {id} is left"));
            }
        }
    }
}
