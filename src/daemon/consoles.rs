//! Who keeps the jobs' consoles on disk? One task that looks at all of them now and then: a disk that hangs holds up no job.

use super::Jobs;
use crate::history::{ConsoleLog, Consoles};
use crate::job::Looks;
use crate::job::journal::JobKey;
use crate::telemetry::chain;
use crate::vm::console::Rows;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often consoles are looked at. What a machine prints in between stays in memory, the last 256 KiB of it.
const INTERVAL: Duration = Duration::from_secs(2);

/// Pieces of one console that are written at one look.
const PIECES: usize = 8;

/// One console that is being kept.
struct Kept {
    received: Timestamp,
    looks: Looks,
    log: ConsoleLog,
    next: u64,
    /// The disk did not take the last rows, which was said.
    failing: bool,
}

/// Keeps them until `stop`.
pub(super) async fn keep(jobs: Jobs, consoles: Consoles, stop: CancellationToken) {
    let mut all: BTreeMap<JobKey, Kept> = BTreeMap::new();
    let mut count = jobs.count();
    loop {
        tokio::select! {
            biased;
            // All are cancel safe.
            () = stop.cancelled() => break,
            () = tokio::time::sleep(INTERVAL), if !all.is_empty() => {}
            changed = count.changed() => if changed.is_err() {
                break;
            },
        }
        let mut gone: Vec<JobKey> = all.keys().cloned().collect();
        for (view, looks) in jobs.looks() {
            gone.retain(|key| *key != view.key);
            let kept =
                all.entry(view.key.clone()).or_insert_with(|| Kept::new(&view.key, view.received, looks.clone()));
            if kept.received != view.received {
                // GitLab has given the same job out anew.
                *kept = Kept::new(&view.key, view.received, looks);
            }
        }
        for key in gone {
            if let Some(mut kept) = all.remove(&key) {
                kept.finish(&consoles).await;
            }
        }
        for kept in all.values_mut() {
            kept.go_on(&consoles).await;
        }
    }
    for kept in all.values_mut() {
        kept.go_on(&consoles).await;
    }
}

impl Kept {
    fn new(key: &JobKey, received: Timestamp, looks: Looks) -> Self {
        let log = ConsoleLog::of(received, &key.directory());
        Self { received, looks, log, next: 0, failing: false }
    }

    /// What whole rows there are by now.
    async fn go_on(&mut self, consoles: &Consoles) {
        for _ in 0..PIECES {
            let Some(rows) = self.looks.rows_from(Some(self.next)) else { return };
            if rows.next == self.next || !self.append(consoles, &rows).await {
                return;
            }
        }
    }

    /// All that is left.
    async fn finish(&mut self, consoles: &Consoles) {
        if let Some(rows) = self.looks.rest_from(self.next) {
            self.append(consoles, &rows).await;
        }
    }

    async fn append(&mut self, consoles: &Consoles, rows: &Rows) -> bool {
        match consoles.append(&mut self.log, rows).await {
            Ok(()) => {
                (self.next, self.failing) = (rows.next, false);
                true
            }
            Err(error) => {
                // A disk that takes nothing is told of by who needs it.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::info!(error = chain(&error), "keep a console; `dayfly console --all` lacks some of it");
                }
                false
            }
        }
    }
}
