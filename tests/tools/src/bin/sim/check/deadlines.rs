//! 18: deadlines hold: nothing a second early, nothing more than ten late.

use super::{Checker, Findings};
use crate::event::{DaemonDoes, Event, Trouble};
use crate::ledger::{At, JobNote, Ledger, VmNote};
use crate::plan::Plan;
use dayfly::gitlab::JobId;
use std::time::Duration;

const LATE: Duration = Duration::from_secs(10);
/// Clean-up after the end of a job.
const CLEAN: Duration = Duration::from_secs(30);
const HOST: &[Trouble] = &[Trouble::Daemon, Trouble::Libvirt, Trouble::Disk];
const ALL: &[Trouble] = &[Trouble::Daemon, Trouble::Libvirt, Trouble::Disk, Trouble::Gitlab];

pub(crate) struct Deadlines {
    boot: Duration,
    silence: Duration,
    /// The machine of a job that failed is kept for so long.
    keep: Duration,
    leaves_at: Option<(At, Duration)>,
}

impl Deadlines {
    pub(crate) fn new(plan: &Plan) -> Self {
        let (boot, silence) = (Duration::from_secs(plan.limits.boot_s), Duration::from_secs(plan.limits.silence_s));
        Self { boot, silence, keep: Duration::from_secs(plan.keep_s.unwrap_or_default()), leaves_at: None }
    }

    /// When this job must have a verdict of ours at the latest, and why.
    fn due(&self, note: &JobNote) -> Option<(At, &'static str)> {
        let assigned = note.assigned_at?;
        let mut due = vec![(assigned + Duration::from_secs(note.script.timeout_s + 120), "its timeout and grace")];
        if note.handed.is_empty() {
            due.push((assigned + self.boot, "the boot deadline"));
        } else {
            let signs = [note.guest_spoke_at, note.guest_called_at, note.handed.last().map(|(_, at)| *at)];
            let spoke = signs.into_iter().flatten().max().unwrap_or_default();
            // An upload or an attack may go on for minutes; only what is silent by plan is.
            due.push((spoke + self.silence, "the silence deadline"));
        }
        if let Some(at) = note.lost_running {
            due.push((at + Duration::from_secs(2), "its VM's end"));
        }
        if let Some(at) = note.killed_at {
            due.push((at, "the operator's word"));
        }
        due.into_iter().min_by_key(|(at, _)| *at)
    }
}

impl Checker for Deadlines {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Daemon(DaemonDoes::HandsOver) => self.leaves_at = Some((ledger.now, Duration::from_secs(5))),
            Event::Daemon(DaemonDoes::Ends) => self.leaves_at = Some((ledger.now, Duration::from_secs(36))),
            Event::Daemon(DaemonDoes::Gone) => {
                if let Some((since, limit)) = self.leaves_at.take()
                    && ledger.now > since + limit
                {
                    findings.add(18, format!("the daemon took {:.1} s to leave", (ledger.now - since).as_secs_f64()));
                }
            }
            Event::Daemon(DaemonDoes::Dies) => self.leaves_at = None,
            // The list is asked every two seconds while there is a VM: a clock for what does not happen.
            Event::Called { op: dayfly_doubles::fake::Op::List, .. } if ledger.runs && !ledger.stopping => {
                for (job, note) in &ledger.jobs {
                    self.look(*job, note, ledger, findings);
                }
            }
            _ => {}
        }
    }
}

impl Deadlines {
    fn look(&self, job: JobId, note: &JobNote, ledger: &Ledger, findings: &mut Findings) {
        let now = ledger.now;
        if note.lost.is_some() || note.assigned_at.is_none() {
            return;
        }
        let open =
            note.over_at.is_none() && note.over_known.is_none() && note.verdict_taken.is_none() && note.sent.is_empty();
        if open
            && let Some((due, why)) = self.due(note)
            && now > due + LATE + Duration::from_secs(2)
            && ledger.calm(ALL, note.assigned_at.unwrap_or_default(), now)
        {
            findings.add(18, format!("job {job} has no verdict more than 10 s after {why}"));
        }
        // The VM goes within the clean-up's time after the end that the daemon knows, the grace included.
        let known = [
            note.verdict_taken.as_ref().map(|(_, at)| *at + Duration::from_secs(5)),
            note.sent.first().map(|(at, _, _)| *at),
            note.over_known.map(|at| at + Duration::from_secs(60)),
        ];
        let Some(end) = known.into_iter().flatten().min() else { return };
        // One that is kept, for its time at most.
        let kept = note.kept_since.map(|since| note.kept_over.unwrap_or(since + self.keep).min(since + self.keep));
        let end = kept.map_or(end, |kept| kept.max(end));
        let lives = |vm: &VmNote| vm.lives() || vm.overlay_at.is_some() && vm.overlay_gone_at.is_none();
        let living = note.vms.iter().find(|name| ledger.vms.get(*name).is_some_and(lives));
        if let Some(name) = living
            && now > end + CLEAN
            && ledger.calm(HOST, end.saturating_sub(Duration::from_secs(70)), now)
        {
            findings.add(18, format!("{name} of job {job} is there more than 30 s after its end"));
        }
    }
}
