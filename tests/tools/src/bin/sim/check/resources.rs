//! 13: what exists belongs to a live job, or goes within the clean-up's time; nothing is left at the end. (What is left
//! at the end is counted by `run`, which asks the fakes.)

use super::{Checker, Findings};
use crate::event::{Event, Trouble};
use crate::ledger::Ledger;
use std::time::Duration;

pub(crate) struct Resources;

/// A sweep every minute, and the time to take down what it finds one after the other.
const LAG: Duration = Duration::from_secs(60 + 60 + 30);

impl Checker for Resources {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        // Asked at quiet moments, not at each byte.
        let Event::Called { op: dayfly_doubles::fake::Op::List, ok: true, .. } = event else { return };
        if !ledger.runs {
            return;
        }
        for (name, vm) in &ledger.vms {
            let exists = vm.lives() || vm.overlay_at.is_some() && vm.overlay_gone_at.is_none();
            let Some(note) = vm.job.and_then(|job| ledger.jobs.get(&job)) else { continue };
            let owned = note
                .record
                .as_ref()
                .and_then(|record| record.machine.as_ref())
                .is_some_and(|m| name.ends_with(m.id.as_str()));
            if !exists || owned {
                continue;
            }
            // Its record went, or names another VM, some time after this one came.
            let since = note.record_gone_at.or(vm.started_at).or(vm.overlay_at).unwrap_or_default();
            let late = since + LAG < ledger.now;
            if late
                && ledger.calm(
                    &[Trouble::Daemon, Trouble::Libvirt, Trouble::Disk],
                    ledger.now.saturating_sub(LAG),
                    ledger.now,
                )
            {
                findings.add(13, format!("{name} exists without an owner since {:.0} s", since.as_secs_f64()));
            }
        }
    }
}
