//! How a job's task begins: for a new job, for one that is not run, for one of a former daemon, for one whose task has
//! panicked.

use super::commands::HAS_ITS_JOB;
use super::{Begun, run};
use crate::capacity::{Held, Reservation, Resources};
use crate::failpoint::{Point, reached};
use crate::gitlab::{JobId, JobPayload, JobStatus};
use crate::job::journal::{JobKey, RECORD_VERSION, Record};
use crate::job::keeper::Kept;
use crate::job::machinery::age;
use crate::job::past::{Looks, machine_was};
use crate::job::resolve::{Refusal, Unresolved, resolve, resolve_late, room};
use crate::job::state::{Event, Failure, State};
use crate::job::{INBOX_MAX, JobHandle, JobView, Parts, Runner};
use crate::secret::Secret;
use crate::telemetry::chain;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::Instrument as _;

/// Journals a job that GitLab has just assigned, and starts its task. A job that the journal does not take is not run:
/// its task tells GitLab.
pub async fn accept(
    parts: &Parts,
    runner: Arc<Runner>,
    payload: JobPayload,
    mut reservation: Reservation,
) -> JobHandle {
    let (machine_spec, image) = match resolve(parts, &runner, &payload).await {
        Ok(spec) => {
            reservation.shrink(room(reservation.resources(), &runner.class, &spec));
            (Some(spec), None)
        }
        Err(Unresolved::Image { name, error }) => {
            tracing::error!(image = name, error = chain(&error), "the job's image cannot be used");
            (None, Some(name))
        }
        Err(Unresolved::Refused(refusal)) => return refuse(parts, runner, payload, refusal),
    };
    let record = Record { machine_spec, resources: reservation.resources(), ..of_payload(parts, &runner, &payload) };
    reached(Point::K3);
    let (kept, reservation, first) = match parts.journal.accept(&record, payload.raw().clone()).await {
        Ok(()) => {
            reached(Point::K4);
            let window = payload.read_at.elapsed();
            parts.metrics.job().journal.observe(window.as_secs_f64());
            tracing::info!(key = %record.key, journal_ms = window.as_secs_f64() * 1000.0, "the job is in the journal");
            (Kept::There, reservation.into(), Event::Started)
        }
        Err(error) => {
            tracing::error!(key = %record.key, error = chain(&error), "write an assigned job down; it is not started");
            parts.metrics.job().lost.inc();
            (Kept::New, Held::default(), Event::Refused(Failure::NotKept))
        }
    };
    let parts = parts.clone();
    start(Begun { parts, runner, record, kept, payload: Some(payload), reservation, first, refused: None, image })
}

/// Starts the task of a job that is not run, as its author asks for what it may not have, or a rule denies it.
fn refuse(parts: &Parts, runner: Arc<Runner>, payload: JobPayload, refusal: Refusal) -> JobHandle {
    let record = of_payload(parts, &runner, &payload);
    tracing::info!(key = %record.key, failure = refusal.failure.words(), "the job is refused");
    let (parts, reservation, first) = (parts.clone(), Held::default(), Event::Refused(refusal.failure));
    let (payload, refused) = (Some(payload), Some(refusal.why));
    start(Begun { parts, runner, record, kept: Kept::New, payload, reservation, first, refused, image: None })
}

/// Starts the task of a job of which no more than id and token is known: it is not run, and GitLab is told.
#[must_use]
pub fn refuse_unread(parts: &Parts, runner: Arc<Runner>, id: JobId, token: Secret) -> JobHandle {
    let record = of_token(parts, &runner, id, token);
    start(Begun::ending(parts, runner, record, Kept::New, Held::default(), Event::Refused(Failure::Unreadable)))
}

/// Starts the task of a job that is not run because the one of the same id is being ended here: it has the record of
/// that id, and its place in the list of jobs.
#[must_use]
pub fn refuse_second(parts: &Parts, runner: Arc<Runner>, payload: &JobPayload) -> JobHandle {
    let record = of_payload(parts, &runner, payload);
    start(Begun::ending(parts, runner, record, Kept::Nothing, Held::default(), Event::Refused(Failure::GivenTwice)))
}

/// Goes on with a job of a former daemon. `payload` is `None` if it did not survive.
pub async fn adopt(
    parts: &Parts,
    runner: Arc<Runner>,
    record: Record,
    payload: Option<JobPayload>,
    reservation: Held,
) -> JobHandle {
    let (record, refusal) = resolve_late(parts, &runner, record, payload.as_ref()).await;
    let first = refusal.as_ref().map_or(Event::Started, |refusal| Event::Refused(refusal.failure));
    let (parts, kept, refused) = (parts.clone(), Kept::There, refusal.map(|refusal| refusal.why));
    start(Begun { parts, runner, record, kept, payload, reservation, first, refused, image: None })
}

/// Goes on with a job whose task has panicked: it fails, unless its verdict was known.
#[must_use]
pub fn begin_anew(parts: &Parts, runner: Arc<Runner>, record: Record, reservation: Held) -> JobHandle {
    start(Begun::ending(parts, runner, record, Kept::There, reservation, Event::Panicked))
}

/// Ends a job whose task has panicked twice: with its verdict, if that was known, else it fails. What may have been the
/// cause of that, its file on disk, is left alone.
#[must_use]
pub fn give_up(parts: &Parts, runner: Arc<Runner>, record: Record, reservation: Held) -> JobHandle {
    start(Begun::ending(parts, runner, record, Kept::Suspect, reservation, Event::Refused(Failure::BugTwice)))
}

impl Begun {
    /// A job that ends by its first event, for which nothing of its payload is needed.
    fn ending(parts: &Parts, runner: Arc<Runner>, record: Record, kept: Kept, reservation: Held, first: Event) -> Self {
        let parts = parts.clone();
        Self { parts, runner, record, kept, payload: None, reservation, first, refused: None, image: None }
    }
}

/// The first record of a job, without its machine and what is reserved for that.
fn of_payload(parts: &Parts, runner: &Runner, payload: &JobPayload) -> Record {
    Record {
        timeout_s: payload.timeout.map(|t| t.as_secs()),
        name: payload.name.clone(),
        project: payload.project.clone(),
        debug_trace: payload.debug_trace,
        trace_sections: payload.trace_sections,
        knows_interrupted: payload.failure_reasons.iter().any(|r| r == "runner_interrupted"),
        ..of_token(parts, runner, payload.id, payload.token.clone())
    }
}

/// The same of a job whose payload is not known.
fn of_token(parts: &Parts, runner: &Runner, id: JobId, token: Secret) -> Record {
    Record {
        version: RECORD_VERSION,
        installation: Some(parts.supply.setup().installation.clone()),
        key: JobKey { runner: runner.config.name.clone(), id },
        gitlab: runner.config.url.clone(),
        job_token: token,
        received: parts.clock.now(),
        received_uptime_ms: u64::try_from(parts.clock.uptime().as_millis()).ok(),
        timeout_s: None,
        name: String::new(),
        project: String::new(),
        debug_trace: false,
        trace_sections: false,
        knows_interrupted: false,
        class: runner.class.name.clone(),
        machine_spec: None,
        resources: Resources::default(),
        machine: None,
        guest_base: None,
        newer_token: None,
        last_lines: None,
        reached: Vec::new(),
        state: State::Accepted,
    }
}

fn start(begun: Begun) -> JobHandle {
    let (record, reservation) = (&begun.record, begun.reservation.clone());
    let key = record.key.clone();
    let (inbox, inbox_in) = mpsc::channel(INBOX_MAX);
    let (view_out, view) = watch::channel(JobView {
        key: key.clone(),
        name: record.name.clone(),
        project: record.project.clone(),
        state: record.state.word(),
        phase: match &record.state {
            State::Running { .. } => HAS_ITS_JOB.to_owned(),
            _ => String::new(),
        },
        vm: record.machine.as_ref().map(|m| m.id.to_string()),
        received: record.received,
        since: Instant::now(),
        age_before: age(&begun.parts, record),
        class: record.class.clone(),
        machine: machine_was(record),
        steps: Vec::new(),
        gitlab: JobStatus::Running,
    });
    let console = Looks::default();
    // Not known of a job that could not be read.
    let project = Some(record.project.as_str()).filter(|project| !project.is_empty());
    let span = tracing::info_span!("job", runner = %key.runner, job = %key.id, project);
    let run = run(begun, inbox_in, view_out, console.clone()).instrument(span);
    #[expect(clippy::disallowed_methods, reason = "joined by daemon through the handle")]
    let task = tokio::spawn(run);
    JobHandle { key, inbox, view, console, task, reservation }
}
