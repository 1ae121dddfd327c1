//! What do we count, and how do we stand? Typed counters that everybody may clone, a snapshot that is taken when somebody
//! asks, and both as text.
//!
//! Each module that counts has a struct of its own here, with one public field per metric, so that `grep` for a metric's
//! name ends in this directory. Counting never blocks and never fails. Labels are words from our own source, names of the
//! configuration or statuses of HTTP, never text from a guest or a server: their number stays bounded.
//!
//! Two texts: OpenMetrics, as `prometheus-client` writes it, and the older Prometheus format ([`classic`]), which
//! node_exporter's textfile collector and `promtool check metrics` read.

mod classic;
mod clones;
mod egress;
mod gitlab;
mod guest;
mod job;
mod snapshot;

pub use clones::ClonesMetrics;
pub use egress::EgressMetrics;
pub use gitlab::GitlabMetrics;
pub use guest::GuestMetrics;
pub use job::{JobMetrics, Phase};
pub use snapshot::{BLOCKED_BY, ImageTime, RunnerGauges, Snapshot, Usage};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;

/// Labels that are known when something is counted.
type Labels = Vec<(&'static str, String)>;

/// All metrics of this process. Clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Registered>);

struct Registered {
    registry: Registry,
    guest: GuestMetrics,
    job: JobMetrics,
    gitlab: GitlabMetrics,
    egress: EgressMetrics,
    clones: ClonesMetrics,
}

/// Which text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0, for a Prometheus that asks for it.
    Open,
    /// The Prometheus text format 0.0.4, for everybody else.
    Classic,
}

impl Form {
    /// Its media type.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Open => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

impl Metrics {
    /// A registry with every metric at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("dayfly");
        let guest = GuestMetrics::register(&mut registry);
        let job = JobMetrics::register(&mut registry);
        let gitlab = GitlabMetrics::register(&mut registry);
        let egress = EgressMetrics::register(&mut registry);
        let clones = ClonesMetrics::register(&mut registry);
        Self(Arc::new(Registered { registry, guest, job, gitlab, egress, clones }))
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

    /// What is counted of calls to GitLab.
    #[must_use]
    pub fn gitlab(&self) -> &GitlabMetrics {
        &self.0.gitlab
    }

    /// What is counted of what jobs reach.
    #[must_use]
    pub fn egress(&self) -> &EgressMetrics {
        &self.0.egress
    }

    /// What is counted of mirrors.
    #[must_use]
    pub fn clones(&self) -> &ClonesMetrics {
        &self.0.clones
    }

    /// All of them, and how the daemon stands now.
    #[must_use]
    pub fn text(&self, snapshot: &Snapshot, form: Form) -> String {
        let mut text = String::new();
        let now = snapshot.registry();
        let written = encode_registry(&mut text, &self.0.registry)
            .and_then(|()| encode_registry(&mut text, &now))
            .and_then(|()| encode_eof(&mut text));
        written.expect("a String takes all");
        match form {
            Form::Open => text,
            Form::Classic => classic::from_open(&text),
        }
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

#[cfg(test)]
mod tests;
