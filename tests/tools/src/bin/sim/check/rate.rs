//! 20: no retry storm: at most five attempts a second per endpoint, and none before the time that GitLab named.

use super::{Checker, Findings};
use crate::event::{DaemonDoes, Event};
use crate::ledger::{At, Ledger};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::Route;
use std::collections::BTreeMap;
use std::time::Duration;

const ATTEMPTS_MAX: usize = 5;
const SECOND: Duration = Duration::from_secs(1);
/// threats.md G4.
const REFUSED_PAUSE: Duration = Duration::from_secs(299);

#[derive(Default)]
pub(crate) struct Rate {
    recent: BTreeMap<(Route, Option<JobId>, String), Vec<At>>,
    /// By the token that was shown: when it was told that no request is to come before which time, and why.
    not_before: BTreeMap<String, (At, At, &'static str)>,
}

impl Checker for Rate {
    fn on(&mut self, event: &Event<'_>, ledger: &Ledger, findings: &mut Findings) {
        match event {
            Event::Daemon(DaemonDoes::Starts) => {
                self.recent.clear();
                // A new process does not know what the one before was told.
                self.not_before.clear();
            }
            Event::Request(request) => {
                let shown = shown(request);
                let key = (request.route, request.job, shown.clone());
                let recent = self.recent.entry(key).or_default();
                recent.retain(|at| *at + SECOND > ledger.now);
                recent.push(ledger.now);
                let transfer = matches!(request.route, Route::UploadArtifacts | Route::DownloadArtifacts);
                // A backlog of trace goes out as fast as it is taken; that is no retry.
                let backlog = request.route == Route::AppendTrace && request.body.len() >= 1 << 20;
                if recent.len() > ATTEMPTS_MAX && !transfer && !backlog {
                    let (route, count) = (request.route, recent.len());
                    findings.add(20, format!("{count} requests of {route:?} for job {:?} in a second", request.job));
                }
                // Nor does who takes up a job whose task has panicked.
                let panicked = request.job.and_then(|job| ledger.jobs.get(&job)?.panicked);
                if let Some((told_at, until, why)) = self.not_before.get(&shown)
                    && ledger.now + SECOND < *until
                    && panicked.is_none_or(|at| at < *told_at)
                    && !transfer
                {
                    let early = (*until - ledger.now).as_secs_f64();
                    findings.add(20, format!("a request of {:?} {early:.1} s before the time of {why}", request.route));
                }
            }
            // What went well was no attempt at something that fails.
            Event::Answer(answer) if !answer.faulted && answer.status.is_some_and(|status| status < 300) => {
                self.recent.remove(&(answer.route, answer.job, answer.shown.to_owned()));
            }
            Event::Answer(answer) if answer.faulted => {
                let told = match (answer.status, answer.route) {
                    (Some(429), _) => told(answer.headers).map(|told| (ledger.now, ledger.now + told, "a 429")),
                    (Some(401 | 403), Route::RequestJob) => {
                        Some((ledger.now, ledger.now + REFUSED_PAUSE, "a refused token"))
                    }
                    _ => None,
                };
                let transfer = matches!(answer.route, Route::UploadArtifacts | Route::DownloadArtifacts);
                if let Some(told) = told.filter(|_| !transfer) {
                    self.not_before.insert(answer.shown.to_owned(), told);
                }
            }
            _ => {}
        }
    }
}

fn shown(request: &crate::event::Request<'_>) -> String {
    let header = |name| request.headers.get(name).and_then(|value| value.to_str().ok());
    header("job-token").or_else(|| header("runner-token")).unwrap_or_default().to_owned()
}

fn told(headers: Option<&http::HeaderMap>) -> Option<Duration> {
    let headers = headers?;
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(seconds) = text("retry-after").and_then(|text| text.parse().ok()) {
        return Some(Duration::from_secs(seconds));
    }
    let date = |name| jiff::fmt::strtime::parse("%a, %d %b %Y %H:%M:%S GMT", text(name)?).ok()?.to_datetime().ok();
    Duration::try_from(date("ratelimit-resettime")?.duration_since(date("date")?)).ok()
}
