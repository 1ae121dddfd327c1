//! Removes what is kept of a job that is over: secrets and a spool must not stay because a disk was read-only for a while.

use super::Parts;
use super::journal::JobKey;
use crate::retry::Backoff;
use crate::telemetry::chain;
use std::time::Duration;
use tokio::time::Instant;

/// How long it is tried. A drain waits no longer than this; what is left then is found at the next start.
const PATIENCE: Duration = Duration::from_secs(600);

/// Tries until it works, the daemon leaves, or [`PATIENCE`] is over. `false`: it is left to the next start, as after a
/// kill.
pub async fn forget(parts: &Parts, key: &JobKey) -> bool {
    let (since, mut backoff, mut told) = (Instant::now(), Backoff::uploader(), false);
    loop {
        match parts.journal.remove(key).await {
            Ok(()) => return true,
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::warn!(%key, error = chain(&error), "remove a job's record; trying again");
            }
            Err(error) => tracing::debug!(%key, error = chain(&error), "remove a job's record; trying again"),
        }
        if since.elapsed() >= PATIENCE {
            tracing::error!(%key, "the record of a job could not be removed; the next start of the daemon tries again");
            return false;
        }
        tokio::select! {
            biased;
            // Both are cancel safe.
            () = parts.leave.cancelled() => return false,
            () = tokio::time::sleep(backoff.next(&parts.rng)) => {}
        }
    }
}
