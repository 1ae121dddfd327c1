//! What the doors count.

use super::{Labelled, Labels};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What the doors count, over all VMs.
#[derive(Clone, Debug)]
pub struct GuestMetrics {
    /// Connections that have proven the pass.
    pub greetings: Counter,
    /// Connections closed before that; `reason`: see `guest::greeting`.
    pub greetings_failed: Labelled,
    /// Sessions of wires that have begun: both sides have proven the pass.
    pub sessions: Counter,
    /// Tries to begin one that came to nothing while there was a VM, by `reason`: `late`, or a word of `dayfly_wire`.
    pub sessions_failed: Labelled,
    /// Sessions that have ended while their door was open, by `reason`.
    pub sessions_ended: Labelled,
    /// Connections closed for another `reason`: `too_many`, `head_timeout`, `idle`, `write_stall`.
    pub connections_closed: Labelled,
    /// Connections to forwards by `forward` and `result`, see [`GuestMetrics::forward`].
    forwards: Family<Labels, Counter>,
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
    /// Requests to the store of `cache:` by `result`: `hit`, `miss`, `saved`; what was refused is in `refused`.
    pub cache: Labelled,
    /// Bytes of caches that were saved.
    pub cache_up_bytes: Counter,
    /// Bytes of caches that were fetched.
    pub cache_down_bytes: Counter,
    /// Artifact bytes by `direction`: `up`, `down`.
    pub artifact_up_bytes: Counter,
    /// See `artifact_up_bytes`.
    pub artifact_down_bytes: Counter,
}

impl GuestMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("guest");
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let forwards = Family::default();
        registry.register(
            "forward_connections",
            "Connections of jobs to forwards, by forward and what became of them",
            forwards.clone(),
        );
        let labelled = |registry: &mut Registry, name: &str, help: &str, label| {
            let labelled = Labelled::new(label);
            registry.register(name, help, labelled.family.clone());
            labelled
        };
        Self {
            greetings: counter(registry, "greetings", "Connections that proved the pass"),
            greetings_failed: labelled(registry, "greetings_failed", "Connections that did not", "reason"),
            sessions: counter(registry, "sessions", "Sessions of wires that have begun"),
            sessions_failed: labelled(registry, "sessions_failed", "Sessions of wires that have not", "reason"),
            sessions_ended: labelled(registry, "sessions_ended", "Sessions of wires that have ended", "reason"),
            connections_closed: labelled(registry, "connections_closed", "Connections that we closed", "reason"),
            forwards,
            accept_errors: counter(registry, "accept_errors", "Failed accepts at doors"),
            requests: labelled(registry, "requests", "Requests of guests", "route"),
            refused: labelled(registry, "requests_refused", "Requests of guests that were refused", "reason"),
            query_keys_dropped: counter(registry, "query_keys_dropped", "Unknown query keys dropped"),
            trace_bytes: counter(registry, "trace_bytes", "Trace bytes taken from guests"),
            cache: labelled(registry, "cache_requests", "Caches that jobs looked for or saved", "result"),
            cache_up_bytes: counter(registry, "cache_up_bytes", "Cache bytes from guests"),
            cache_down_bytes: counter(registry, "cache_down_bytes", "Cache bytes to guests"),
            artifact_up_bytes: counter(registry, "artifact_up_bytes", "Artifact bytes from guests to GitLab"),
            artifact_down_bytes: counter(registry, "artifact_down_bytes", "Artifact bytes from GitLab to guests"),
        }
    }
    /// A forward is in use: what becomes of its connections is counted from zero.
    pub fn begin_forward(&self, forward: &str) {
        for result in FORWARD_RESULTS {
            drop(self.forwards.get_or_create(&forward_labels(forward, result)));
        }
    }

    /// A connection to a forward: `made`; `failed`, where nobody listens at its address; `too_many` of one machine.
    pub fn forward(&self, forward: &str, result: &'static str) {
        self.forwards.get_or_create_owned(&forward_labels(forward, result)).inc();
    }

    /// How many there were.
    #[must_use]
    pub fn forwarded(&self, forward: &str, result: &'static str) -> u64 {
        self.forwards.get_or_create_owned(&forward_labels(forward, result)).get()
    }
}

/// What becomes of a connection to a forward.
const FORWARD_RESULTS: [&str; 3] = ["made", "failed", "too_many"];

fn forward_labels(forward: &str, result: &'static str) -> Labels {
    vec![("forward", forward.to_owned()), ("result", result.to_owned())]
}
