//! How the daemon stands at one moment, as gauges: made anew for each text, so that what is gone leaves no value behind.

use super::Labels;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

/// Why a poller does not ask GitLab, in the words of the label `reason` of `dayfly_polls_blocked`.
pub const BLOCKED_BY: [&str; 9] =
    ["room", "image", "too-large", "disk", "journal", "hypervisor", "machines-lost", "refused", "gitlab"];

/// What is counted or measured only when somebody asks.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Version of the daemon.
    pub version: &'static str,
    /// When the process began, seconds since 1970.
    pub started_s: f64,
    /// It takes no more jobs.
    pub draining: bool,
    /// Sentences of the status that need a person.
    pub problems: usize,
    /// Jobs that hold room.
    pub jobs: Usage,
    /// Virtual CPUs.
    pub cpus: Usage,
    /// Memory, bytes.
    pub memory_bytes: Usage,
    /// Virtual disk, bytes.
    pub disk_bytes: Usage,
    /// The runner entries.
    pub runners: Vec<RunnerGauges>,
    /// Jobs under way by runner and state.
    pub jobs_by_state: Vec<(String, &'static str)>,
    /// VMs of jobs by state: `starting`, `running`, `paused`, `ended`.
    pub machines: Vec<(&'static str, u64)>,
    /// Bytes of caches that are kept, saves under way included; `None`: none are to be.
    pub cache: Option<(u64, u64)>,
    /// The images of the runners' classes.
    pub images: Vec<ImageTime>,
}

/// How much is promised of what there is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Promised to jobs.
    pub promised: u64,
    /// What may be promised; `None`: nothing bounds it.
    pub bound: Option<u64>,
}

/// One runner entry.
#[derive(Clone, Debug, Default)]
pub struct RunnerGauges {
    /// Its name.
    pub name: String,
    /// Why it does not ask for jobs, one of [`BLOCKED_BY`]; `None`: it does.
    pub blocked: Option<&'static str>,
    /// Seconds since its GitLab last answered any call; `None`: it has not yet.
    pub answered_s: Option<f64>,
    /// For how long its GitLab has not answered as GitLab does; 0: it does.
    pub unanswered_s: f64,
}

/// When an image was made.
#[derive(Clone, Debug, Default)]
pub struct ImageTime {
    /// Its name.
    pub name: String,
    /// Its age, seconds.
    pub age_s: f64,
}

type Float = Gauge<f64, AtomicU64>;

impl Snapshot {
    /// The gauges of this moment.
    pub(super) fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("dayfly");
        let build = Info::new(vec![("version", self.version.to_owned()), ("arch", std::env::consts::ARCH.to_owned())]);
        registry.register("build", "What runs here", build);
        float(&mut registry, "start_time_seconds", "When this process began, since 1970", self.started_s);
        whole(&mut registry, "draining", "1: no more jobs are taken", u64::from(self.draining));
        whole(&mut registry, "problems", "Problems that `dayfly status` names", self.problems as u64);
        for (name, unit, what, usage) in [
            ("jobs", "", "Jobs", self.jobs),
            ("cpus", "", "Virtual CPUs", self.cpus),
            ("memory", "_bytes", "Bytes of memory", self.memory_bytes),
            ("disk", "_bytes", "Bytes of virtual disk", self.disk_bytes),
        ] {
            let promised = format!("room_{name}_promised{unit}");
            whole(&mut registry, &promised, &format!("{what} promised to jobs"), usage.promised);
            if let Some(bound) = usage.bound {
                let name = format!("room_{name}_bound{unit}");
                whole(&mut registry, &name, &format!("{what} that may be promised"), bound);
            }
        }
        if let Some((bytes, bound)) = self.cache {
            whole(&mut registry, "cache_bytes", "Bytes of caches that are kept, saves under way included", bytes);
            whole(&mut registry, "cache_bound_bytes", "Bytes that they may be at most", bound);
        }
        self.of_runners(&mut registry);
        let jobs = Family::<Labels, Gauge>::default();
        for (runner, state) in &self.jobs_by_state {
            jobs.get_or_create_owned(&vec![("runner", runner.clone()), ("state", (*state).to_owned())]).inc();
        }
        registry.register("jobs", "Jobs under way by runner and state", jobs);
        let machines = Family::<Labels, Gauge>::default();
        for (state, count) in &self.machines {
            machines.get_or_create_owned(&vec![("state", (*state).to_owned())]).set(signed(*count));
        }
        registry.register("machines", "VMs of jobs by state", machines);
        let images = Family::<Labels, Float>::default();
        for image in &self.images {
            images.get_or_create_owned(&vec![("image", image.name.clone())]).set(image.age_s);
        }
        registry.register("image_age_seconds", "Seconds since the files of an image were made", images);
        registry
    }

    fn of_runners(&self, registry: &mut Registry) {
        let blocked = Family::<Labels, Gauge>::default();
        let answered = Family::<Labels, Float>::default();
        let unanswered = Family::<Labels, Float>::default();
        for runner in &self.runners {
            let name = || ("runner", runner.name.clone());
            for reason in BLOCKED_BY {
                let is = i64::from(runner.blocked == Some(reason));
                blocked.get_or_create_owned(&vec![name(), ("reason", reason.to_owned())]).set(is);
            }
            if let Some(seconds) = runner.answered_s {
                answered.get_or_create_owned(&vec![name()]).set(seconds);
            }
            unanswered.get_or_create_owned(&vec![name()]).set(runner.unanswered_s);
        }
        registry.register("polls_blocked", "1: this runner does not ask GitLab for jobs, for this reason", blocked);
        registry.register("gitlab_answered_seconds", "Seconds since GitLab last answered this runner", answered);
        registry.register(
            "gitlab_unanswered_seconds",
            "For how long GitLab has not answered this runner as GitLab does; 0: it does",
            unanswered,
        );
    }
}

fn whole(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(signed(value));
    registry.register(name, help, gauge);
}

fn float(registry: &mut Registry, name: &str, help: &str, value: f64) {
    let gauge = Float::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

/// Gauges are signed; no number of ours is that large.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
