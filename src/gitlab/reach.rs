//! Does this GitLab answer, as GitLab does? Looks at every answer on its way to whoever asked.
//!
//! Polls, updates and traces of a runner entry go through one [`Watched`] transport. So an outage is seen as long as
//! anything at all is asked of GitLab, whatever else keeps pollers from asking, and it is told once: when it has lasted
//! for [`PATIENCE`], and when it is over. Forwarded calls are counted and say nothing here: what answers them may be an
//! object store.

use super::answers;
use super::transport::{Body, Call, Connection, Transport, TransportError};
use crate::BoxFuture;
use crate::metrics::GitlabMetrics;
use crate::telemetry::{chain, lasting};
use http::{Response, StatusCode};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A GitLab that is upgraded, or a proxy that loads its configuration anew, is away for some seconds: that is no news.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of a runner entry's GitLab. Clones share it.
#[derive(Clone)]
pub struct Reach(Arc<Shared>);

struct Shared {
    runner: String,
    gitlab: String,
    metrics: GitlabMetrics,
    /// Held for a few lines, never across an await.
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// When it last answered as GitLab does.
    answered: Option<Instant>,
    away: Option<Away>,
}

struct Away {
    since: Instant,
    how: How,
    why: String,
    told: bool,
}

/// How it does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Nothing comes, or something in between says that nothing comes.
    Silent,
    /// A page for people, or a redirect.
    Page,
    /// It wants fewer requests.
    Limits,
}

impl How {
    fn words(self) -> &'static str {
        match self {
            Self::Silent => "has not answered",
            Self::Page => "has answered with a page for people or a redirect",
            Self::Limits => "has limited our requests",
        }
    }
}

/// A GitLab that does not answer as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// For how long.
    pub lasts: Duration,
    /// `has not answered`, …
    pub what: &'static str,
    /// What came instead.
    pub why: String,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {}: {}", self.what, lasting(self.lasts), self.why)
    }
}

impl Reach {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(runner: &str, gitlab: &str, metrics: GitlabMetrics) -> Self {
        let (runner, gitlab) = (runner.to_owned(), gitlab.to_owned());
        Self(Arc::new(Shared { runner, gitlab, metrics, seen: Mutex::default() }))
    }

    /// The same transport, watched.
    #[must_use]
    pub fn watch(&self, transport: Arc<dyn Transport>) -> Arc<dyn Transport> {
        Arc::new(Watched { transport, reach: self.clone() })
    }

    /// When GitLab last answered.
    #[must_use]
    pub fn answered(&self) -> Option<Instant> {
        self.lock().answered
    }

    /// What keeps GitLab from answering now, from the first call on that was not answered.
    #[must_use]
    pub fn outage(&self) -> Option<Outage> {
        let seen = self.lock();
        let away = seen.away.as_ref()?;
        Some(Outage { lasts: away.since.elapsed(), what: away.how.words(), why: away.why.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saw(&self, result: &Result<Response<Body>, TransportError>, says_something: bool) {
        self.0.metrics.request(&self.0.runner, result.as_ref().ok().map(|answer| answer.status().as_u16()));
        if !says_something {
            return;
        }
        match not_gitlabs(result) {
            None => self.is_there(),
            Some((how, why)) => self.is_away(how, why),
        }
    }

    fn is_there(&self) {
        let mut seen = self.lock();
        seen.answered = Some(Instant::now());
        let Some(away) = seen.away.take().filter(|away| away.told) else { return };
        drop(seen);
        let Shared { runner, gitlab, .. } = &*self.0;
        tracing::info!(runner, gitlab, "GitLab answers again after {}", lasting(away.since.elapsed()));
    }

    fn is_away(&self, how: How, why: String) {
        let mut seen = self.lock();
        // Who has never reached it looks at the log now: it may be a wrong address.
        let patience = if seen.answered.is_some() { PATIENCE } else { Duration::ZERO };
        let now = Instant::now();
        let away = seen.away.get_or_insert_with(|| Away { since: now, how, why: String::new(), told: false });
        (away.how, away.why) = (how, why.clone());
        let lasts = now - away.since;
        if away.told || lasts < patience {
            return;
        }
        away.told = true;
        drop(seen);
        let (Shared { runner, gitlab, .. }, what) = (&*self.0, how.words());
        if lasts.is_zero() {
            tracing::warn!(runner, gitlab, why, "GitLab {what}");
        } else {
            tracing::warn!(runner, gitlab, why, "GitLab {what} for {}", lasting(lasts));
        }
    }
}

/// What is no answer of GitLab's own, in words for operators.
fn not_gitlabs(result: &Result<Response<Body>, TransportError>) -> Option<(How, String)> {
    let answer = match result {
        Ok(answer) => answer,
        Err(error) => {
            let remedy = error.explain().map(|remedy| format!("; {remedy}")).unwrap_or_default();
            return Some((How::Silent, format!("{}{remedy}", chain(error))));
        }
    };
    let status = answer.status();
    if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT {
        return Some((How::Silent, format!("status {}", status.as_u16())));
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        return Some((How::Limits, "status 429".to_owned()));
    }
    // 401 and 403 are told as what they are, whoever's page they come with.
    let refusal = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    if status.is_redirection() || answers::is_page(answer.headers()) && !refusal {
        let why = format!("status {}: look whether `url` is GitLab's own address", status.as_u16());
        return Some((How::Page, why));
    }
    None
}

struct Watched {
    transport: Arc<dyn Transport>,
    reach: Reach,
}

impl Transport for Watched {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response<Body>, TransportError>> {
        let reach = self.reach.clone();
        let says_something = call.connection == Connection::Shared;
        let answer = self.transport.call(call);
        Box::pin(async move {
            let result = answer.await;
            reach.saw(&result, says_something);
            result
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gitlab::transport::full;
    use crate::metrics::Metrics;

    fn answer(status: u16, content_type: &str) -> Result<Response<Body>, TransportError> {
        let mut answer = Response::new(full("x"));
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        answer.headers_mut().insert("content-type", content_type.parse().unwrap());
        Ok(answer)
    }

    fn reach() -> Reach {
        Reach::new("ci", "https://gitlab.example/", Metrics::new().gitlab().clone())
    }

    /// U19: what is no answer of GitLab's own is told from what is.
    #[test]
    fn an_answer_of_something_in_between_is_no_answer() {
        for (status, content_type, how) in [
            (204, "application/json", None),
            (404, "application/json", None),
            (403, "text/html", None),
            (500, "application/json", Some(How::Silent)),
            (502, "text/html", Some(How::Silent)),
            (429, "application/json", Some(How::Limits)),
            (302, "text/html", Some(How::Page)),
            (200, "text/html; charset=utf-8", Some(How::Page)),
        ] {
            let found = not_gitlabs(&answer(status, content_type)).map(|(how, _)| how);
            assert_eq!(found, how, "{status} {content_type}");
        }
        let timeout = Err(TransportError::Timeout(Duration::from_secs(5)));
        assert_eq!(not_gitlabs(&timeout).map(|(how, _)| how), Some(How::Silent));
    }

    /// U19: an outage begins with the first call that fails and ends with the first answer; a forwarded call says
    /// nothing of it.
    #[tokio::test(start_paused = true)]
    async fn an_outage_lasts_from_the_first_failure_to_the_first_answer() {
        let reach = reach();
        reach.saw(&answer(204, "application/json"), true);
        assert_eq!(reach.outage(), None);
        reach.saw(&answer(502, "text/html"), false);
        assert_eq!(reach.outage(), None, "an object store may have said that");
        reach.saw(&answer(502, "text/html"), true);
        tokio::time::sleep(Duration::from_secs(400)).await;
        reach.saw(&Err(TransportError::Timeout(Duration::from_secs(5))), true);
        let outage = reach.outage().unwrap();
        assert_eq!((outage.lasts.as_secs(), outage.what), (400, "has not answered"));
        assert!(outage.to_string().starts_with("has not answered for 6 min: no answer within"), "{outage}");
        assert_eq!(reach.answered().unwrap().elapsed().as_secs(), 400);
        reach.saw(&answer(201, "application/json"), true);
        assert_eq!((reach.outage(), reach.answered().unwrap().elapsed()), (None, Duration::ZERO));
    }
}
