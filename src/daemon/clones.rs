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
    let directory = config.state_directory.join("clones");
    let unread =
        |source| DaemonError::Files { what: "look for mirrors of repositories at", path: directory.clone(), source };
    if !config.clones.enabled {
        // Nobody would look at what is there again. Machines have their disks open.
        if !backends.files.list(&directory).await.map_err(unread)?.is_empty() {
            backends.files.remove(&directory).await.map_err(unread)?;
        }
        return Ok(None);
    }
    let reserve = config.capacity.disk_reserve_gib.saturating_mul(1 << 30);
    let seams = (backends.workshop.clone(), backends.files.clone());
    let chance = (backends.clock.clone(), backends.rng.clone());
    let clones =
        Clones::open(seams, directory.clone(), (config.clones.clone(), reserve), chance, metrics.clone()).await;
    clones.map(Some).map_err(unread)
}
