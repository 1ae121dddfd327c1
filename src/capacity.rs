//! How much of the host is promised?

use serde::{Deserialize, Serialize};

/// Section `[capacity]`: what jobs may use of this host, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Virtual CPUs; none: no limit but `concurrent`.
    pub cpus: Option<u32>,
    /// Memory, MiB; none: the host's memory less 1 GiB.
    pub memory_mib: Option<u64>,
    /// Disk that must stay free where overlays and spools are, GiB.
    pub disk_reserve_gib: u64,
}
