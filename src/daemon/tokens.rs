//! Runner tokens that end: renewed before they do.
//!
//! GitLab may give a runner's token a time (`token_expires_at`); each verification tells it. A quarter of what was left
//! when this process first heard of it, at least an hour and at most a week, is kept as a margin: then GitLab is asked for
//! another token, which takes the place of the old one in file and memory. Only GitLab's answer ends the old one, and
//! nothing is asked before there is a place for the new one. What fails is tried again each minute, and said once.

use crate::clock::Clock;
use crate::gitlab::{GitlabError, Replacement, RunnerToken};
use crate::job::Runner;
use crate::metrics::Metrics;
use crate::telemetry::chain;
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(60);
/// The margin's bounds: some tries within an outage, and not a token a day.
const MARGIN_MIN: SignedDuration = SignedDuration::from_hours(1);
const MARGIN_MAX: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Keeps the tokens of these runners fresh.
pub(super) struct Tokens {
    clock: Clock,
    runners: watch::Receiver<Vec<Arc<Runner>>>,
    metrics: Metrics,
    known: BTreeMap<String, Known>,
}

/// What is known of one runner's token.
#[derive(Default)]
struct Known {
    /// When it ends, and when that was first heard.
    end: Option<(Timestamp, Timestamp)>,
    /// A new token that could not be written down yet.
    unwritten: Option<RunnerToken>,
    /// What was said last of what does not work.
    said: Option<String>,
}

impl Tokens {
    pub(super) fn new(clock: Clock, runners: watch::Receiver<Vec<Arc<Runner>>>, metrics: Metrics) -> Self {
        Self { clock, runners, metrics, known: BTreeMap::new() }
    }

    /// Until `stop`.
    pub(super) async fn keep_fresh(mut self, stop: CancellationToken) {
        let mut next = Instant::now() + LOOK;
        loop {
            tokio::select! {
                biased;
                // Both are cancel safe. A renewal itself is not cut: its answer is the only copy of a token (see `settled`).
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(next) => {}
            }
            next = Instant::now() + LOOK;
            let runners = self.runners.borrow_and_update().clone();
            for runner in runners {
                self.look(&runner).await;
            }
        }
    }

    async fn look(&mut self, runner: &Arc<Runner>) {
        let now = self.clock.now();
        let known = self.known.entry(runner.config.name.clone()).or_default();
        let outcome = if let Some(token) = known.unwritten.take() {
            let written = write(runner, &token).await;
            known.unwritten = written.is_err().then_some(token);
            written.map_err(|error| {
                format!("{error}; the token in use is nowhere else: make room for it there, and do not restart")
            })
        } else {
            let Some(end) = runner.api.token_expires_at() else { return };
            let (end, heard) = *known.end.insert(match known.end {
                Some((before, heard)) if before == end => (end, heard),
                _ => (end, now),
            });
            if now < due(end, heard) {
                return;
            }
            renew(runner, &mut known.unwritten).await.map_err(|why| format!("{why}; it ends at {end}"))
        };
        let name = &runner.config.name;
        match outcome {
            Ok(()) if known.unwritten.is_none() => {
                known.said = None;
                self.metrics.job().tokens_renewed.inc();
                let end = runner.api.token_expires_at().map(|end| end.to_string());
                tracing::info!(runner = name, ends = end, "the runner token was renewed");
            }
            Ok(()) => {}
            Err(error) => {
                if known.said.as_ref() != Some(&error) {
                    tracing::error!(runner = name, error, "the runner token is not renewed yet");
                    known.said = Some(error);
                }
            }
        }
    }
}

/// Waits for renewals that are under way: the daemon ends after them, or their tokens would be lost.
pub(super) async fn settled(runners: &[Arc<Runner>]) {
    for runner in runners {
        drop(runner.api.changing().await);
    }
}

/// When a token is renewed that ends then, and of which that was first heard then.
fn due(end: Timestamp, heard: Timestamp) -> Timestamp {
    let margin = (end.duration_since(heard) / 4).clamp(MARGIN_MIN, MARGIN_MAX);
    end.checked_sub(margin).unwrap_or(heard)
}

/// Has it made anew. What could not be written is left in `unwritten`.
async fn renew(runner: &Arc<Runner>, unwritten: &mut Option<RunnerToken>) -> Result<(), String> {
    let path = runner.config.token_file.clone();
    let place = blocking(move || Replacement::prepare(&path)).await;
    let place = place.map_err(|error| {
        format!("{error}; make its directory writable for the daemon's user, or renew it by hand: dayfly reset-token --name '{}'", runner.config.name)
    })?;
    // Calls that were refused meanwhile wait for its end, and go on with the new one.
    let changing = runner.api.changing().await;
    let fresh = runner.api.reset_token().await.map_err(|error| match error {
        GitlabError::Forbidden { .. } => {
            format!("{}; register anew: dayfly register --name '{}'", chain(&error), runner.config.name)
        }
        error => chain(&error),
    })?;
    runner.api.adopt(fresh.token.clone(), fresh.expires_at);
    let token = fresh.token.clone();
    let kept = blocking(move || place.commit(&token)).await;
    drop(changing);
    if let Err(error) = kept {
        *unwritten = Some(fresh.token);
        return Err(format!("{error}; the token in use is nowhere else: make room for it there, and do not restart"));
    }
    Ok(())
}

async fn write(runner: &Arc<Runner>, token: &RunnerToken) -> Result<(), String> {
    let (path, token) = (runner.config.token_file.clone(), token.clone());
    blocking(move || Replacement::prepare(&path)?.commit(&token)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::gitlab::TokenFileError> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await.map_err(io::Error::other) {
        Ok(done) => done.map_err(|error| chain(&error)),
        Err(error) => Err(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U18: between an hour and a week before its end, and a quarter of its time.
    #[test]
    fn a_token_is_renewed_in_time_for_its_length() {
        let heard: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let check = |hours: i64, before: i64| {
            let end = heard + SignedDuration::from_hours(hours);
            assert_eq!(due(end, heard), end - SignedDuration::from_hours(before), "{hours} h");
        };
        check(2, 1);
        check(24, 6);
        check(28 * 24, 7 * 24);
        check(365 * 24, 7 * 24);
        // At once.
        check(0, 1);
        check(-5, 1);
    }
}
