//! Rate limits: counted before anybody is authenticated, per token shown, in minutes.

use super::answer::Answer;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

const WINDOW: Duration = Duration::from_secs(60);

/// Counters, by limiter and token; entries last a minute.
#[derive(Default)]
pub(super) struct Throttle(BTreeMap<(&'static str, String), (Timestamp, u64)>);

impl Throttle {
    /// Counts one call; `Err` is the 429.
    pub(super) fn count(
        &mut self,
        limits: &BTreeMap<String, u64>,
        limiter: &'static str,
        token: Option<&str>,
        now: Timestamp,
    ) -> Result<(), Answer> {
        let Some(limit) = limits.get(limiter) else { return Ok(()) };
        self.0.retain(|_, (since, _)| super::model::age(*since, now) < WINDOW);
        let (_, calls) = self.0.entry((limiter, token.unwrap_or_default().to_owned())).or_insert((now, 0));
        *calls += 1;
        if *calls <= *limit {
            return Ok(());
        }
        let error = "This endpoint has been requested too many times. Try again later.";
        Err(Answer::json(StatusCode::TOO_MANY_REQUESTS, &json!({ "message": { "error": error } })))
    }
}
