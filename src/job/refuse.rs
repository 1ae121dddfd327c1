//! A job that was assigned and cannot be begun: GitLab is told so at once, with a line for the
//! author, instead of leaving it to fail the job as stuck in an hour.

use super::lines;
use crate::clock::Clock;
use crate::gitlab::{JobClient, JobStatus, JobUpdate, Verdict};
use crate::retry::Backoff;
use crate::rng::Rng;
use crate::telemetry::chain;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

/// How long GitLab is tried; after that it fails the job by itself.
const PATIENCE: Duration = Duration::from_secs(600);

/// Tells GitLab that `client`'s job has failed and why, until it has heard it or 10 min are over.
/// `why` continues the words "dayfly: ".
///
/// # Cancel safety
/// Dropping it may leave the line without the verdict, or nothing at all.
pub async fn refuse(client: &JobClient, why: &str, clock: &Clock, rng: &Rng) {
    let line = Bytes::from(lines::note(clock.now(), &format!("\x1b[31;1mdayfly: {why}\x1b[0;m")));
    let verdict = Verdict { success: false, failure_reason: Some("runner_system_failure".to_owned()), exit_code: None };
    let trace = Some((crc32fast::hash(&line), line.len() as u64));
    let since = Instant::now();
    let mut backoff = Backoff::uploader();
    let mut told = false;
    while since.elapsed() < PATIENCE {
        // A 416 means that the line is there: its answer was lost.
        let result = async {
            if !told {
                let answer = client.append_trace(0, line.clone(), false).await?;
                if answer.status == JobStatus::Over {
                    return Ok(true);
                }
            }
            told = true;
            let answer = client.update_job(&JobUpdate { verdict: Some(verdict.clone()), trace }).await?;
            Ok::<bool, crate::gitlab::GitlabError>(answer.ask_again.is_none() || answer.status == JobStatus::Over)
        };
        match result.await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!(error = chain(&error), "tell GitLab that a job cannot be begun; trying again"),
        }
        tokio::time::sleep(backoff.next(rng)).await;
    }
    tracing::error!("GitLab could not be told that a job cannot be begun");
}
