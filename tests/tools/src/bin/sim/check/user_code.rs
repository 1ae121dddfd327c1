//! 11: user code runs only after the job was assigned and journalled, and not after cancel and grace.

use super::{Checker, Findings};
use crate::event::{Event, GuestDoes, Trouble};
use crate::ledger::Ledger;
use dayfly::job::state::State;
use std::time::Duration;

pub(crate) struct UserCode;

/// The longest that a canceled job's VM may live on, each with the 10 s of invariant 18.
const GRACE_CANCELING: Duration = Duration::from_secs(360 + 10);
const GRACE_OVER: Duration = Duration::from_secs(60 + 10);

impl Checker for UserCode {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Guest { job, does: GuestDoes::Payload { .. }, .. } => {
                let Some(note) = ledger.jobs.get(job) else { return };
                let journalled = note
                    .record
                    .as_ref()
                    .is_some_and(|record| !matches!(record.state, State::Accepted | State::Booting { .. }));
                // A record that was damaged on the way was there.
                if note.assigned_at.is_none() || !journalled && note.lost.is_none() {
                    findings.add(11, format!("job {job} was given to its guest before it was written down"));
                }
                let canceled = note.over_known.or(note.canceling_known);
                if canceled.is_some_and(|at| at < ledger.now) {
                    findings.add(11, format!("job {job} was given to its guest after the daemon knew that it is over"));
                }
            }
            Event::Vm { name, word: "destroyed" | "powered off" | "crashed" | "rebooted" } => {
                let Some(vm) = ledger.vms.get(*name) else { return };
                let Some(note) = vm.job.and_then(|job| ledger.jobs.get(&job)) else { return };
                let late = |known: Option<Duration>, grace: Duration| {
                    known
                        .filter(|at| *at + grace < ledger.now)
                        .filter(|at| ledger.calm(&[Trouble::Daemon, Trouble::Libvirt, Trouble::Disk], *at, ledger.now))
                };
                // Learnt while it was handed to it at the earliest.
                let since = |known: Option<Duration>| known.map(|at| at.max(vm.started_at.unwrap_or_default()));
                let over = late(since(note.over_known), GRACE_OVER);
                let canceling =
                    late(since(note.canceling_known), GRACE_CANCELING).filter(|_| note.over_known.is_none());
                if (over.is_some() || canceling.is_some()) && note.sent.is_empty() && note.verdict_taken.is_none() {
                    findings.add(11, format!("the VM of job {:?} outlived its cancel and the grace", vm.job));
                }
            }
            _ => {}
        }
    }
}
