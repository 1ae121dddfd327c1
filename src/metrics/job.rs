//! What pollers, jobs and their uploaders count.

use super::Labels;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

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
    /// Processes that carried the egress of a machine, ended before it, and were replaced.
    pub egress_restarted: Counter,
    /// VMs whose destruction has failed and is tried again.
    pub machines_stuck: Gauge,
    /// Jobs whose log, state or verdict GitLab has not taken at the last try.
    pub waiting_for_gitlab: Gauge,
    /// Bytes of traces that are on this host and not at GitLab.
    pub backlog_bytes: Gauge,
    /// Jobs whose verdict went without the rest of their log, which GitLab did not take.
    pub traces_given_up: Counter,
    /// Runner tokens that were made anew before they ended.
    pub tokens_renewed: Counter,
    /// Runners that cannot take a job until somebody looks: see their state in the status.
    pub runners_unwell: Gauge,
    /// Seconds from the last byte of GitLab's 201 to the job's record on disk: what a crash may cost.
    pub journal: Histogram,
    ended: Family<Labels, Counter>,
    rules: Family<Labels, Counter>,
    /// Seconds from GitLab's 201 to each step of the boot.
    boot: Family<[(&'static str, &'static str); 1], Histogram>,
    phases: Family<[(&'static str, &'static str); 1], Histogram>,
    /// Seconds from GitLab's 201 to the hand-out, by where the machine came from.
    starts: Family<[(&'static str, &'static str); 1], Histogram>,
}

/// A part of a job's time on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A poller waits for room, before GitLab is asked.
    Reserve,
    /// The disk of the machine is made, and what comes before it.
    Overlay,
    /// The hypervisor makes the machine.
    Create,
    /// Its guest starts.
    Boot,
    /// Its runner starts and asks for the job.
    PickUp,
    /// The guest works at the job, up to its verdict.
    Run,
    /// GitLab takes the last of the log, and the verdict.
    Flush,
    /// The machine is taken down.
    CleanUp,
}

impl Phase {
    /// Those of a machine, in their order, then the others.
    pub const ALL: [Self; 8] =
        [Self::Overlay, Self::Create, Self::Boot, Self::PickUp, Self::Run, Self::Reserve, Self::Flush, Self::CleanUp];

    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Overlay => "overlay",
            Self::Create => "create",
            Self::Boot => "boot",
            Self::PickUp => "pick-up",
            Self::Run => "run",
            Self::Flush => "flush",
            Self::CleanUp => "clean-up",
        }
    }
}

/// Where machines come from.
const STARTS: [&str; 2] = ["cold", "restored"];

/// How a job ended here, as far as is counted.
const VERDICTS: [&str; 3] = ["success", "failed", "over"];

/// Bounds of the boot's histogram, seconds: from a restored machine's 0.5 s to the boot deadline.
const BOOT_BUCKETS: [f64; 10] = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 300.0];

/// Bounds of the journal's histogram, seconds: some fsyncs, from a fast disk's to a struggling one's.
const JOURNAL_BUCKETS: [f64; 10] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// Bounds of the phases' histogram, seconds: from the overlay's milliseconds to a job of hours.
const PHASE_BUCKETS: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 4.0 * 3600.0];

impl JobMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            assigned: Counter::default(),
            lost: Counter::default(),
            unreadable: Counter::default(),
            assigned_again: Counter::default(),
            panicked: Counter::default(),
            trace_ahead: Counter::default(),
            machines_replaced: Counter::default(),
            egress_restarted: Counter::default(),
            machines_stuck: Gauge::default(),
            waiting_for_gitlab: Gauge::default(),
            backlog_bytes: Gauge::default(),
            traces_given_up: Counter::default(),
            tokens_renewed: Counter::default(),
            runners_unwell: Gauge::default(),
            journal: Histogram::new(JOURNAL_BUCKETS),
            ended: Family::default(),
            rules: Family::default(),
            boot: Family::new_with_constructor((|| Histogram::new(BOOT_BUCKETS)) as fn() -> Histogram),
            phases: Family::new_with_constructor((|| Histogram::new(PHASE_BUCKETS)) as fn() -> Histogram),
            starts: Family::new_with_constructor((|| Histogram::new(BOOT_BUCKETS)) as fn() -> Histogram),
        };
        for (name, help, counter) in [
            ("jobs_assigned", "Jobs that GitLab assigned", &metrics.assigned),
            ("jobs_lost", "Assigned jobs that could not be written down", &metrics.lost),
            ("jobs_unreadable", "Assigned jobs whose payload could not be read", &metrics.unreadable),
            ("jobs_assigned_again", "Jobs that GitLab assigned although they were under way", &metrics.assigned_again),
            ("jobs_panicked", "Jobs whose task panicked", &metrics.panicked),
            ("trace_ahead", "Answers in which GitLab held more of a trace than there was", &metrics.trace_ahead),
            (
                "egress_restarted",
                "Processes that carried a machine's egress, ended before it, and were replaced",
                &metrics.egress_restarted,
            ),
            ("machines_replaced", "Machines replaced before they were ready", &metrics.machines_replaced),
            ("runner_tokens_renewed", "Runner tokens that were made anew before they ended", &metrics.tokens_renewed),
            (
                "traces_given_up",
                "Verdicts that went without the rest of a log which GitLab did not take",
                &metrics.traces_given_up,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in [
            ("machines_stuck", "VMs whose destruction has failed and is tried again", &metrics.machines_stuck),
            (
                "jobs_waiting_for_gitlab",
                "Jobs whose log, state or verdict GitLab has not taken at the last try",
                &metrics.waiting_for_gitlab,
            ),
            (
                "uploader_backlog_bytes",
                "Bytes of logs that are on this host and not yet at GitLab",
                &metrics.backlog_bytes,
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
        registry.register(
            "jobs_ended",
            "Jobs by runner and verdict; `over`: GitLab had ended them before",
            metrics.ended.clone(),
        );
        registry.register(
            "rule_matches",
            "Jobs that a rule has decided on, by rule and what it does; `dry_run`: it would have",
            metrics.rules.clone(),
        );
        registry.register("boot_seconds", "Seconds from the job's assignment to each boot step", metrics.boot.clone());
        registry.register("job_phase_seconds", "Seconds that each phase of a job took", metrics.phases.clone());
        registry.register(
            "start_seconds",
            "Seconds from the job's assignment to its hand-out, by where its machine came from",
            metrics.starts.clone(),
        );
        for start in STARTS {
            drop(metrics.starts.get_or_create(&[("start", start)]));
        }
        for phase in Phase::ALL {
            drop(metrics.phases.get_or_create(&[("phase", phase.word())]));
        }
        metrics
    }

    /// Notes that a boot reached `step` this long after GitLab's 201.
    pub fn boot_step(&self, step: &'static str, since: Duration) {
        self.boot.get_or_create(&[("phase", step)]).observe(since.as_secs_f64());
    }

    /// Notes that a job was handed out this long after GitLab's 201, in a machine that came from there.
    pub fn start(&self, came_from: &'static str, since: Duration) {
        self.starts.get_or_create(&[("start", came_from)]).observe(since.as_secs_f64());
    }

    /// Notes how long a phase took.
    pub fn phase(&self, phase: Phase, took: Duration) {
        self.phases.get_or_create(&[("phase", phase.word())]).observe(took.as_secs_f64());
    }

    /// A runner entry is in use: its jobs are counted from zero, so that the first one of each verdict is seen.
    pub fn begin_runner(&self, runner: &str) {
        for verdict in VERDICTS {
            drop(self.ended.get_or_create(&ended_labels(runner, verdict)));
        }
    }

    /// A rule is in force: what it does is counted from zero.
    pub fn begin_rule(&self, rule: &str, does: &'static str) {
        drop(self.rules.get_or_create(&rule_labels(rule, does)));
    }

    /// A rule fits a job: `allow`, `deny`, `class`, or `dry_run` where nothing comes of it.
    pub fn rule(&self, rule: &str, does: &'static str) {
        self.rules.get_or_create_owned(&rule_labels(rule, does)).inc();
    }

    /// A job of this runner entry has ended: `success`, `failed`, or `over` where GitLab had ended it before.
    pub fn ended(&self, runner: &str, verdict: &'static str) {
        self.ended.get_or_create_owned(&ended_labels(runner, verdict)).inc();
    }
}

fn rule_labels(rule: &str, does: &'static str) -> Labels {
    vec![("rule", rule.to_owned()), ("action", does.to_owned())]
}

fn ended_labels(runner: &str, verdict: &'static str) -> Labels {
    vec![("runner", runner.to_owned()), ("verdict", verdict.to_owned())]
}
