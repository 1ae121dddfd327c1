//! 19: after an outage the first poll comes within 15 s; a pending job is begun if there is room (at the end: all were).

use super::{Checker, Findings};
use crate::event::{DaemonDoes, Event, Trouble};
use crate::ledger::{At, Ledger};
use dayfly_exec::standin::Route;
use std::time::Duration;

#[derive(Default)]
pub(crate) struct Liveness {
    /// GitLab is back since then, and nobody has polled yet.
    back: Option<At>,
}

/// From threats.md B9.
const FIRST_POLL: Duration = Duration::from_secs(15);

impl Checker for Liveness {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Daemon(DaemonDoes::Trouble(Trouble::Gitlab, down)) => {
                self.back = (!down && ledger.runs && !ledger.stopping && ledger.has_room).then_some(ledger.now);
            }
            Event::Daemon(_) => self.back = None,
            Event::Request(request) if matches!(request.route, Route::RequestJob | Route::VerifyRunner) => {
                self.back = None;
            }
            _ => {}
        }
        if let Some(back) = self.back
            && ledger.now > back + FIRST_POLL
        {
            self.back = None;
            let others = [Trouble::Daemon, Trouble::Libvirt, Trouble::Disk, Trouble::Image];
            if ledger.has_room
                && ledger.calm(&others, back.saturating_sub(Duration::from_secs(60)), ledger.now)
                && !ledger.refused_lately()
            {
                findings.add(19, "no poll came within 15 s after GitLab was back".to_owned());
            }
        }
    }
}
