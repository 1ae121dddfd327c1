//! How a job's task begins: for a new job, for one of a former daemon, for one whose task has panicked.

use super::{Begun, run};
use crate::capacity::{Held, Reservation};
use crate::failpoint::{Point, reached};
use crate::gitlab::JobPayload;
use crate::job::journal::{JobKey, RECORD_VERSION, Record};
use crate::job::resolve::{resolve, room};
use crate::job::state::{Event, State};
use crate::job::{INBOX_MAX, JobHandle, JobView, Parts, Runner};
use crate::telemetry::chain;
use std::io;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::Instrument as _;

/// Journals a job that GitLab has just assigned, and starts its task.
///
/// # Errors
/// The journal's: nothing has been started then, and GitLab will fail the job as stuck.
pub async fn accept(
    parts: &Parts,
    runner: Arc<Runner>,
    payload: JobPayload,
    mut reservation: Reservation,
) -> io::Result<JobHandle> {
    let machine_spec = match resolve(parts, &runner, &payload).await {
        Ok(spec) => {
            reservation.shrink(room(reservation.resources(), &runner.class, &spec));
            Some(spec)
        }
        Err(error) => {
            tracing::error!(image = runner.class.image, error = chain(&error), "the job's image cannot be used");
            None
        }
    };
    let record = Record {
        version: RECORD_VERSION,
        installation: Some(parts.supply.place().installation.clone()),
        key: JobKey { runner: runner.config.name.clone(), id: payload.id },
        gitlab: runner.config.url.clone(),
        job_token: payload.token.clone(),
        received: parts.clock.now(),
        received_uptime_ms: u64::try_from(parts.clock.uptime().as_millis()).ok(),
        timeout_s: payload.timeout.map(|t| t.as_secs()),
        name: payload.name.clone(),
        project: payload.project.clone(),
        debug_trace: payload.debug_trace,
        trace_sections: payload.trace_sections,
        knows_interrupted: payload.failure_reasons.iter().any(|r| r == "runner_interrupted"),
        class: runner.class.name.clone(),
        machine_spec,
        resources: reservation.resources(),
        machine: None,
        guest_base: None,
        newer_token: None,
        last_lines: None,
        state: State::Accepted,
    };
    reached(Point::K3);
    parts.journal.accept(&record, payload.raw().clone()).await?;
    reached(Point::K4);
    Ok(start(parts.clone(), runner, record, Some(payload), reservation.into(), Event::Started))
}

/// Goes on with a job of a former daemon. `payload` is `None` if it did not survive.
#[must_use]
pub fn adopt(
    parts: &Parts,
    runner: Arc<Runner>,
    record: Record,
    payload: Option<JobPayload>,
    reservation: Held,
) -> JobHandle {
    start(parts.clone(), runner, record, payload, reservation, Event::Started)
}

/// Goes on with a job whose task has panicked: it fails, unless its verdict was known.
#[must_use]
pub fn begin_anew(parts: &Parts, runner: Arc<Runner>, record: Record, reservation: Held) -> JobHandle {
    start(parts.clone(), runner, record, None, reservation, Event::Panicked)
}

fn start(
    parts: Parts,
    runner: Arc<Runner>,
    record: Record,
    payload: Option<JobPayload>,
    reservation: Held,
    first: Event,
) -> JobHandle {
    let key = record.key.clone();
    let (inbox, inbox_in) = mpsc::channel(INBOX_MAX);
    let (view_out, view) = watch::channel(JobView {
        key: key.clone(),
        name: record.name.clone(),
        project: record.project.clone(),
        state: record.state.word(),
        phase: String::new(),
        vm: record.machine.as_ref().map(|m| m.id.to_string()),
        since: Instant::now(),
    });
    let span = tracing::info_span!("job", runner = %key.runner, job = %key.id);
    let begun = Begun { parts, runner, record, payload, reservation: reservation.clone(), first };
    let run = run(begun, inbox_in, view_out).instrument(span);
    #[expect(clippy::disallowed_methods, reason = "joined by daemon through the handle")]
    let task = tokio::spawn(run);
    JobHandle { key, inbox, view, task, reservation }
}
