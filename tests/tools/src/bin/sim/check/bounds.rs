//! 21: what a job may grow is bounded: its spool.

use super::{Checker, Findings};
use crate::event::{Event, FileOp};
use crate::ledger::{Ledger, job_of};
use crate::plan::Plan;
use dayfly::gitlab::JobId;
use std::collections::BTreeMap;

/// Room for the notice and our own lines.
const OWN: u64 = 128 * 1024;

pub(crate) struct Bounds {
    spool: u64,
    spools: BTreeMap<JobId, u64>,
}

impl Bounds {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { spool: plan.limits.spool_mib << 20, spools: BTreeMap::new() }
    }
}

impl Checker for Bounds {
    fn on(&mut self, event: &Event<'_>, _: &Ledger, findings: &mut Findings) {
        let Event::File { op: FileOp::WriteAt, path, bytes, ok: true } = event else { return };
        let Some((job, "trace")) = job_of(path) else { return };
        let size = self.spools.entry(job).or_default();
        *size += bytes.len() as u64;
        if *size > self.spool + OWN {
            findings.add(21, format!("the spool of job {job} has {size} bytes, {} are its bound", self.spool));
        }
    }
}
