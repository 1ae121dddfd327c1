//! What the control socket and the status listener may ask of a running daemon.

use super::problems::{problems, too_old};
use super::shells::Shells;
use super::wiring::View;
use super::{Jobs, Mode, Shutdown};
use crate::BoxFuture;
use crate::cache::Caches;
use crate::capacity::Capacity;
use crate::clock::Clock;
use crate::config::{Config, Span};
use crate::control::{ControlHandler, KillOutcome, Opened, ShellWish};
use crate::gitlab::JobId;
use crate::history::{Consoles, End, History, Suggestion};
use crate::job::journal::JobKey;
use crate::job::{JobView, Parts};
use crate::metrics::{Form, ImageTime, Metrics, RunnerGauges, Snapshot, Usage};
use crate::shell::{Recordings, ShellOutcome};
use crate::status::{
    CapacityStatus, ConsoleFound, DaemonStatus, GoldenStatus, ImageStatus, JobDetail, JobFound, JobStatusReport,
    Reports, RunnerState, RunnerStatus, StatusReport,
};
use crate::supply::Supply;
use crate::supply::goldens::Golden;
use crate::vm::{VmId, VmName};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// Bytes of a GiB.
const GIB: u64 = 1 << 30;

pub(super) struct Handler {
    jobs: Jobs,
    capacity: Capacity,
    supply: Supply,
    history: History,
    caches: Option<Caches>,
    consoles: Consoles,
    /// Exchanged at a reload; held for a few lines.
    runners: Mutex<Vec<View>>,
    /// Why nothing serves the status; held for a few lines.
    not_served: Mutex<Option<String>>,
    /// An older image is a problem; likewise.
    image_max_age: Mutex<Option<Duration>>,
    shells: Shells,
    shutdown: Shutdown,
    metrics: Metrics,
    clock: Clock,
    since: Timestamp,
}

impl Handler {
    pub(super) fn new(
        jobs: Jobs,
        capacity: Capacity,
        runners: Vec<View>,
        shutdown: Shutdown,
        recordings: Recordings,
        parts: &Parts,
    ) -> Self {
        Self {
            jobs,
            capacity,
            supply: parts.supply.clone(),
            history: parts.history.clone(),
            caches: parts.caches.clone(),
            runners: Mutex::new(runners),
            not_served: Mutex::default(),
            image_max_age: Mutex::default(),
            consoles: parts.consoles.clone(),
            shells: Shells::new(recordings, parts),
            shutdown,
            metrics: parts.metrics.clone(),
            clock: parts.clock.clone(),
            since: parts.clock.now(),
        }
    }

    /// After a reload.
    pub(super) fn set_runners(&self, runners: Vec<View>) {
        *self.runners() = runners;
    }

    /// An image that is older is a problem.
    pub(super) fn set_image_max_age(&self, max_age: Option<Span>) {
        *self.image_max_age.lock().unwrap_or_else(PoisonError::into_inner) = max_age.map(Span::get);
    }

    /// Who may open shells, and for how long their recordings are kept.
    pub(super) fn set_shells(&self, config: &Config) {
        self.shells.set(config);
    }

    fn runners(&self) -> MutexGuard<'_, Vec<View>> {
        self.runners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn capacity(&self) -> CapacityStatus {
        let (promised, asking, bounds) = (self.capacity.promised(), self.capacity.asking(), self.capacity.bounds());
        CapacityStatus {
            jobs: promised.jobs.saturating_sub(asking.jobs),
            asking: asking.jobs,
            jobs_max: bounds.jobs,
            cpus: promised.resources.cpus.saturating_sub(asking.resources.cpus),
            cpus_max: (bounds.cpus != u32::MAX).then_some(bounds.cpus),
            memory_mib: promised.resources.memory_mib.saturating_sub(asking.resources.memory_mib),
            memory_mib_max: bounds.memory_mib,
            disk_gib: promised.resources.disk_gib.saturating_sub(asking.resources.disk_gib),
            disk_gib_max: bounds.disk_gib,
        }
    }

    fn runner(&self, view: &View, jobs: &BTreeMap<String, u32>) -> RunnerStatus {
        let View { runner, poller, needs, limit } = view;
        let name = &runner.config.name;
        let state = match poller.borrow().state.clone() {
            RunnerState::WaitingForRoom { missing } => {
                let missing = self.capacity.missing(name, *limit, *needs).unwrap_or(missing);
                RunnerState::WaitingForRoom { missing }
            }
            state => state,
        };
        RunnerStatus {
            name: name.clone(),
            url: runner.config.url.to_string(),
            class: runner.class.name.clone(),
            state,
            answered_s: runner.reach.answered().map(|at| at.elapsed().as_secs()),
            outage: runner.reach.outage().map(|outage| outage.to_string()),
            jobs: jobs.get(name).copied().unwrap_or(0),
        }
    }

    fn goldens(&self) -> Vec<GoldenStatus> {
        let now_s = self.clock.now().as_second();
        let of = |golden: Golden| GoldenStatus {
            image: golden.image.name,
            runner: golden.runner,
            bytes: golden.bytes,
            age_s: u64::try_from(now_s.saturating_sub(golden.made_s)).unwrap_or(0),
        };
        self.supply.goldens().list().into_iter().map(of).collect()
    }

    /// Jobs of each runner that hold room, less the polls.
    fn jobs_by_runner(&self) -> BTreeMap<String, u32> {
        let (mut jobs, asking) = (self.capacity.promised().by_runner, self.capacity.asking().by_runner);
        for (runner, count) in &mut jobs {
            *count = count.saturating_sub(asking.get(runner).copied().unwrap_or(0));
        }
        jobs
    }

    fn problems(&self, runners: &[View]) -> Vec<String> {
        let not_served = self.not_served.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut problems = problems(runners, &self.supply, &self.metrics, not_served);
        let max_age = *self.image_max_age.lock().unwrap_or_else(PoisonError::into_inner);
        problems.extend(max_age.into_iter().flat_map(|max_age| too_old(&self.ages(runners), max_age)));
        problems
    }

    /// How old the images are that jobs of these runners may get.
    fn ages(&self, runners: &[View]) -> BTreeMap<String, Duration> {
        let now = SystemTime::from(self.clock.now());
        let mut ages = BTreeMap::new();
        for view in runners {
            let poller = view.poller.borrow();
            let age = |(name, made): (&String, &SystemTime)| Some((name.clone(), now.duration_since(*made).ok()?));
            ages.extend(poller.images_made.iter().filter_map(age));
        }
        ages
    }

    fn draining(&self) -> bool {
        matches!(*self.shutdown.mode().borrow(), Mode::Drain | Mode::End)
    }

    fn snapshot(&self) -> Snapshot {
        let capacity = self.capacity();
        let runners = self.runners().clone();
        let usage = |promised, bound: Option<u64>, unit| Usage {
            promised: u64::saturating_mul(promised, unit),
            bound: bound.map(|bound| bound.saturating_mul(unit)),
        };
        let images = self.ages(&runners);
        Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            started_s: self.since.as_duration().as_secs_f64(),
            draining: self.draining(),
            problems: self.problems(&runners).len(),
            jobs: usage(capacity.jobs.into(), Some(capacity.jobs_max.into()), 1),
            cpus: usage(capacity.cpus.into(), capacity.cpus_max.map(u64::from), 1),
            memory_bytes: usage(capacity.memory_mib, Some(capacity.memory_mib_max), MIB),
            disk_bytes: usage(capacity.disk_gib, Some(capacity.disk_gib_max), GIB),
            runners: runners.iter().map(gauges).collect(),
            jobs_by_state: self.jobs.views().into_iter().map(|view| (view.key.runner, view.state)).collect(),
            machines: self.supply.states(),
            cache: self.caches.as_ref().map(Caches::usage),
            images: images.into_iter().map(|(name, age)| ImageTime { name, age_s: age.as_secs_f64() }).collect(),
        }
    }
}

fn gauges(view: &View) -> RunnerGauges {
    let reach = &view.runner.reach;
    RunnerGauges {
        name: view.runner.config.name.clone(),
        blocked: view.poller.borrow().blocked,
        answered_s: reach.answered().map(|at| at.elapsed().as_secs_f64()),
        unanswered_s: reach.outage().map_or(Duration::ZERO, |outage| outage.lasts).as_secs_f64(),
    }
}

/// The hypervisor's name of a VM: what an operator can give to `virsh`.
fn vm_name(id: &str) -> String {
    id.parse::<VmId>().map_or_else(|_| id.to_owned(), |id| VmName::from(id).to_string())
}

impl Reports for Handler {
    fn status(&self) -> StatusReport {
        let views = self.runners().clone();
        let by_runner = self.jobs_by_runner();
        let runners = views.iter().map(|view| self.runner(view, &by_runner)).collect();
        let jobs = self.jobs.views().into_iter().map(|view| report(&view));
        StatusReport {
            daemon: DaemonStatus {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                since: self.since.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                draining: self.draining(),
                problems: self.problems(&views),
            },
            capacity: self.capacity(),
            jobs: jobs.collect(),
            goldens: self.goldens(),
            images: self
                .ages(&views)
                .into_iter()
                .map(|(name, age)| ImageStatus { name, age_s: age.as_secs() })
                .collect(),
            runners,
        }
    }

    fn metrics(&self, form: Form) -> String {
        self.metrics.text(&self.snapshot(), form)
    }

    fn ended(&self, jobs_max: usize) -> Vec<End> {
        self.history.newest(jobs_max)
    }

    fn job<'a>(&'a self, id: JobId, runner: Option<&'a str>) -> BoxFuture<'a, JobFound> {
        Box::pin(async move {
            let runner = match self.runner_of(id, runner) {
                Ok(Some(runner)) => runner,
                Ok(None) => return JobFound::Unknown,
                Err(runners) => return JobFound::Ambiguous { runners },
            };
            let key = JobKey { runner, id };
            match self.jobs.look(&key) {
                Some((view, _)) => JobFound::Running { job: Box::new(detail(view)) },
                None => match self.history.find(id, &key.runner).await {
                    Some(end) => JobFound::Ended { end: Box::new(end) },
                    None => JobFound::Unknown,
                },
            }
        })
    }

    fn console<'a>(&'a self, id: JobId, runner: Option<&'a str>, from: Option<u64>) -> BoxFuture<'a, ConsoleFound> {
        Box::pin(async move {
            let runner = match self.runner_of(id, runner) {
                Ok(Some(runner)) => runner,
                Ok(None) => return ConsoleFound::Unknown,
                Err(runners) => return ConsoleFound::Ambiguous { runners },
            };
            let key = JobKey { runner, id };
            match self.jobs.look(&key) {
                Some((_, console)) => {
                    console.rows_from(from).map_or(ConsoleFound::Dark, |rows| ConsoleFound::Running { rows })
                }
                None => match self.history.find(id, &key.runner).await {
                    Some(end) => ConsoleFound::Ended { text: end.console, rows: end.console_rows },
                    None => ConsoleFound::Unknown,
                },
            }
        })
    }

    fn console_log<'a>(&'a self, id: JobId, runner: Option<&'a str>) -> BoxFuture<'a, ConsoleFound> {
        Box::pin(self.kept_console(id, runner))
    }
}

impl Handler {
    /// What is kept of a job's console, or why there is none.
    async fn kept_console(&self, id: JobId, runner: Option<&str>) -> ConsoleFound {
        match self.runner_of(id, runner) {
            Ok(Some(runner)) => match self.consoles.find(&JobKey { runner, id }.directory()).await {
                Some(text) => ConsoleFound::Ended { rows: text.matches('\n').count() as u64, text: Some(text) },
                None => ConsoleFound::Ended { text: None, rows: 0 },
            },
            Ok(None) => ConsoleFound::Unknown,
            Err(runners) => ConsoleFound::Ambiguous { runners },
        }
    }

    /// The runner entry that has, or had, a job of this id, or is named; several: which.
    fn runner_of(&self, id: JobId, named: Option<&str>) -> Result<Option<String>, Vec<String>> {
        let mut runners = self.jobs.runners(id);
        runners.extend(self.history.runners(id));
        if let Some(named) = named {
            return Ok(runners.take(named));
        }
        if runners.len() > 1 { Err(runners.into_iter().collect()) } else { Ok(runners.pop_first()) }
    }
}

fn report(view: &JobView) -> JobStatusReport {
    JobStatusReport {
        runner: view.key.runner.clone(),
        id: view.key.id,
        project: view.project.clone(),
        name: view.name.clone(),
        state: view.state.to_owned(),
        phase: view.phase.clone(),
        vm: view.vm.as_deref().map(vm_name),
        age_s: (view.age_before + view.since.elapsed()).as_secs(),
    }
}

fn detail(view: JobView) -> JobDetail {
    let (job, gitlab) = (report(&view), view.gitlab.word().to_owned());
    JobDetail { job, class: view.class, machine: view.machine, steps: view.steps, gitlab }
}

impl ControlHandler for Handler {
    fn drain(&self) -> Vec<JobId> {
        let kept = self.jobs.views().into_iter().filter(|view| view.state == "kept");
        let kept: Vec<JobId> = kept.map(|view| view.key.id).collect();
        self.shutdown.drain();
        kept
    }

    fn shell<'a>(&'a self, wish: ShellWish<'a>) -> BoxFuture<'a, Opened> {
        Box::pin(async move {
            let mut runners = self.jobs.runners(wish.job);
            runners.retain(|runner| wish.runner.is_none_or(|wished| wished == runner));
            let runner = match (runners.pop_first(), runners.is_empty()) {
                (None, _) => return Opened::No(ShellOutcome::Unknown),
                (Some(runner), true) => runner,
                (Some(first), false) => {
                    let runners = std::iter::once(first).chain(runners).collect();
                    return Opened::No(ShellOutcome::Ambiguous { runners });
                }
            };
            let key = JobKey { runner, id: wish.job };
            match self.jobs.look(&key) {
                Some((view, _)) => self.shells.open(wish, &view).await,
                None => Opened::No(ShellOutcome::Unknown),
            }
        })
    }

    fn kill(&self, job: JobId, runner: Option<&str>, reason: Option<String>) -> KillOutcome {
        self.jobs.kill(job, runner, reason)
    }

    fn caches(&self) -> Option<Caches> {
        self.caches.clone()
    }

    fn suggest<'a>(&'a self, class: &'a str, days: u32) -> BoxFuture<'a, Suggestion> {
        Box::pin(self.history.suggest(class, days))
    }

    fn status_is_not_served(&self, why: Option<String>) {
        *self.not_served.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}
