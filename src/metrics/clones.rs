//! What is kept of repositories, and what came of it.

use super::Labelled;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What is counted of mirrors.
#[derive(Clone, Debug)]
pub struct ClonesMetrics {
    /// Machines by what there was for them, by `result`: `hit`, `miss`.
    pub jobs: Labelled,
    /// Fetches by what came of them: `fetched`, `refused`, `too_large`, `late`, `failed`, `no_room`, `rests`.
    pub fetches: Labelled,
    /// Bytes of packs that fetches brought.
    pub fetched_bytes: Counter,
    /// Mirrors that were removed, by `reason`: `age`, `threshold`, `quota`, `damaged`.
    pub wiped: Labelled,
    /// Mirrors that there are.
    pub mirrors: Gauge,
    /// Bytes that they and their disks take.
    pub bytes: Gauge,
}

impl ClonesMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("clones");
        let gauge = |registry: &mut Registry, name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
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
            jobs: labelled(registry, "jobs", "Machines by what was here of their repositories", "result"),
            fetches: labelled(registry, "fetches", "Fetches into mirrors by what came of them", "result"),
            fetched_bytes: counter(registry, "fetched_bytes", "Bytes of packs that fetches brought"),
            wiped: labelled(registry, "wiped", "Mirrors that were removed", "reason"),
            mirrors: gauge(registry, "mirrors", "Mirrors of repositories"),
            bytes: gauge(registry, "bytes", "Bytes that mirrors and their disks take"),
        }
    }
}
