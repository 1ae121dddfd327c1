//! What do we count? One registry of typed counters, and a handle that everybody may clone.
//!
//! Each module that counts has a struct of its own here, with one public field per metric, so that
//! `grep` for a metric's name ends in this file. Counting never blocks and never fails. Labels are
//! words from our own source, never text from a guest or a server: their number stays bounded.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// All metrics of this process. Clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Registered>);

struct Registered {
    registry: Registry,
    guest: GuestMetrics,
    job: JobMetrics,
}

impl Metrics {
    /// A registry with every metric at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("dayfly");
        let guest = GuestMetrics::register(&mut registry);
        let job = JobMetrics::register(&mut registry);
        Self(Arc::new(Registered { registry, guest, job }))
    }

    /// What the doors count.
    #[must_use]
    pub fn guest(&self) -> &GuestMetrics {
        &self.0.guest
    }

    /// What pollers and jobs count.
    #[must_use]
    pub fn job(&self) -> &JobMetrics {
        &self.0.job
    }

    /// All of them in the OpenMetrics text format.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.0.registry).expect("a String takes all");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// One counter per word of one label.
#[derive(Clone, Debug)]
pub struct Labelled {
    label: &'static str,
    family: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Labelled {
    fn new(label: &'static str) -> Self {
        Self { label, family: Family::default() }
    }

    /// Counts one more of `word`.
    pub fn inc(&self, word: &'static str) {
        self.family.get_or_create(&[(self.label, word)]).inc();
    }

    /// How many of `word` were counted.
    #[must_use]
    pub fn get(&self, word: &'static str) -> u64 {
        self.family.get_or_create(&[(self.label, word)]).get()
    }
}

/// What the doors count, over all VMs.
#[derive(Clone, Debug)]
pub struct GuestMetrics {
    /// Connections that have proven the pass.
    pub greetings: Counter,
    /// Connections closed before that; `reason`: see `guest::greeting`.
    pub greetings_failed: Labelled,
    /// Connections closed for another `reason`: `too_many`, `head_timeout`, `idle`, `write_stall`.
    pub connections_closed: Labelled,
    /// Failed accepts.
    pub accept_errors: Counter,
    /// Requests by `route`.
    pub requests: Labelled,
    /// Requests refused by us, by `reason`.
    pub refused: Labelled,
    /// Query keys that were dropped on the way to GitLab.
    pub query_keys_dropped: Counter,
    /// Trace bytes taken.
    pub trace_bytes: Counter,
    /// Artifact bytes by `direction`: `up`, `down`.
    pub artifact_up_bytes: Counter,
    /// See `artifact_up_bytes`.
    pub artifact_down_bytes: Counter,
}

impl GuestMetrics {
    fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("guest");
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let labelled = |registry: &mut Registry, name: &str, help: &str, label| {
            let labelled = Labelled::new(label);
            registry.register(name, help, labelled.family.clone());
            labelled
        };
        Self {
            greetings: counter(registry, "greetings", "Connections that proved the pass"),
            greetings_failed: labelled(registry, "greetings_failed", "Connections that did not", "reason"),
            connections_closed: labelled(registry, "connections_closed", "Connections that we closed", "reason"),
            accept_errors: counter(registry, "accept_errors", "Failed accepts at doors"),
            requests: labelled(registry, "requests", "Requests of guests", "route"),
            refused: labelled(registry, "requests_refused", "Requests of guests that were refused", "reason"),
            query_keys_dropped: counter(registry, "query_keys_dropped", "Unknown query keys dropped"),
            trace_bytes: counter(registry, "trace_bytes", "Trace bytes taken from guests"),
            artifact_up_bytes: counter(registry, "artifact_up_bytes", "Artifact bytes from guests to GitLab"),
            artifact_down_bytes: counter(registry, "artifact_down_bytes", "Artifact bytes from GitLab to guests"),
        }
    }
}

/// What pollers and jobs count.
#[derive(Clone, Debug)]
pub struct JobMetrics {
    /// Jobs that GitLab assigned.
    pub assigned: Counter,
    /// Assigned jobs that could not be written down, so that GitLab will fail them.
    pub lost: Counter,
    /// Assigned jobs whose payload could not be read.
    pub unreadable: Counter,
    /// Jobs that GitLab assigned although they were under way.
    pub assigned_again: Counter,
    /// Tasks of jobs that panicked.
    pub panicked: Counter,
    /// Answers in which GitLab held more of a trace than there was.
    pub trace_ahead: Counter,
    /// Machines that were lost before they were ready, and replaced.
    pub machines_replaced: Counter,
    /// VMs whose destruction has failed and is tried again.
    pub stuck_domains: Gauge,
    /// Jobs whose log, state or verdict GitLab has not taken at the last try.
    pub waiting_for_gitlab: Gauge,
    /// Jobs whose verdict went without the rest of their log, which GitLab did not take.
    pub traces_given_up: Counter,
    /// Runner tokens that were made anew before they ended.
    pub tokens_renewed: Counter,
    /// Runners that cannot take a job until somebody looks: see their state in the status.
    pub runners_unwell: Gauge,
    /// Seconds from the last byte of GitLab's 201 to the job's record on disk: what a crash may cost.
    pub journal: Histogram,
    /// Verdicts by word: `success`, `failed`.
    pub verdicts: Labelled,
    /// Seconds from GitLab's 201 to each phase of the boot.
    phases: Family<[(&'static str, &'static str); 1], Histogram>,
}

/// Bounds of the boot's histogram, seconds: from a restored machine's 0.5 s to the boot deadline.
const PHASE_BUCKETS: [f64; 10] = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 300.0];

/// Bounds of the journal's histogram, seconds: some fsyncs, from a fast disk's to a struggling one's.
const JOURNAL_BUCKETS: [f64; 10] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

impl JobMetrics {
    fn register(registry: &mut Registry) -> Self {
        let phases = Family::new_with_constructor((|| Histogram::new(PHASE_BUCKETS)) as fn() -> Histogram);
        let metrics = Self {
            assigned: Counter::default(),
            lost: Counter::default(),
            unreadable: Counter::default(),
            assigned_again: Counter::default(),
            panicked: Counter::default(),
            trace_ahead: Counter::default(),
            machines_replaced: Counter::default(),
            stuck_domains: Gauge::default(),
            waiting_for_gitlab: Gauge::default(),
            traces_given_up: Counter::default(),
            tokens_renewed: Counter::default(),
            runners_unwell: Gauge::default(),
            journal: Histogram::new(JOURNAL_BUCKETS),
            verdicts: Labelled::new("verdict"),
            phases,
        };
        for (name, help, counter) in [
            ("jobs_assigned", "Jobs that GitLab assigned", &metrics.assigned),
            ("jobs_lost", "Assigned jobs that could not be written down", &metrics.lost),
            ("jobs_unreadable", "Assigned jobs whose payload could not be read", &metrics.unreadable),
            ("jobs_assigned_again", "Jobs that GitLab assigned although they were under way", &metrics.assigned_again),
            ("jobs_panicked", "Jobs whose task panicked", &metrics.panicked),
            ("trace_ahead", "GitLab held more of a trace than there was", &metrics.trace_ahead),
            ("runner_tokens_renewed", "Runner tokens that were made anew before they ended", &metrics.tokens_renewed),
            ("machines_replaced", "Machines replaced before they were ready", &metrics.machines_replaced),
            (
                "traces_given_up",
                "Verdicts that went without the rest of a log which GitLab did not take",
                &metrics.traces_given_up,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in [
            ("stuck_domains", "VMs whose destruction has failed and is tried again", &metrics.stuck_domains),
            (
                "jobs_waiting_for_gitlab",
                "Jobs whose log, state or verdict GitLab has not taken at the last try",
                &metrics.waiting_for_gitlab,
            ),
            ("runners_unwell", "Runners that cannot take a job until somebody looks", &metrics.runners_unwell),
        ] {
            registry.register(name, help, gauge.clone());
        }
        registry.register(
            "journal_seconds",
            "Seconds from the last byte of GitLab's answer to the job's record on disk",
            metrics.journal.clone(),
        );
        registry.register("jobs_ended", "Jobs by verdict", metrics.verdicts.family.clone());
        registry.register(
            "boot_seconds",
            "Seconds from the job's assignment to each boot phase",
            metrics.phases.clone(),
        );
        metrics
    }

    /// Notes that a boot reached `phase` this long after GitLab's 201.
    pub fn phase(&self, phase: &'static str, since: Duration) {
        self.phases.get_or_create(&[("phase", phase)]).observe(since.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_each_metric_with_its_prefix_and_label() {
        let metrics = Metrics::new();
        metrics.clone().guest().refused.inc("other_job");
        metrics.guest().trace_bytes.inc_by(7);
        let text = metrics.to_text();
        assert!(text.contains("dayfly_guest_requests_refused_total{reason=\"other_job\"} 1\n"), "{text}");
        assert!(text.contains("dayfly_guest_trace_bytes_total 7\n"), "{text}");
        assert_eq!(metrics.guest().refused.get("other_job"), 1);
    }
}
