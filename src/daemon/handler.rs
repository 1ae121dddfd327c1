//! What the control socket may ask of a running daemon.

use super::wiring::View;
use super::{Jobs, Mode, Shutdown};
use crate::capacity::Capacity;
use crate::control::{ControlHandler, KillOutcome};
use crate::gitlab::JobId;
use crate::job::Parts;
use crate::metrics::Metrics;
use crate::status::{CapacityStatus, DaemonStatus, JobStatusReport, RunnerState, RunnerStatus, StatusReport};
use std::sync::{Mutex, PoisonError};

pub(super) struct Handler {
    jobs: Jobs,
    capacity: Capacity,
    /// Exchanged at a reload; held for a few lines.
    runners: Mutex<Vec<View>>,
    shutdown: Shutdown,
    metrics: Metrics,
    since: String,
}

impl Handler {
    pub(super) fn new(jobs: Jobs, capacity: Capacity, runners: Vec<View>, shutdown: Shutdown, parts: &Parts) -> Self {
        let since = parts.clock.now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        Self { jobs, capacity, runners: Mutex::new(runners), shutdown, metrics: parts.metrics.clone(), since }
    }
}

impl Handler {
    /// After a reload.
    pub(super) fn set_runners(&self, runners: Vec<View>) {
        *self.runners.lock().unwrap_or_else(PoisonError::into_inner) = runners;
    }
}

impl ControlHandler for Handler {
    fn status(&self) -> StatusReport {
        let promised = self.capacity.promised();
        let bounds = self.capacity.bounds();
        let runners = self.runners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let runners: Vec<RunnerStatus> = runners
            .iter()
            .map(|(runner, view)| {
                let view = view.borrow().clone();
                RunnerStatus {
                    name: runner.config.name.clone(),
                    url: runner.config.url.to_string(),
                    class: runner.class.name.clone(),
                    state: view.state,
                    answered_s: view.answered.map(|at| at.elapsed().as_secs()),
                    jobs: promised.by_runner.get(&runner.config.name).copied().unwrap_or(0),
                }
            })
            .collect();
        let problems = runners.iter().filter_map(|runner| match &runner.state {
            RunnerState::Refused { error } => Some(format!("runner `{}`: {error}", runner.name)),
            RunnerState::Blocked { reason } => Some(format!("runner `{}`: {reason}", runner.name)),
            _ => None,
        });
        let stuck = self.metrics.job().stuck_domains.get();
        let stuck = (stuck > 0)
            .then(|| format!("{stuck} VMs cannot be taken down, and hold their room until they go; see the log"));
        let waiting = self.metrics.job().waiting_for_gitlab.get();
        let waiting =
            (waiting > 0).then(|| format!("{waiting} jobs have a log or a verdict that GitLab does not take"));
        let problems = problems.chain(stuck).chain(waiting);
        let jobs = self.jobs.views().into_iter().map(|view| JobStatusReport {
            runner: view.key.runner.clone(),
            id: view.key.id,
            project: view.project.clone(),
            name: view.name.clone(),
            state: view.state.to_owned(),
            phase: view.phase.clone(),
            vm: view.vm.clone(),
            age_s: view.since.elapsed().as_secs(),
        });
        StatusReport {
            daemon: DaemonStatus {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                since: self.since.clone(),
                draining: matches!(*self.shutdown.mode().borrow(), Mode::Drain | Mode::End),
                problems: problems.collect(),
            },
            capacity: CapacityStatus {
                jobs: promised.jobs,
                jobs_max: bounds.jobs,
                cpus: promised.resources.cpus,
                cpus_max: (bounds.cpus != u32::MAX).then_some(bounds.cpus),
                memory_mib: promised.resources.memory_mib,
                memory_mib_max: bounds.memory_mib,
                disk_gib: promised.resources.disk_gib,
                disk_gib_max: bounds.disk_gib,
            },
            jobs: jobs.collect(),
            runners,
        }
    }

    fn drain(&self) {
        self.shutdown.drain();
    }

    fn kill(&self, job: JobId, runner: Option<&str>) -> KillOutcome {
        self.jobs.kill(job, runner)
    }
}
