//! 2: the first verdict stands: never another one from us, no change after the end.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::Ledger;
use dayfly::gitlab::JobId;
use dayfly::job::state::State;
use dayfly_exec::standin::Route;
use std::collections::BTreeSet;

#[derive(Default)]
pub(crate) struct FirstWins {
    /// Jobs whose first verdict went to GitLab before a failing disk took it.
    unwritten: BTreeSet<JobId>,
}

impl Checker for FirstWins {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Request(request) = event else { return };
        if request.route != Route::UpdateJob || request.update.is_none_or(|update| update.state == "running") {
            return;
        }
        let Some(job) = request.job else { return };
        let Some(note) = ledger.jobs.get(&job) else { return };
        let written = note.record.as_ref().is_some_and(|record| matches!(record.state, State::Releasing { .. }));
        if note.sent.len() == 1 && !written {
            self.unwritten.insert(job);
        }
        let [.., (_, first, why), (_, last, why_last)] = note.sent.as_slice() else { return };
        // Who takes up a job whose task has panicked knows what is on disk.
        let unknown = note.panicked.is_some() && self.unwritten.contains(&job);
        if (first, why) != (last, why_last) && !note.begun_anew && !unknown {
            findings.add(2, format!("job {job}: `{last}` ({why_last:?}) was sent after `{first}` ({why:?})"));
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            if note.changed_after_end {
                findings.add(2, format!("job {id} changed its state at GitLab after its end"));
            }
            if note.verdicts == 1
                && note.users.is_none()
                && !note.begun_anew
                && let Some((_, state, _)) = note.sent.first()
                && note.state.as_str() != state
            {
                findings.add(2, format!("job {id}: `{state}` was sent, GitLab holds {:?}", note.state));
            }
        }
    }
}
