//! What jobs without a network card have reached, by machine class.

use super::Labels;
use dayfly_egress::audit::Destination;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What is counted of jobs' egress, when they end.
#[derive(Clone, Debug)]
pub struct EgressMetrics {
    connections: Family<Labels, Counter>,
    refused: Family<Labels, Counter>,
    bytes: Family<Labels, Counter>,
}

impl EgressMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("egress");
        let family = |registry: &mut Registry, name: &str, help: &str| {
            let family = Family::<Labels, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        Self {
            connections: family(registry, "connections", "Connections of jobs without a network card, by class"),
            refused: family(registry, "refused", "Connections and names that their policy refused, by class"),
            bytes: family(registry, "bytes", "Bytes that they sent (up) and received (down), by class"),
        }
    }

    /// Counts what one job of this class has reached.
    pub fn count(&self, class: &str, reached: &[Destination]) {
        let sum = |of: fn(&Destination) -> u64| reached.iter().fold(0_u64, |sum, to| sum.saturating_add(of(to)));
        let of = || vec![("class", class.to_owned())];
        self.connections.get_or_create(&of()).inc_by(sum(|to| to.connections));
        self.refused.get_or_create(&of()).inc_by(sum(|to| to.refused));
        for (direction, bytes) in [("up", sum(|to| to.up)), ("down", sum(|to| to.down))] {
            let labels = vec![("class", class.to_owned()), ("direction", direction.to_owned())];
            self.bytes.get_or_create(&labels).inc_by(bytes);
        }
    }
}
