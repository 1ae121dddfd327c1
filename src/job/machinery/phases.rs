//! How long does each phase of the job take? For the histogram; nothing follows from it.
//!
//! What began under a former daemon is not measured: nobody knows when it did.

use super::Machinery;
use crate::metrics::{Metrics, Phase};
use tokio::time::Instant;

/// The phases that are under way.
#[derive(Debug, Default)]
pub(super) struct Phases {
    /// Of the machine, one after the other.
    machine: Option<(Phase, Instant)>,
    /// The verdict is known, and not yet at GitLab.
    flush: Option<Instant>,
    /// The machine is being taken down.
    clean_up: Option<Instant>,
}

/// The one that follows among those of a machine.
fn next(phase: Phase) -> Option<Phase> {
    match phase {
        Phase::Overlay => Some(Phase::Create),
        Phase::Create => Some(Phase::Boot),
        Phase::Boot => Some(Phase::PickUp),
        Phase::PickUp => Some(Phase::Run),
        Phase::Run | Phase::Reserve | Phase::Flush | Phase::CleanUp => None,
    }
}

impl Phases {
    fn observe(metrics: &Metrics, phase: Phase, since: Instant) {
        metrics.job().phase(phase, since.elapsed());
    }

    /// The machine has come this far; the one before counts if it was the one before.
    fn begin(&mut self, metrics: &Metrics, phase: Phase) {
        match phase {
            Phase::Flush => self.flush = Some(Instant::now()),
            Phase::CleanUp => {
                self.clean_up.get_or_insert_with(Instant::now);
            }
            phase => {
                if let Some((before, since)) = self.machine.filter(|(before, _)| next(*before) == Some(phase)) {
                    Self::observe(metrics, before, since);
                }
                // A guest that a former daemon has started is half-way in a phase of which only the end is seen.
                let known = self.machine.is_some() || matches!(phase, Phase::Overlay | Phase::Run);
                self.machine = known.then(|| (phase, Instant::now()));
            }
        }
    }

    fn end(&mut self, metrics: &Metrics, phase: Phase) {
        let since = match phase {
            Phase::Flush => self.flush.take(),
            Phase::CleanUp => self.clean_up.take(),
            phase => self.machine.take().filter(|(under_way, _)| *under_way == phase).map(|(_, since)| since),
        };
        if let Some(since) = since {
            Self::observe(metrics, phase, since);
        }
    }
}

impl Machinery {
    /// This phase begins; the one of the machine before it has ended.
    pub(in crate::job) fn begin_phase(&mut self, phase: Phase) {
        self.phases.begin(&self.parts.metrics, phase);
    }

    /// This phase has ended, if it is the one that is under way.
    pub(in crate::job) fn end_phase(&mut self, phase: Phase) {
        self.phases.end(&self.parts.metrics, phase);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Form, Snapshot};
    use std::time::Duration;

    /// A job's time, phase by phase; what was not seen from its beginning is left out.
    #[tokio::test(start_paused = true)]
    async fn each_phase_is_measured_from_its_beginning() {
        let (metrics, mut phases) = (Metrics::new(), Phases::default());
        for phase in [Phase::Overlay, Phase::Create, Phase::Boot, Phase::PickUp, Phase::Run] {
            phases.begin(&metrics, phase);
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        phases.end(&metrics, Phase::Run);
        // Another machine, seen from its guest's start on.
        phases.begin(&metrics, Phase::Boot);
        phases.begin(&metrics, Phase::PickUp);
        phases.end(&metrics, Phase::Run);
        let text = metrics.text(&Snapshot::default(), Form::Open);
        for phase in ["overlay", "create", "boot", "pick-up", "run"] {
            let (sum, count) = (
                format!("dayfly_job_phase_seconds_sum{{phase=\"{phase}\"}} 2.0\n"),
                format!("dayfly_job_phase_seconds_count{{phase=\"{phase}\"}} 1\n"),
            );
            assert!(text.contains(&sum) && text.contains(&count), "{phase}: {text}");
        }
    }
}
