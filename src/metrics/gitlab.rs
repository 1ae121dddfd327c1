//! What is counted of calls to GitLab.

use super::Labels;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Calls to GitLab, of all runners.
#[derive(Clone, Debug)]
pub struct GitlabMetrics {
    requests: Family<Labels, Counter>,
}

impl GitlabMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let requests = Family::<Labels, Counter>::default();
        let help = "Calls to GitLab by runner and status; `none`: no answer came";
        registry.register("gitlab_requests", help, requests.clone());
        Self { requests }
    }

    /// Counts a call of this runner entry, answered with this status of HTTP; `None`: not answered.
    pub fn request(&self, runner: &str, status: Option<u16>) {
        // What is no status of HTTP must not make labels without end.
        let status = match status {
            None => "none".to_owned(),
            Some(status @ 100..=599) => status.to_string(),
            Some(_) => "other".to_owned(),
        };
        self.requests.get_or_create_owned(&vec![("runner", runner.to_owned()), ("status", status)]).inc();
    }
}
