//! The mirrors of repositories, if there are to be any.

use super::{Backends, DaemonError};
use crate::clones::Clones;
use crate::config::Config;
use crate::metrics::Metrics;

/// Finds what former daemons have left of them.
pub(super) async fn open(
    config: &Config,
    backends: &Backends,
    metrics: &Metrics,
) -> Result<Option<Clones>, DaemonError> {
    if !config.clones.enabled {
        return Ok(None);
    }
    let directory = config.state_directory.join("clones");
    let reserve = config.capacity.disk_reserve_gib.saturating_mul(1 << 30);
    let seams = (backends.workshop.clone(), backends.files.clone());
    let chance = (backends.clock.clone(), backends.rng.clone());
    let clones =
        Clones::open(seams, directory.clone(), (config.clones.clone(), reserve), chance, metrics.clone()).await;
    let unread = |source| DaemonError::Files { what: "look for mirrors of repositories at", path: directory, source };
    clones.map(Some).map_err(unread)
}
