//! The deadlines and bounds of a job, all configurable.

use super::Span;
use serde::{Deserialize, Serialize};

/// Section `[limits]`: the deadlines of threats.md §3.1, all configurable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// From GitLab's 201 to the guest's first request.
    pub boot_deadline: Span,
    /// A running guest that says nothing for this long is given up.
    pub silence_deadline: Span,
    /// Timeout of a job that GitLab gives none.
    pub default_timeout: Span,
    /// How long after the job's timeout its VM is destroyed.
    pub timeout_grace: Span,
    /// How long `after_script` may take once a job is being canceled.
    pub canceling_grace: Span,
    /// How long a guest may take to end once it has read that its job is over at GitLab; one that asks nothing
    /// within its update interval is not waited for.
    pub cancel_grace: Span,
    /// How long a VM may take to power off after its verdict.
    pub power_off_grace: Span,
    /// Longest pause between two calls to GitLab for a live job; also the cancel latency.
    pub keepalive: Span,
    /// How often a guest is told to send its trace, 1–3 s.
    pub guest_update_interval: Span,
    /// How long the guest's relay waits for a door that refuses: a restart of the daemon.
    pub door_patience: Span,
    /// After this time without a door a guest powers off by itself.
    pub guest_power_off: Span,
    /// Bytes of one job's trace on this host, MiB; further ones are dropped with a notice.
    pub spool_mib: u64,
    /// How long an undelivered verdict is kept.
    pub outbox_keep: Span,
    /// How long a verdict waits for a log that GitLab does not take although it answers.
    pub trace_patience: Span,
    /// How long a drain waits for running jobs before it ends them; none: as long as they take.
    pub drain_timeout: Option<Span>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boot_deadline: Span::from_secs(300),
            silence_deadline: Span::from_secs(300),
            default_timeout: Span::from_secs(3600),
            timeout_grace: Span::from_secs(120),
            canceling_grace: Span::from_secs(360),
            cancel_grace: Span::from_secs(10),
            power_off_grace: Span::from_secs(5),
            keepalive: Span::from_secs(10),
            guest_update_interval: Span::from_secs(1),
            door_patience: Span::from_secs(60),
            guest_power_off: Span::from_secs(1800),
            spool_mib: 256,
            outbox_keep: Span::from_secs(24 * 3600),
            trace_patience: Span::from_secs(15 * 60),
            drain_timeout: None,
        }
    }
}
