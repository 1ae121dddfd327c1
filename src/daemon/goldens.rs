//! What a daemon keeps goldens with, if it keeps any.

use super::{Backends, socket_directory};
use crate::capacity::Capacity;
use crate::config::Config;
use crate::golden::Keeper;
use crate::job::Parts;
use crate::machine_spec::Start;
use crate::supply::goldens::HostTraits;
use std::path::PathBuf;

/// Where they are.
pub(super) fn directory(config: &Config) -> PathBuf {
    config.state_directory.join("goldens")
}

/// Who keeps them; `None`: this hypervisor cannot freeze, or nobody wants it. `host`: the hypervisor's version, and what it
/// takes besides a guest's memory; one that did not answer at the start is asked by the next daemon.
pub(super) async fn keeper(
    config: &Config,
    backends: &Backends,
    parts: &Parts,
    capacity: &Capacity,
    host: Option<(String, u64)>,
) -> Option<Keeper> {
    let (hypervisor, overhead_mib) = host?;
    let wanted = config.goldens.disk_gib > 0 && config.class.iter().any(|class| class.start != Start::Cold);
    if !wanted || !backends.host.hypervisor.can_freeze() {
        return None;
    }
    let (accel, machine_id) = (parts.supply.setup().accel, parts.machine_id.clone());
    let here = tokio::task::spawn_blocking(move || HostTraits::here(hypervisor, accel, machine_id));
    Some(Keeper {
        supply: parts.supply.clone(),
        capacity: capacity.clone(),
        images: backends.images.clone(),
        hypervisor: config.hypervisor.clone(),
        directory: directory(config),
        socket_dir: socket_directory(&config.runtime_directory).join("golden"),
        overhead_mib,
        bytes_max: config.goldens.disk_gib.saturating_mul(1 << 30),
        host: here.await.ok()?,
        clock: backends.clock.clone(),
        rng: backends.rng.clone(),
    })
}
