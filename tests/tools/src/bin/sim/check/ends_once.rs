//! 1: every assigned job reaches one terminal state; GitLab gives up none that we knew of.

use super::{Checker, Findings};
use crate::event::{Event, Trouble};
use crate::ledger::Ledger;
use dayfly_exec::standin::JobState;
use std::time::Duration;

const ALL: &[Trouble] = &[Trouble::Gitlab, Trouble::Daemon, Trouble::Libvirt, Trouble::Disk];

/// What GitLab adds to a job's timeout before it ends the job itself.
const QUARTER_HOUR: Duration = Duration::from_secs(900);

pub(crate) struct EndsOnce;

impl Checker for EndsOnce {
    fn on(&mut self, _: &Event<'_>, _: &Ledger, _: &mut Findings) {}

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            if note.assigned_at.is_none() && note.lost.is_none() {
                // Canceled in the queue, or with its project.
                if (note.users.is_some() || note.script.doomed_project) && note.state.is_over() {
                    continue;
                }
                findings.add(19, format!("job {id} was never assigned; GitLab holds it {:?}", note.state));
                continue;
            }
            if !note.state.is_over() {
                findings.add(1, format!("job {id} is still {:?} at GitLab", note.state));
                continue;
            }
            let given_up = note.gitlab_gave_up.as_deref();
            // An erased job has no runner that could end it; a GitLab that stores a trace for so long that the job's
            // token ends meanwhile has heard the verdict.
            let theirs = note.erased || note.users.is_some_and(|(what, _)| what == "deleted");
            let expired = given_up == Some("job_token_expired");
            let end = note.assigned_at.unwrap_or_default() + Duration::from_secs(note.script.timeout_s);
            let unheard = !ledger.calm(ALL, end, end + Duration::from_secs(320));
            // An outage may outlast even the quarter of an hour that GitLab adds to a timeout, but for the pause
            // before the next try; or begin while it stores the trace of a verdict that it has noted.
            let over = end + QUARTER_HOUR;
            let (begin, last) = (end + Duration::from_secs(120), over.saturating_sub(Duration::from_secs(70)));
            let outage = ledger.down_through(Trouble::Gitlab, begin, last);
            let noted = note.noted && !ledger.calm(ALL, over.saturating_sub(Duration::from_secs(300)), over);
            let cut_off = given_up == Some("server_timeout_running") && (outage || noted);
            let heard = expired && (note.noted || unheard) || cut_off;
            if let Some(reason) = given_up.filter(|_| note.lost.is_none() && !theirs && !heard) {
                findings.add(1, format!("job {id} was assigned, and GitLab gave it up: {reason}"));
            }
            // Taken by GitLab at most once; by users' cancels not at all.
            if note.verdicts > 1 {
                findings.add(1, format!("GitLab took {} verdicts for job {id}", note.verdicts));
            }
            if note.state == JobState::Canceled && note.users.is_none() && given_up.is_none() {
                findings.add(1, format!("job {id} is canceled, and nobody canceled it"));
            }
        }
    }
}
