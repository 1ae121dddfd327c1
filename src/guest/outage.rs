//! GitLab fails while a guest's artifacts are on their way: when is the runner to come again?
//!
//! By itself the official runner gives a finished build up within seconds: 19.3 after three times five attempts, 17.5
//! after three (both six times after a 503). Since 18.3 it waits for as long as a `Retry-After` says, so the longer the
//! outage has lasted, the longer it is told to wait: eight minutes are bridged, or twenty if GitLab answers 503. Before
//! 18.3 it waits for nobody, so its answer waits: two minutes are bridged, or five if GitLab answers 503.

use http::StatusCode;
use http::header::{HeaderMap, USER_AGENT};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Longest wait that a runner is told: 19.3 would sleep for whatever it is told.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(60);
/// A moment of GitLab's costs no more than this.
const WAIT_MIN: Duration = Duration::from_secs(5);
/// The first version that waits as told after any answer that it tries again.
const OBEYS_SINCE: (u32, u32) = (18, 3);

/// Failures of one kind of call, in a row.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// The first of them. Held for a few lines, never across an await.
    since: Mutex<Option<Instant>>,
}

impl Outage {
    /// Notes how a call ended. After a failure of GitLab's that runners try again: how long to wait.
    pub(super) fn note(&self, status: StatusCode) -> Option<Duration> {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(status.as_u16(), 500 | 502..=504 | 512..) {
            *since = None;
            return None;
        }
        Some(since.get_or_insert_with(Instant::now).elapsed().clamp(WAIT_MIN, WAIT_MAX))
    }
}

/// Whether this runner comes again as soon as it likes, whatever it is told; by its name for itself.
pub(super) fn waits_for_nobody(headers: &HeaderMap) -> bool {
    let agent = headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    let version = || {
        let mut numbers = agent.strip_prefix("gitlab-runner ")?.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    version().is_some_and(|version: (u32, u32)| version < OBEYS_SINCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[tokio::test(start_paused = true)]
    async fn the_longer_an_outage_the_longer_the_wait() {
        let outage = Outage::default();
        let wait = |status: u16| outage.note(StatusCode::from_u16(status).unwrap()).map(|wait| wait.as_secs());
        assert_eq!([wait(201), wait(502), wait(503)], [None, Some(5), Some(5)]);
        for (after, expected) in [(4, 5), (16, 20), (20, 40), (20, 60), (3600, 60)] {
            tokio::time::advance(Duration::from_secs(after)).await;
            assert_eq!(wait(500), Some(expected), "{after} s later");
        }
        assert_eq!([wait(413), wait(504)], [None, Some(5)], "an answer ends it");
        assert_eq!([wait(520), wait(505), wait(501), wait(429)], [Some(5), None, None, None]);
    }

    #[test]
    fn an_old_runner_is_known_by_its_name() {
        for (agent, expected) in [
            ("gitlab-runner 17.5.0 (17-5-stable; go1.22.7; linux/amd64)", true),
            ("gitlab-runner 18.2.1 (18-2-stable; go1.24; linux/amd64)", true),
            ("gitlab-runner 18.3.0~beta.1 (x; go1.24; linux/amd64)", false),
            ("gitlab-runner 19.3.0 (19-3-stable; go1.25; linux/amd64)", false),
            ("gitlab-runner development version (HEAD; go1.25; linux/amd64)", false),
            ("gitlab-runner 99999999999.1", false),
            ("Go-http-client/1.1", false),
            ("gitlab-runner ", false),
        ] {
            let headers = HeaderMap::from_iter([(USER_AGENT, HeaderValue::from_static(agent))]);
            assert_eq!(waits_for_nobody(&headers), expected, "{agent}");
        }
        assert!(!waits_for_nobody(&HeaderMap::new()));
    }
}
