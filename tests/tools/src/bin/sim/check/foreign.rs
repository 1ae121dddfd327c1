//! 15: VMs and files of somebody else are not touched.

use super::{Checker, Findings};
use crate::event::{Event, FileOp};
use crate::ledger::Ledger;
use dayfly_doubles::fake::Op;

pub(crate) struct Foreign;

impl Checker for Foreign {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Calls { op: Op::Destroy | Op::Start, subject, .. } if ledger.foreign.contains(*subject) => {
                findings.add(15, format!("{subject} of another installation is touched"));
            }
            Event::Calls { op: Op::RemoveOverlay | Op::CreateOverlay, subject, .. }
                if ledger.foreign.contains(*subject) =>
            {
                findings.add(15, format!("{subject}, which is not ours, is touched"));
            }
            Event::Vm { name, word }
                if ledger.foreign.contains(*name)
                    && !matches!(*word, "started" | "booted" | "gone with the host" | "overlay made") =>
            {
                findings.add(15, format!("{name} of another installation: {word}"));
            }
            Event::File { op: FileOp::Remove | FileOp::Replace | FileOp::WriteAt | FileOp::Rename, path, .. }
                if ledger.foreign.contains(path.to_str().unwrap_or_default()) =>
            {
                findings.add(15, format!("{}, which is not ours, is touched", path.display()));
            }
            _ => {}
        }
    }
}
