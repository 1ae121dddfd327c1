//! Planned misbehaviour: which request goes wrong, and how.
//!
//! A rule names a route and a number among its requests. In the process a cut connection is a
//! transport error, on a socket the connection really ends.

use super::history::Recorded;
use super::routes::Route;
use bytes::Bytes;
use dayfly::gitlab::JobId;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How a request goes wrong.
#[derive(Clone)]
pub enum Fault {
    /// This answer at once, the body unread, nothing applied.
    Status {
        /// Status.
        code: u16,
        /// Headers.
        headers: Vec<(String, String)>,
        /// Body.
        body: Bytes,
    },
    /// The connection is cut, the body unread, nothing applied.
    DropBeforeApply,
    /// This much of the body is read, then the connection is cut; nothing is applied.
    DropInBody(u64),
    /// Everything is applied, then the connection is cut without an answer.
    ApplyThenDrop,
    /// The request waits this long, then goes on (other faults too).
    Delay(Duration),
    /// Everything is applied, and the answer waits this long.
    DelayAnswer(Duration),
    /// The answer's body breaks off after this many bytes.
    TruncateBody(u64),
    /// The answer's body comes in pieces of this size, a pause before each.
    DribbleBody {
        /// Bytes of a piece.
        piece: usize,
        /// Pause before each.
        every: Duration,
    },
    /// Applied, but the answer carries these headers too (or instead of those of the same name).
    AnswerHeaders(Vec<(String, String)>),
    /// Applied, but the answer's body is this one.
    ReplaceBody(Bytes),
    /// No answer, ever.
    Silence,
}

impl Fault {
    /// A status with an empty body.
    #[must_use]
    pub fn status(code: u16) -> Self {
        Self::Status { code, headers: Vec::new(), body: Bytes::new() }
    }

    /// A status with headers and an empty body.
    #[must_use]
    pub fn status_with(code: u16, headers: &[(&str, &str)]) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self::Status { code, headers, body: Bytes::new() }
    }

    /// The error page of a front proxy.
    #[must_use]
    pub fn html(code: u16) -> Self {
        let headers = vec![("Content-Type".to_owned(), "text/html".to_owned())];
        Self::Status {
            code,
            headers,
            body: Bytes::from_static(b"<html><body><h1>GitLab is not responding</h1></body></html>"),
        }
    }
}

/// Which requests a fault meets.
#[derive(Clone, Copy, Debug)]
pub struct Matcher {
    route: Option<Route>,
    job: Option<JobId>,
    skip: u64,
    times: u64,
}

impl Matcher {
    /// The next request of this route.
    #[must_use]
    pub fn on(route: Route) -> Self {
        Self { route: Some(route), ..Self::any() }
    }

    /// The next request of any route.
    #[must_use]
    pub fn any() -> Self {
        Self { route: None, job: None, skip: 0, times: 1 }
    }

    /// Only requests of this job.
    #[must_use]
    pub fn of_job(mut self, job: JobId) -> Self {
        self.job = Some(job);
        self
    }

    /// Lets this many matching requests pass first.
    #[must_use]
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// Meets this many requests.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// Meets every request from then on.
    #[must_use]
    pub fn always(self) -> Self {
        self.times(u64::MAX)
    }
}

/// Looks at a request and says how it goes wrong; empty: not at all.
pub type Hook = Arc<dyn Fn(&Recorded) -> Vec<Fault> + Send + Sync>;

/// The plan.
#[derive(Default)]
pub(super) struct Script {
    rules: Vec<(Matcher, Fault)>,
    hook: Option<Hook>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rules", self.rules.len())
    }
}

impl Script {
    pub(super) fn push(&mut self, matcher: Matcher, fault: Fault) {
        self.rules.push((matcher, fault));
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn set_hook(&mut self, hook: Hook) {
        self.hook = Some(hook);
    }

    /// The faults of this request, in the order of the rules. Delays add up; the first fault of
    /// another kind ends the list.
    pub(super) fn take(&mut self, request: &Recorded) -> Vec<Fault> {
        let mut faults = self.hook.as_ref().map(|hook| hook(request)).unwrap_or_default();
        let mut done = faults.iter().any(|fault| !matches!(fault, Fault::Delay(_)));
        for (matcher, fault) in &mut self.rules {
            let matches = matcher.route.is_none_or(|route| route == request.route)
                && matcher.job.is_none_or(|job| Some(job) == request.job);
            if !matches || matcher.times == 0 {
                continue;
            }
            if matcher.skip > 0 {
                matcher.skip -= 1;
                continue;
            }
            if done {
                continue;
            }
            if matcher.times != u64::MAX {
                matcher.times -= 1;
            }
            done = !matches!(fault, Fault::Delay(_));
            faults.push(fault.clone());
        }
        self.rules.retain(|(matcher, _)| matcher.times > 0);
        faults
    }
}
