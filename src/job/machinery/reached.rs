//! What a job has reached outside of its machine: read once, when its verdict is known; for its log, the record, metrics.

use super::Machinery;
use crate::history::DESTINATIONS_MAX;
use crate::job::lines;
use dayfly_egress::audit::Destination;
use jiff::Timestamp;

impl Machinery {
    /// Reads what the job has reached, if its machine has no network card and that can be told within half a second. Once.
    pub(in crate::job) async fn look_at_reached(&mut self) {
        let Some(machine) = self.record.machine.clone().filter(|_| self.record.reached.is_empty()) else { return };
        let Some(mut reached) = self.parts.supply.audit(&machine.id, &machine.lease).await else { return };
        self.reached.clone_from(&reached);
        // What is refused, and what much went to, is what somebody will ask for.
        reached.sort_by_key(|to| std::cmp::Reverse((to.refused > 0, to.up.saturating_add(to.down))));
        (self.record.reached, _) = lines::told(reached, DESTINATIONS_MAX, |to| to.refused > 0);
    }

    /// The section of it, without what the log masks; empty: there is nothing to tell, or what to mask is not known any
    /// more.
    pub(in crate::job) fn reached_section(&self, now: Timestamp) -> String {
        self.masked(&lines::reached(now, self.record.trace_sections, &self.record.reached)).unwrap_or_default()
    }

    /// What is kept of it when the job has ended: without what the log masks; nothing, if what to mask is not known any more.
    pub(super) fn reached_kept(&self) -> Vec<Destination> {
        let kept = |to: &Destination| {
            let name = match &to.name {
                Some(name) => Some(self.masked(name)?),
                None => None,
            };
            Some(Destination { name, ..to.clone() })
        };
        self.record.reached.iter().filter_map(kept).collect()
    }

    /// Counts it, once.
    pub(in crate::job) fn count_reached(&mut self) {
        self.parts.metrics.egress().count(&self.record.class, &std::mem::take(&mut self.reached));
    }
}
