//! The way to GitLab: requests and answers are told, faults are put on them, lives end in mid-exchange.

mod faults;
mod payload;

use crate::event::{Answer, DaemonDoes, Event, Request, Update};
use crate::kinds::Kind;
use crate::story::Story;
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::gitlab::transport::{Body, OpenError, full};
use dayfly::gitlab::{Call, Endpoint, JobId, OpenTransport, Transport, TransportError};
use dayfly_exec::standin::{Hook, Recorded, Route, Standin};
use http::{HeaderMap, Method};
use http_body_util::BodyExt as _;
use serde_json::Value;
use std::sync::Arc;

/// Hands out the transport to the stand-in.
pub(crate) struct Opener {
    pub(crate) standin: Standin,
    pub(crate) story: Story,
}

impl OpenTransport for Opener {
    fn open(&self, _: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(Gate { standin: self.standin.clone(), story: self.story.clone() }))
    }
}

/// What puts the planned faults on requests, inside the stand-in.
pub(crate) fn hook(story: &Story) -> Hook {
    let story = story.clone();
    Arc::new(move |request: &Recorded| story.inner().planned.remove(&request_id(&request.headers)).unwrap_or_default())
}

fn request_id(headers: &HeaderMap) -> String {
    headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned()
}

#[derive(Clone)]
struct Gate {
    standin: Standin,
    story: Story,
}

/// What is known of a request.
struct Head {
    route: Route,
    job: Option<JobId>,
    update: Option<Update>,
    /// The token it shows.
    shown: String,
}

impl Head {
    fn is_final(&self) -> bool {
        self.update.as_ref().is_some_and(|update| update.state != "running")
    }

    fn answer<'a>(&'a self, status: Option<u16>, headers: Option<&'a HeaderMap>, faulted: bool) -> Event<'a> {
        let (update, shown) = (self.update.as_ref(), self.shown.as_str());
        Event::Answer(Answer { route: self.route, job: self.job, status, headers, update, shown, faulted })
    }
}

impl Transport for Gate {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let gate = self.clone();
        Box::pin(async move { gate.exchange(call).await })
    }
}

/// Tells that no answer came, should the exchange be dropped before one did.
struct Unanswered<'a> {
    gate: &'a Gate,
    head: &'a Head,
    armed: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.gate.story.tell(&self.head.answer(None, None, true));
            if self.head.route == Route::RequestJob {
                self.gate.note_lost();
            }
        }
    }
}

impl Gate {
    async fn exchange(&self, call: Call) -> Result<http::Response<Body>, TransportError> {
        let Call { request, connection, head_timeout, total_timeout } = call;
        let (parts, body) = request.into_parts();
        let (route, job) = find_route(&parts.method, parts.uri.path());
        // Transfers stream; everything else is whole already.
        let (bytes, body) = if route == Route::UploadArtifacts {
            (Bytes::new(), body)
        } else {
            let bytes = body.collect().await.map_err(TransportError::Broken)?.to_bytes();
            (bytes.clone(), full(bytes))
        };
        let shown = matches!(route, Route::UpdateJob | Route::RequestJob | Route::VerifyRunner)
            .then(|| token_in(&bytes))
            .flatten();
        let shown = shown.or_else(|| Some(parts.headers.get("job-token")?.to_str().ok()?.to_owned()));
        let update =
            (route == Route::UpdateJob).then(|| read_update(&serde_json::from_slice(&bytes).unwrap_or_default()));
        let head = Head { route, job, update, shown: shown.unwrap_or_default() };
        let offset = parts.headers.get("content-range").and_then(|v| v.to_str().ok()?.split('-').next()?.parse().ok());
        let (uri, headers) = (&parts.uri, &parts.headers);
        let update = head.update.as_ref();
        self.story.tell(&Event::Request(Request { route, job, uri, headers, body: &bytes, update, offset }));
        let mut unanswered = Unanswered { gate: self, head: &head, armed: true };
        if head.is_final() && self.story.inner().dice().chance(500) {
            self.story.point(Kind::KillK14).await;
        }
        if route == Route::UploadArtifacts && self.story.inner().dice().chance(500) {
            self.story.point(Kind::KillK13).await;
        }
        let plan = self.draw(&head);
        if plan.connect_fails {
            return Err(TransportError::Connect("injected: connection refused".into()));
        }
        let (faulted, id) = (!plan.faults.is_empty(), request_id(&parts.headers));
        if faulted {
            self.story.inner().planned.insert(id.clone(), plan.faults);
        }
        let request = http::Request::from_parts(parts, body);
        let call = Call { request, connection, head_timeout, total_timeout };
        let result = Transport::call(&self.standin, call).await;
        self.story.inner().planned.remove(&id);
        if let Some(job) = plan.again {
            self.queue_again_or_not(job);
        }
        if let Some(job) = job.filter(|_| matches!(route, Route::UpdateJob | Route::AppendTrace)) {
            self.hold(job);
        }
        // Without an answer, `unanswered` tells so.
        let response = result?;
        if route == Route::RequestJob && response.status() == 201 {
            let response = self.assigned(&head, response, faulted).await;
            unanswered.armed = false;
            return Ok(response);
        }
        self.lives_end(&head, response.status().as_u16()).await;
        unanswered.armed = false;
        self.story.tell(&head.answer(Some(response.status().as_u16()), Some(response.headers()), faulted));
        Ok(response)
    }

    /// A poll whose answer never came may have been given a job.
    fn note_lost(&self) {
        let lost: Vec<JobId> = self.standin.read(|model| {
            let given = model.jobs.values().filter(|job| job.handed_out > 0 && !job.queued);
            given.map(|job| job.id).collect()
        });
        for job in lost {
            let unknown =
                self.story.inner().ledger.jobs.get(&job).is_some_and(|n| n.assigned_at.is_none() && n.lost.is_none());
            if unknown {
                self.story.tell(&Event::AssignedInVain { job });
            }
        }
    }

    /// Tells what GitLab holds of a job.
    fn hold(&self, job: JobId) {
        self.standin.read(|model| {
            if let Some(held) = model.jobs.get(&job) {
                self.story.tell(&Event::Held { job: held, last: false });
            }
        });
    }

    /// Lives that end after GitLab did what was asked, before the daemon knows.
    async fn lives_end(&self, head: &Head, status: u16) {
        match head.route {
            Route::UpdateJob if head.is_final() => {
                self.story.point(Kind::KillK14).await;
                if status == 200 && self.story.armed() == Some(Kind::KillK15) {
                    self.story.inner().kill_at_next_file = true;
                }
            }
            Route::UpdateJob => self.story.point(Kind::KillK11).await,
            Route::AppendTrace => self.story.point(Kind::KillK12).await,
            Route::UploadArtifacts => self.story.point(Kind::KillK13).await,
            _ => {}
        }
    }

    fn users(&self, job: JobId, what: &'static str) {
        self.story.tell(&Event::Daemon(DaemonDoes::Users(job, what)));
    }
}

pub(crate) fn find_route(method: &Method, path: &str) -> (Route, Option<JobId>) {
    let parts: Vec<&str> = path.trim_start_matches("/api/v4/").split('/').collect();
    let id = |text: &str| text.parse().ok().map(JobId);
    match (method.as_str(), parts.as_slice()) {
        ("POST", ["jobs", "request"]) => (Route::RequestJob, None),
        ("POST", ["runners", "verify"]) => (Route::VerifyRunner, None),
        ("PUT", ["jobs", job]) => (Route::UpdateJob, id(job)),
        ("PATCH", ["jobs", job, "trace"]) => (Route::AppendTrace, id(job)),
        ("POST", ["jobs", job, "artifacts"]) => (Route::UploadArtifacts, id(job)),
        ("GET", ["jobs", job, "artifacts"]) => (Route::DownloadArtifacts, id(job)),
        _ => (Route::Unknown, None),
    }
}

/// The token in a body, of which most is read over: a poll has much to say of its runner, and there are many.
pub(crate) fn token_in(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Shown {
        token: Option<String>,
    }
    serde_json::from_slice::<Shown>(body).ok()?.token
}

pub(crate) fn read_update(json: &Value) -> Update {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let checksum = text(&json["output"]["checksum"]);
    Update {
        state: text(&json["state"]).unwrap_or_default(),
        reason: text(&json["failure_reason"]),
        exit_code: json["exit_code"].as_i64(),
        trace: checksum.map(|sum| (sum, json["output"]["bytesize"].as_u64().unwrap_or(0))),
    }
}
