//! Ends a job at GitLab that was assigned, but will never have a record here.
//!
//! Its 201 could not be read to its end, or the journal did not take it. Without a word GitLab
//! would show it as running until its own worker gives it up, up to an hour later (safety.md G6,
//! H6). Best effort: what is known of the job is its id and token, and nothing of it survives us.

use super::lines;
use super::{Parts, Runner};
use crate::gitlab::{GitlabError, JobClient, JobId, JobUpdate, Verdict};
use crate::retry::Backoff;
use crate::secret::Secret;
use crate::telemetry::chain;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

/// Calls made for each part; with their pauses about half a minute.
const TRIES: u32 = 5;

/// How long a GitLab is asked again that is still storing the few bytes of trace; it waits for 5 min itself.
const STORING: Duration = Duration::from_secs(600);

/// Why the job is not run; chooses the author's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its payload makes no sense, or broke off.
    Unreadable,
    /// The journal did not take it.
    NotKept,
}

/// Tells GitLab and the author.
pub async fn refuse(parts: &Parts, runner: &Runner, id: JobId, token: Secret, why: Refusal) {
    let client = JobClient::new(runner.transport.clone(), id, token, parts.rng.clone());
    let text = Bytes::from(lines::refusal(parts.clock.now(), why, id.0));
    let mut backoff = Backoff::uploader();
    for _ in 0..TRIES {
        match tell(&client, &text).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(job = %id, error = chain(&error), "tell GitLab that a job is not run");
                tokio::time::sleep(backoff.next(&parts.rng)).await;
            }
        }
    }
    tracing::error!(job = %id, "GitLab does not know that this job is not run; it will fail it as stuck");
}

async fn tell(client: &JobClient, text: &Bytes) -> Result<(), GitlabError> {
    // A piece that GitLab has already is answered with a success or a 416, and either will do.
    client.append_trace(0, text.clone(), false).await?;
    let verdict = Verdict { success: false, failure_reason: Some("runner_system_failure".to_owned()), exit_code: None };
    let update = JobUpdate { verdict: Some(verdict), trace: Some((crc32fast::hash(text), text.len() as u64)) };
    let since = Instant::now();
    // 202: the verdict is noted, and counts only once it has been asked for again (safety.md R8).
    while let Some(pause) = client.update_job(&update).await?.ask_again.filter(|_| since.elapsed() < STORING) {
        tokio::time::sleep(pause).await;
    }
    Ok(())
}
