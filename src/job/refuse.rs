//! Ends a job at GitLab that was assigned, but will never have a record here.
//!
//! Its 201 could not be read to its end, or the journal did not take it. Without a word GitLab
//! would show it as running until its own worker gives it up, up to an hour later (threats.md G6,
//! H6). Best effort: what is known of the job is its id and token, and nothing of it survives us.

use super::journal::{LastLines, Record};
use super::lines;
use super::state::{Event, State};
use super::{END_PATIENCE, Parts, REWRITE_PAUSE, Runner, forget};
use crate::gitlab::{GitlabError, JobClient, JobId, JobUpdate, Verdict};
use crate::retry::Backoff;
use crate::secret::Secret;
use crate::telemetry::chain;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

/// How long GitLab is tried to be told: after an hour without a word it fails the job itself.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How long a GitLab is asked again that is still storing the few bytes of trace; it waits for 5 min itself.
const STORING: Duration = Duration::from_secs(600);

/// Why the job is not run; chooses the author's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its payload makes no sense, or broke off.
    Unreadable,
    /// The journal did not take it.
    NotKept,
    /// A job of this id is being ended here, and that takes too long.
    GivenTwice,
    /// Its task died of a bug of ours, and the one after it as well.
    Bug,
}

/// Ends a job of which nothing works here any more: GitLab is told its verdict, if it had one, else
/// that it has failed; its machine is taken down and its record removed. What fails of this is left
/// to the next start of the daemon.
pub async fn give_up(parts: &Parts, runner: &Runner, mut record: Record) {
    let (id, token) = (record.key.id, record.job_token.clone());
    let told = match &record.state {
        State::Releasing { verdict: None, .. } | State::Releasing { delivered: true, .. } | State::Ended => true,
        State::Releasing { verdict: Some(verdict), .. } => {
            let client = JobClient::new(runner.transport.clone(), id, token, parts.rng.clone());
            let update = JobUpdate { verdict: Some(verdict.clone()), trace: None };
            insist(parts, id, &client, &Saying::Verdict(update)).await
        }
        _ => {
            // Written down first: the next daemon must not begin a job that GitLab was told has failed.
            (record.state, _) = record.state.on(Event::Panicked);
            write_down(parts, &record).await;
            refuse(parts, runner, id, token, Refusal::Bug).await
        }
    };
    if let Some(machine) = record.machine {
        let mut machine = parts.supply.reap(machine);
        machine.release();
        while machine.event().await.is_some() {}
    }
    if told {
        forget(parts, &record.key).await;
    } else {
        tracing::error!(job = %id, "its record is kept for the next start");
    }
}

/// Ends a job that the journal has taken, but nothing more of it the disk. Before GitLab hears of it, that and the
/// author's line are written down: the next daemon must not begin a job that GitLab was told has failed, and says the
/// same should GitLab not have heard all of it from this one.
pub(super) async fn refuse_kept(parts: &Parts, runner: &Runner, mut record: Record, why: Refusal) {
    let (id, token) = (record.key.id, record.job_token.clone());
    let text = lines::refusal(parts.clock.now(), why, id.0);
    let spool = parts.files.length(&parts.journal.spool_path(&record.key)).await;
    record.last_lines = Some(LastLines { offset: spool.ok().flatten().unwrap_or(0), text: text.clone() });
    (record.state, _) = record.state.on(Event::HostDiskFailed);
    write_down(parts, &record).await;
    let client = JobClient::new(runner.transport.clone(), id, token, parts.rng.clone());
    insist(parts, id, &client, &Saying::Refusal(Bytes::from(text))).await;
    forget(parts, &record.key).await;
}

/// In a task of its own: what made the job's task panic may be here, too, and GitLab is told all the same; as it is if
/// the disk takes the record at no time of [`END_PATIENCE`].
async fn write_down(parts: &Parts, record: &Record) {
    let id = record.key.id;
    let since = Instant::now();
    loop {
        let (journal, record) = (parts.journal.clone(), record.clone());
        #[expect(clippy::disallowed_methods, reason = "joined on the next line")]
        let put = tokio::spawn(async move { journal.put(&record).await });
        match put.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!(job = %id, error = chain(&error), "write down that the job has failed"),
            Err(_) => return tracing::error!(job = %id, "writing down that the job has failed panicked"),
        }
        if since.elapsed() + REWRITE_PAUSE > END_PATIENCE {
            return;
        }
        tokio::time::sleep(REWRITE_PAUSE).await;
    }
}

/// Tells GitLab and the author. `false`: GitLab could not be told.
pub async fn refuse(parts: &Parts, runner: &Runner, id: JobId, token: Secret, why: Refusal) -> bool {
    let client = JobClient::new(runner.transport.clone(), id, token, parts.rng.clone());
    let text = Bytes::from(lines::refusal(parts.clock.now(), why, id.0));
    insist(parts, id, &client, &Saying::Refusal(text)).await
}

/// What GitLab is to hear.
enum Saying {
    /// The author's line, and the failure.
    Refusal(Bytes),
    /// A verdict that was known.
    Verdict(JobUpdate),
}

/// Tries, when GitLab wishes and not before. `false`: in vain.
async fn insist(parts: &Parts, id: JobId, client: &JobClient, saying: &Saying) -> bool {
    let mut backoff = Backoff::uploader();
    let (since, mut told) = (Instant::now(), Told::default());
    while since.elapsed() < PATIENCE {
        let said = match saying {
            Saying::Refusal(text) => tell(client, text, &mut told).await,
            Saying::Verdict(update) => deliver(client, update).await,
        };
        match said {
            Ok(true) => return true,
            // What GitLab has of the trace is not what it should have; it is looked at again.
            Ok(false) => tokio::time::sleep(backoff.next(&parts.rng)).await,
            Err(error) => {
                tracing::warn!(job = %id, error = chain(&error), "tell GitLab that a job is not run");
                tokio::time::sleep(backoff.next_told(&parts.rng, error.retry_after())).await;
            }
        }
    }
    tracing::error!(job = %id, "GitLab does not know that this job is not run; it will fail it as stuck");
    false
}

/// What GitLab may have of a line. It may lose some of it afterwards.
#[derive(Default)]
struct Told {
    /// It was sent, and the answer may have been lost.
    tried: bool,
    /// Where it begins in GitLab's trace, once that is known.
    begins: Option<u64>,
}

async fn tell(client: &JobClient, text: &Bytes, told: &mut Told) -> Result<bool, GitlabError> {
    let (at, length) = (told.begins.unwrap_or(0), text.len() as u64);
    let again = std::mem::replace(&mut told.tried, true);
    let answer = client.append_trace(at, text.clone(), false).await?;
    let (from, had) = match (answer.continue_at, told.begins) {
        (None, _) => (at, length),
        (Some(held), Some(begins)) if held >= begins => (begins, (held - begins).min(length)),
        // The first try came through in part, or wholly.
        (Some(held), None) if again && held <= length => (0, held),
        // GitLab has a trace of this job from before, or less of it than it had.
        (Some(held), _) => (held, 0),
    };
    told.begins = Some(from);
    if had < length {
        let rest = text.slice(usize::try_from(had).unwrap_or(0)..);
        if client.append_trace(from + had, rest, false).await?.continue_at.is_some() {
            return Ok(false);
        }
    }
    let verdict = Verdict { success: false, failure_reason: Some("runner_system_failure".to_owned()), exit_code: None };
    let trace = (from == 0).then(|| (crc32fast::hash(text), length));
    let update = JobUpdate { verdict: Some(verdict), trace };
    deliver(client, &update).await
}

/// `false`: GitLab wants the trace again.
async fn deliver(client: &JobClient, update: &JobUpdate) -> Result<bool, GitlabError> {
    let since = Instant::now();
    loop {
        let answer = client.update_job(update).await?;
        match answer.ask_again {
            // 202: the verdict is noted, and counts only once it has been asked for again.
            Some(pause) if since.elapsed() < STORING => tokio::time::sleep(pause).await,
            _ => return Ok(!answer.resend_trace),
        }
    }
}
