//! How much virtual disk may be promised where nobody configured it?
//!
//! What is free, less the reserve, and what the overlays that are there take already, for that is
//! promised and not free any more. Looked at again and again: others fill the disk and free it.

use crate::capacity::Capacity;
use crate::files::Files;
use crate::telemetry::chain;
use crate::vm::disks::Disks;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often the disk is looked at; a job takes minutes to fill one.
const INTERVAL: Duration = Duration::from_secs(30);

pub(super) struct Disk {
    pub(super) files: Arc<dyn Files>,
    pub(super) disks: Disks,
    pub(super) overlay_dir: PathBuf,
    pub(super) reserve_gib: u64,
    /// Nobody configured a bound: what is found counts. A reload may change that.
    pub(super) found: Arc<AtomicBool>,
}

impl Disk {
    /// See the module.
    ///
    /// # Errors
    /// The file layer's.
    pub(super) async fn promisable_gib(&self) -> io::Result<u64> {
        let free = self.files.free_bytes(&self.overlay_dir).await?;
        // Overlays that cannot be looked at count as empty, which promises less than there is.
        let overlays = self.disks.list(&self.overlay_dir).await.unwrap_or_default();
        let mut taken = 0_u64;
        for overlay in overlays {
            taken += self.files.length(&overlay).await.ok().flatten().unwrap_or(0);
        }
        Ok((free.saturating_add(taken) >> 30).saturating_sub(self.reserve_gib))
    }

    /// Keeps the bound true until `stop`.
    pub(super) async fn keep_up(self, capacity: Capacity, stop: CancellationToken) -> &'static str {
        loop {
            tokio::select! {
                biased;
                // Both are cancel safe.
                () = stop.cancelled() => return "disk",
                () = tokio::time::sleep(INTERVAL) => {}
            }
            if !self.found.load(Ordering::Relaxed) {
                continue;
            }
            match self.promisable_gib().await {
                Ok(disk_gib) if disk_gib != capacity.bounds().disk_gib => {
                    tracing::debug!(disk_gib, "the disk that may be promised has changed");
                    capacity.set_disk_gib(disk_gib);
                }
                Ok(_) => {}
                // Pollers look as well, and say so.
                Err(error) => tracing::debug!(error = chain(&error), "look for free disk"),
            }
        }
    }
}
