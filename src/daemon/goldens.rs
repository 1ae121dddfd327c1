//! What a daemon keeps goldens with, if it keeps any.

use super::Backends;
use crate::capacity::Capacity;
use crate::config::Config;
use crate::golden::Keeper;
use crate::job::Parts;
use crate::supply::goldens::HostTraits;
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Where they are.
pub(super) fn directory(config: &Config) -> PathBuf {
    config.state_directory.join("goldens")
}

/// Who keeps them; `None`: this hypervisor cannot freeze, or no disk is for it. `host`: the hypervisor's version, and what it
/// takes besides a guest's memory; one that did not answer at the start is asked by the next daemon.
pub(super) async fn keeper(
    config: &Config,
    backends: &Backends,
    parts: &Parts,
    capacity: &Capacity,
    host: Option<(String, u64)>,
) -> Option<Keeper> {
    let (hypervisor, overhead_mib) = host?;
    if config.goldens.disk_gib == 0 || !backends.host.hypervisor.can_freeze() {
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
        // No longer than where jobs' sockets are: unix sockets end at 107 bytes.
        socket_dir: config.runtime_directory.join("g"),
        overhead_mib,
        bytes_max: config.goldens.disk_gib.saturating_mul(1 << 30),
        host: here.await.ok()?,
        clock: backends.clock.clone(),
        rng: backends.rng.clone(),
    })
}

/// Has them kept until `stop`. When the daemon drains or hands over none is begun any more, and one that is half made is
/// taken down while there is time for it.
pub(super) async fn keep(keeper: Keeper, parts: Parts, stop: CancellationToken) -> &'static str {
    let end = stop.child_token();
    let early = async {
        tokio::select! {
            biased;
            // All are cancel safe.
            () = end.cancelled() => {}
            () = parts.drain.cancelled() => {}
            () = parts.leave.cancelled() => {}
        }
        end.cancel();
    };
    tokio::join!(early, keeper.keep(end.clone()));
    stop.cancelled().await;
    "keeper of frozen machines"
}
