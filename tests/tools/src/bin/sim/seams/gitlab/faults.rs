//! Which faults a request meets.

use super::{Gate, Head};
use crate::event::Trouble;
use crate::kinds::Kind as K;
use crate::ledger::Ledger;
use crate::story::Inner;
use bytes::Bytes;
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Fault, JobState, Route};
use std::time::Duration;

/// What is put on one request.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) faults: Vec<Fault>,
    pub(super) connect_fails: bool,
    /// A job that this poll is to be given a second time.
    pub(super) again: Option<JobId>,
}

impl Gate {
    /// Draws the faults of a request.
    pub(super) fn draw(&self, head: &Head) -> Plan {
        let now = self.standin.now();
        let mut plan = {
            let mut inner = self.story.inner();
            if inner.ledger.down.contains_key(&Trouble::Gitlab) {
                return outage(&mut inner);
            }
            let mut plan = Plan::default();
            match of_any(&mut inner, now) {
                Some(Any::ConnectFails) => plan.connect_fails = true,
                Some(Any::Fault(fault)) => plan.faults.push(fault),
                None => plan.faults.extend(of_route(&mut inner, head)),
            }
            plan
        };
        if plan.faults.is_empty() && !plan.connect_fails {
            self.meddle(head, &mut plan);
        }
        plan
    }

    /// What GitLab does to its own copy.
    fn meddle(&self, head: &Head, plan: &mut Plan) {
        match (head.route, head.job) {
            (Route::AppendTrace, Some(job)) => {
                if self.story.strikes(K::TraceReset) {
                    self.edit_trace(job, |trace, _| trace.clear());
                } else if self.story.strikes(K::TraceLostPart) {
                    self.edit_trace(job, |trace, dice| {
                        trace.truncate(usize::try_from(dice).unwrap_or(0) % (trace.len() + 1))
                    });
                } else if self.story.strikes(K::TraceAhead) {
                    if let Some(note) = self.story.inner().ledger.jobs.get_mut(&job) {
                        note.trace_spoilt = Some("GitLab was given bytes of somebody else");
                    }
                    self.edit_trace(job, |trace, _| trace.extend([b'?'; 3000]));
                }
            }
            (Route::RequestJob, _) => {
                let running = self.standin.read(|model| {
                    let runner = model.runners.values().find(|runner| runner.token.matches(&head.shown))?.id;
                    let queue_is_empty = !model.jobs.values().any(|job| job.queued);
                    let mine =
                        |job: &&dayfly_exec::standin::Job| job.state == JobState::Running && job.runner == Some(runner);
                    model.jobs.values().find(mine).map(|job| job.id).filter(|_| queue_is_empty)
                });
                let known =
                    |ledger: &Ledger, job: &JobId| ledger.jobs.get(job).is_some_and(|note| note.record.is_some());
                let running = running.filter(|job| known(&self.story.inner().ledger, job));
                if let Some(job) = running
                    && self.story.strikes(K::AssignedTwice)
                {
                    self.standin.edit(|model| {
                        if let Some(job) = model.jobs.get_mut(&job) {
                            (job.state, job.queued) = (JobState::Pending, true);
                        }
                        model.tick_queues(job);
                    });
                    plan.again = Some(job);
                }
            }
            _ => {}
        }
    }

    /// A job that was to be given again, and was not, runs on as before.
    pub(super) fn queue_again_or_not(&self, job: JobId) {
        self.standin.edit(|model| {
            if let Some(job) = model.jobs.get_mut(&job).filter(|job| job.state == JobState::Pending) {
                (job.state, job.queued) = (JobState::Running, false);
            }
        });
    }

    fn edit_trace(&self, job: JobId, edit: impl FnOnce(&mut Vec<u8>, u64)) {
        let dice = self.story.inner().dice().next();
        self.standin.edit(|model| {
            if let Some(job) = model.jobs.get_mut(&job).filter(|job| job.state.is_executing()) {
                edit(&mut job.trace.bytes, dice);
            }
        });
    }
}

/// GitLab is down, in one of its ways.
fn outage(inner: &mut Inner) -> Plan {
    let mut plan = Plan::default();
    match inner.dice().below(10) {
        0..5 => plan.faults.push(Fault::html(502)),
        5..7 => plan.connect_fails = true,
        7..9 => plan.faults.push(Fault::DropBeforeApply),
        _ => plan.faults.extend([Fault::Delay(Duration::from_secs(4)), Fault::status(504)]),
    }
    plan
}

enum Any {
    ConnectFails,
    Fault(Fault),
}

/// Faults that any call may meet.
fn of_any(inner: &mut Inner, now: jiff::Timestamp) -> Option<Any> {
    let fault = if inner.strikes(K::ConnectFails) {
        return Some(Any::ConnectFails);
    } else if inner.strikes(K::ServerError) {
        Fault::status(*inner.dice().pick(&[500, 502, 504]))
    } else if inner.strikes(K::HtmlError) {
        Fault::html(503)
    } else if inner.strikes(K::RateLimited) {
        let seconds = inner.dice().range(1, 40).to_string();
        Fault::status_with(429, &[("Retry-After", &seconds)])
    } else if inner.strikes(K::RateLimitedUntil) {
        let seconds = i64::try_from(inner.dice().range(1, 40)).unwrap_or(1);
        let date = |at: jiff::Timestamp| at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let until = now.saturating_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(now);
        Fault::status_with(429, &[("RateLimit-ResetTime", &date(until)), ("Date", &date(now))])
    } else if inner.strikes(K::BlackHole) {
        Fault::Silence
    } else if inner.strikes(K::SlowHead) {
        Fault::Delay(inner.dice().time(500, 70_000))
    } else if inner.strikes(K::SlowBody) {
        Fault::DribbleBody { piece: 100, every: Duration::from_secs(1) }
    } else if inner.strikes(K::LoginPage) {
        let headers = vec![("Content-Type".to_owned(), "text/html; charset=utf-8".to_owned())];
        Fault::Status { code: 200, headers, body: Bytes::from_static(b"<html><form>Sign in</form></html>") }
    } else if inner.strikes(K::Redirect) {
        let code = *inner.dice().pick(&[301, 302, 307, 308]);
        Fault::status_with(code, &[("Location", "https://elsewhere.example/api/v4/jobs/request")])
    } else {
        return None;
    };
    Some(Any::Fault(fault))
}

/// Faults that belong to a route.
fn of_route(inner: &mut Inner, head: &Head) -> Option<Fault> {
    let json = |code, body: &'static [u8]| Fault::Status {
        code,
        headers: vec![("Content-Type".to_owned(), "application/json".to_owned())],
        body: Bytes::from_static(body),
    };
    match head.route {
        Route::RequestJob => {
            if inner.strikes(K::Conflict) {
                return Some(Fault::status(409));
            }
            inner.strikes(K::RunnerRefused).then(|| Fault::status(*inner.dice().pick(&[401, 403])))
        }
        Route::AppendTrace => {
            if inner.strikes(K::NotFound) {
                return Some(Fault::status(404));
            }
            if inner.strikes(K::PatchLost) {
                let part = inner.dice().below(50);
                return Some(if part < 25 { Fault::DropBeforeApply } else { Fault::DropInBody(part) });
            }
            inner.strikes(K::PatchReplyLost).then_some(Fault::ApplyThenDrop)
        }
        Route::UpdateJob if head.is_final() => {
            if inner.strikes(K::FinalRefused) {
                return Some(Fault::status(412));
            }
            if inner.strikes(K::FinalLost) {
                return Some(Fault::DropBeforeApply);
            }
            inner.strikes(K::FinalReplyLost).then_some(Fault::ApplyThenDrop)
        }
        Route::UpdateJob => {
            if inner.strikes(K::NotFound) {
                return Some(Fault::status(404));
            }
            let first = head.job.and_then(|job| inner.ledger.jobs.get(&job)).is_some_and(|note| note.words == 1);
            (first && inner.strikes(K::FirstWordLost)).then_some(Fault::ApplyThenDrop)
        }
        Route::UploadArtifacts => {
            if inner.strikes(K::UploadReset) {
                return Some(Fault::DropInBody(inner.dice().below(400)));
            }
            if inner.strikes(K::UploadRefused) {
                let code = *inner.dice().pick(&[413, 403]);
                return Some(json(code, b"{\"message\":\"refused early\"}"));
            }
            inner.strikes(K::UploadBusy).then(|| json(503, b"{\"message\":\"storage is busy\"}"))
        }
        _ => None,
    }
}
