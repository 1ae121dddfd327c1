//! 3: no failure from us for a job whose guest's verdict was taken, or may have been by GitLab.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::Ledger;
use dayfly_exec::standin::Route;

pub(crate) struct SuccessStands;

impl Checker for SuccessStands {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Request(request) = event else { return };
        if request.route != Route::UpdateJob {
            return;
        }
        let Some(update) = request.update.filter(|update| update.state != "running") else { return };
        let Some(job) = request.job else { return };
        let Some((promised, at)) = ledger.jobs.get(&job).and_then(|note| note.verdict_taken.as_ref()) else { return };
        if update.state != *promised && ledger.jobs[&job].lost.is_none() {
            let at = at.as_secs_f64();
            findings.add(
                3,
                format!("job {job}: its guest's `{promised}` was taken at {at:.3} s, and `{}` is sent", update.state),
            );
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            let Some((promised, _)) = &note.verdict_taken else { continue };
            // A disk that refused its end for long lets it be begun once more, after GitLab has heard of that end.
            let ended_otherwise = note.users.is_some() || note.lost.is_some() || note.over_by_gitlab || note.begun_anew;
            if !ended_otherwise && note.state.as_str() != promised {
                findings
                    .add(3, format!("job {id}: its guest was promised `{promised}`, GitLab holds {:?}", note.state));
            }
        }
    }
}
