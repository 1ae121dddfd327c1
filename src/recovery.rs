//! What exists, what should exist?
//!
//! At start, before any poll: every record of the journal becomes a job again, and every VM,
//! overlay and socket that carries our installation id and belongs to no record is an orphan, and
//! reaped. `daemon`'s sweeper repeats the second part every minute. Nothing foreign is touched: VMs are known by the
//! installation id in their metadata, files by names that only we make, in directories of ours.
//! Running it twice, or dying in it, changes nothing more.

use crate::capacity::Capacity;
use crate::gitlab::JobPayload;
use crate::job::journal::{Loaded, Record};
use crate::job::state::State;
use crate::job::{self, JobHandle, Parts, Runner};
use crate::supply::{Machine, overlay_id};
use crate::telemetry::chain;
use crate::vm::{VmError, VmId};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often orphans are looked for.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// What the journal held.
#[derive(Default)]
pub struct Adopted {
    /// Jobs that go on.
    pub jobs: Vec<JobHandle>,
    /// VMs of records that nobody can serve now: they are left alone.
    pub kept: BTreeSet<VmId>,
}

/// Turns the journal into jobs that go on. The hypervisor need not be reachable.
///
/// `runner_of` says who speaks for a record: its verdict belongs to the GitLab that it came from,
/// also if its runner is no longer configured. What machine the job gets stands in the record; only where it does not
/// the runner's class says so, which then is the one that the record names.
pub async fn adopt_all(
    parts: &Parts,
    loaded: Loaded,
    capacity: &Capacity,
    runner_of: &(dyn Fn(&Record) -> Option<Arc<Runner>> + Send + Sync),
) -> Adopted {
    let Loaded { records, aside } = loaded;
    for damaged in aside {
        tracing::error!(path = %damaged.path.display(), reason = damaged.reason, "a damaged record was set aside; its job will fail at GitLab as stuck");
    }
    // All addresses are taken before any job runs, or a new machine could be given one of them.
    for machine in records.iter().filter_map(|r| r.machine.as_ref()) {
        parts.supply.adopt(machine);
    }
    let mut adopted = Adopted::default();
    for record in records {
        let Some(runner) = runner_of(&record) else {
            tracing::error!(key = %record.key, gitlab = %record.gitlab, "no configured runner speaks to this job's GitLab any more; its record is kept");
            adopted.kept.extend(record.machine.map(|m| m.id));
            continue;
        };
        let payload = match parts.journal.payload(&record.key).await {
            Ok(raw) => job_payload(raw, &record),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(key = %record.key, error = chain(&error), "read a job's payload");
                }
                None
            }
        };
        let record = newest(record, payload.as_ref());
        tracing::info!(key = %record.key, state = record.state.word(), "a job of before goes on");
        let reservation = capacity.adopt(&record.key.runner, record.resources).into();
        adopted.jobs.push(job::adopt(parts, runner, record, payload, reservation).await);
    }
    adopted
}

/// A crash may have come between a newer payload of a job that had not started, and its record
/// (threats.md G17): the payload is GitLab's newest word.
fn newest(record: Record, payload: Option<&JobPayload>) -> Record {
    match payload {
        Some(payload)
            if record.guest_base.is_none() && matches!(record.state, State::Accepted | State::Booting { .. }) =>
        {
            Record { job_token: payload.token.clone(), ..record }
        }
        _ => record,
    }
}

fn job_payload(raw: bytes::Bytes, record: &Record) -> Option<JobPayload> {
    match JobPayload::parse(raw, None) {
        Ok(payload) => Some(payload),
        Err(error) => {
            tracing::error!(key = %record.key, error = chain(&error), "parse a kept payload");
            None
        }
    }
}

/// Something of ours that is of no job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Whose name it carries.
    pub id: VmId,
    /// There is a VM; else only its disk.
    pub is_vm: bool,
}

/// What carries our installation id and is of no job. `owned` is asked after the lists are in, or a
/// machine made meanwhile would look like an orphan.
///
/// # Errors
/// The hypervisor's; nothing is lost by trying again.
pub async fn orphans(
    parts: &Parts,
    owned: &(dyn Fn() -> BTreeSet<VmId> + Send + Sync),
) -> Result<Vec<Orphan>, VmError> {
    let supply = &parts.supply;
    let setup = supply.setup();
    // VMs are listed before the overlays: one that is being made has its overlay first.
    let vms = supply.list().await?;
    let vms: BTreeSet<VmId> = vms.into_iter().map(|vm| vm.name.id().clone()).collect();
    let overlays = supply.host().disks.list(&setup.overlay_dir).await?;
    let overlays = overlays.iter().filter_map(|path| overlay_id(path));
    let all: BTreeSet<VmId> = overlays.chain(vms.iter().cloned()).collect();
    let owned = owned();
    let driven = supply.driven();
    let orphans = all.into_iter().filter(|id| !owned.contains(id) && !driven.contains(id));
    Ok(orphans.map(|id| Orphan { is_vm: vms.contains(&id), id }).collect())
}

/// Begins to take an orphan down.
#[must_use]
pub fn reap(parts: &Parts, orphan: &Orphan) -> Machine {
    tracing::warn!(vm = %orphan.id, "a VM or overlay of ours belongs to no job; taking it down");
    parts.supply.reap_orphan(orphan.id.clone())
}
