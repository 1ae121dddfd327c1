//! 10: no request to GitLab is caused by a VM that has not shown its pass, or has ended.

use super::{Checker, Findings};
use crate::event::Event;
use crate::ledger::Ledger;
use dayfly_exec::standin::Route;
use std::time::Duration;

pub(crate) struct Upstream;

impl Checker for Upstream {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        let Event::Request(request) = event else { return };
        if !matches!(request.route, Route::UploadArtifacts | Route::DownloadArtifacts | Route::RuntimeEnvironmentKey) {
            return;
        }
        let Some(job) = request.job else { return };
        let Some(note) = ledger.jobs.get(&job) else { return };
        if note.forwarded > note.transfers {
            findings.add(10, format!("job {job}: more transfers reached GitLab than its guest has begun"));
        }
        let vm = note.handed.last().and_then(|(vm, _)| ledger.vms.get(vm));
        let right = vm.is_some_and(|vm| {
            let ended = vm.ended_at.as_ref().is_some_and(|(at, _)| *at + Duration::from_secs(2) < ledger.now);
            vm.greeted && !ended
        });
        if !right {
            findings.add(10, format!("a transfer of job {job} reached GitLab without a VM that may cause it"));
        }
    }

    fn end(&mut self, ledger: &Ledger, findings: &mut Findings) {
        for (id, note) in &ledger.jobs {
            // A cut upload must not be stored as a whole one.
            let strange = note.artifacts.iter().find(|size| !note.meant.iter().any(|meant| *meant as u64 == **size));
            if let Some(size) = strange {
                findings.add(10, format!("GitLab stored {size} bytes for job {id}, which nobody meant to upload"));
            }
        }
    }
}
