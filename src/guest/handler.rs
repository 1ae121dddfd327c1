//! May it, and who answers? Rate, route, token and job id of each request, then to the one who knows.
//!
//! The order is fixed: rate (429), route (404, 405), query (400), job id (403), token (401), and
//! only then the body. Runner-level calls are answered here; `trace` and `update` take what belongs
//! to the job, `artifacts` forwards.

use super::answer::{self, Answer};
use super::body::{BodyFault, RequestBody, object};
use super::cache;
use super::forward::Forwards;
use super::head::Refusal;
use super::limits::Bucket;
use super::outage::Outage;
use super::routes::{self, JobRoute, NoRoute, Query, Route};
use super::sessions::Sessions;
use super::trace::is_over;
use super::wire::Notes;
use super::{Admission, GuestEvent, GuestView, HandOut, Limits};
use crate::cache::JobCache;
use crate::clock::Clock;
use crate::failpoint::{Point, reached};
use crate::gitlab::{JobClient, JobId, RunnerInfo};
use crate::metrics::{GuestMetrics, Metrics};
use crate::network::Entrance;
use crate::repeats::Repeats;
use crate::rng::Rng;
use crate::secret::Secret;
use crate::spool::SpoolWriter;
use crate::vm::VmId;
use crate::vm::sockets::DoorSocket;
use dayfly_guest_config::{Nonce, Pass};
use http::header::HeaderMap;
use http::request::Parts;
use http::{HeaderValue, Request, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

/// A request beyond the rate is delayed by at most this, then answered 429.
const RATE_DELAY_MAX: Duration = Duration::from_secs(1);
/// `POST /jobs/request` and `verify`: Workhorse takes 32 KiB; the official runner sends 1.
const RUNNER_BODY_BYTES_MAX: usize = 32 * 1024;
/// PATCH bodies in memory at once, those being written included, however long the disk takes: so 2 MiB a VM. The
/// official runner sends one after the other.
const TRACE_BODIES: usize = 1;
/// PATCHes that have their turn or wait for it, unread; each costs its connection's buffers. One more is told to come
/// again.
const TRACE_TURNS: usize = 4;
/// Artifact transfers at once, as many as connections to GitLab are granted to one job.
const TRANSFERS: usize = 20;
/// `Spoke` goes out no more often than this.
const SPOKE_INTERVAL: Duration = Duration::from_secs(1);

/// Everything that a request may need.
pub(super) struct Handler {
    vm: VmId,
    pass: Pass,
    guest_token: Secret,
    pub(super) job: JobId,
    pub(super) job_token: Secret,
    dependencies: BTreeMap<JobId, Secret>,
    pub(super) spool: SpoolWriter,
    pub(super) client: JobClient,
    pub(super) direct_download: bool,
    events: mpsc::Sender<GuestEvent>,
    view: watch::Receiver<GuestView>,
    limits: Limits,
    rng: Rng,
    pub(super) clock: Clock,
    metrics: Metrics,
    /// What its job may have of the caches.
    pub(super) cache: Option<JobCache>,
    pub(super) cache_transfers: Arc<Semaphore>,
    requests: Bucket,
    pub(super) forwards: Bucket,
    pub(super) trace_rate: Bucket,
    pub(super) trace_turns: Semaphore,
    pub(super) trace_bodies: Arc<Semaphore>,
    pub(super) transfers: Arc<Semaphore>,
    /// GitLab's failures to take artifacts.
    pub(super) uploads: Outage,
    /// Its failures to give what a guest fetches.
    pub(super) fetches: Outage,
    pub(super) debug_trace_told: AtomicBool,
    pub(super) running_answered: AtomicBool,
    other_job: Repeats,
    pub(super) trace_unwritten: Repeats,
    pub(super) not_saved: Repeats,
    pub(super) not_forwarded: Repeats,
    pub(super) not_redirected: Repeats,
    /// When `Spoke` last went out. Held for a few lines, never across an await.
    spoke: Mutex<Option<Instant>>,
    /// What is under way on the disk, spool and caches: never dropped half-way.
    pub(super) writes: TaskTracker,
}

/// The body of `jobs/request` and `verify`, as far as we read it.
#[derive(Deserialize)]
pub struct RunnerRequest {
    /// What the runner takes for its runner token.
    pub token: String,
    #[serde(default)]
    info: Option<RunnerInfo>,
}

impl Handler {
    pub(super) fn new(admission: Admission) -> (Self, Entrance, Forwards) {
        let Admission { vm, entrance, pass, guest_token, job, job_token, dependencies, spool, client, .. } = admission;
        let limits = admission.limits;
        let forwards = Forwards::new(vm.clone(), admission.forwards, admission.metrics.guest().clone());
        let handler = Self {
            vm,
            pass,
            guest_token,
            job,
            job_token,
            dependencies: dependencies.into_iter().map(|dependency| (dependency.id, dependency.token)).collect(),
            spool,
            client,
            direct_download: admission.direct_download,
            events: admission.events,
            view: admission.view,
            rng: admission.rng,
            clock: admission.clock,
            metrics: admission.metrics,
            cache: admission.cache,
            cache_transfers: Arc::new(Semaphore::new(cache::TRANSFERS)),
            requests: Bucket::new(limits.requests_per_second.into(), limits.requests_burst.into()),
            forwards: Bucket::new(limits.forwards_per_second.into(), limits.forwards_burst.into()),
            trace_rate: Bucket::new(limits.trace_bytes_per_second, limits.trace_bytes_burst),
            trace_turns: Semaphore::new(TRACE_TURNS),
            trace_bodies: Arc::new(Semaphore::new(TRACE_BODIES)),
            transfers: Arc::new(Semaphore::new(TRANSFERS)),
            uploads: Outage::default(),
            fetches: Outage::default(),
            debug_trace_told: AtomicBool::new(false),
            running_answered: AtomicBool::new(false),
            other_job: Repeats::new("guest asked for another job"),
            trace_unwritten: Repeats::new("failed to write a guest's trace"),
            not_saved: Repeats::new("failed to save a guest's cache"),
            not_forwarded: Repeats::new("failed to forward a guest's request"),
            not_redirected: Repeats::new("GitLab's redirect of a guest's artifacts is not passed on"),
            spoke: Mutex::new(None),
            writes: TaskTracker::new(),
            limits,
        };
        (handler, entrance, forwards)
    }

    pub(super) fn vm(&self) -> &VmId {
        &self.vm
    }

    pub(super) fn pass(&self) -> &Pass {
        &self.pass
    }

    pub(super) fn nonce(&self) -> Nonce {
        self.rng.bytes()
    }

    /// The sessions of this guest's wire.
    pub(super) fn sessions(&self, wire: DoorSocket, has_forwards: bool) -> Sessions {
        let whose = (self.vm.clone(), wire, self.pass.clone());
        Sessions::new(whose, has_forwards, &self.limits, self.rng.clone(), self.metrics.guest().clone())
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn metrics(&self) -> &GuestMetrics {
        self.metrics.guest()
    }

    /// What the job knows now.
    pub(super) fn view(&self) -> GuestView {
        self.view.borrow().clone()
    }

    /// Tells the job; waits for room. A job that no longer listens needs no news.
    pub(super) async fn tell(&self, event: GuestEvent) {
        let _ = self.events.send(event).await;
    }

    /// Tells the job and waits for its answer; `None`: it does not listen any more.
    pub(super) async fn ask<T>(&self, event: impl FnOnce(oneshot::Sender<T>) -> GuestEvent) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.events.send(event(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Waits until no write to the spool is under way.
    pub(super) async fn writes_end(&self) {
        self.writes.close();
        self.writes.wait().await;
    }

    /// Our answer to a head that was refused.
    pub(super) fn refuse_head(&self, refusal: Refusal) -> Answer {
        let (status, word) = match refusal {
            Refusal::Malformed => (StatusCode::BAD_REQUEST, "malformed_head"),
            Refusal::TargetTooLong => (StatusCode::URI_TOO_LONG, "target_too_long"),
            Refusal::TooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large"),
        };
        self.refuse(status, word)
    }

    /// An error answer, counted.
    pub(super) fn refuse(&self, status: StatusCode, word: &'static str) -> Answer {
        self.metrics().refused.inc(word);
        answer::error(status)
    }

    /// One request. `notes` is its connection's.
    pub(super) async fn handle(&self, request: Request<Incoming>, notes: &Notes) -> Answer {
        let (parts, body) = request.into_parts();
        let body = RequestBody::new(body);
        let ended = body.ended();
        let answer = self.route(&parts, body, notes).await;
        // What is left of a body would have to be read before the next request: end it here.
        if ended.load(Ordering::Acquire) { answer } else { answer::closing(answer) }
    }

    async fn route(&self, parts: &Parts, body: RequestBody, notes: &Notes) -> Answer {
        match self.requests.take(1, RATE_DELAY_MAX) {
            Some(Duration::ZERO) => {}
            Some(delay) => tokio::time::sleep(delay).await,
            None => {
                self.metrics().refused.inc("rate");
                return answer::come_again(StatusCode::TOO_MANY_REQUESTS);
            }
        }
        let route = match routes::route(parts.method.as_str(), parts.uri.path()) {
            Ok(route) => route,
            Err(NoRoute::NotFound) => return self.refuse(StatusCode::NOT_FOUND, "no_route"),
            Err(NoRoute::Method(allowed)) => {
                self.metrics().refused.inc("method");
                return answer::method_not_allowed(allowed);
            }
        };
        self.metrics().requests.inc(route.word());
        // That of the store's is a signature, which nobody looks at.
        let query = if matches!(route, Route::Cache(_)) { "" } else { parts.uri.query().unwrap_or("") };
        let Ok(query) = Query::parse(query, route.query_keys()) else {
            return self.refuse(StatusCode::BAD_REQUEST, "query");
        };
        self.metrics().query_keys_dropped.inc_by(query.dropped);
        match route {
            Route::RunnerAdministration => self.refuse(StatusCode::FORBIDDEN, "runner_administration"),
            // GitLab without a job router; the runner then polls plainly (threats.md §6.1).
            Route::Discovery => answer::error(StatusCode::NOT_IMPLEMENTED),
            Route::Verify => self.locally(self.verify(parts, body)).await,
            Route::AskForJob => match self.in_time(self.read_runner_request(parts, body)).await {
                Ok(request) => self.hand_out(request, notes).await,
                Err(answer) => answer,
            },
            Route::Job(id, route) => self.job_route(id, route, parts, query, body).await,
            Route::Cache(route) => {
                self.spoke();
                self.cached(route, parts, body).await
            }
        }
    }

    async fn job_route(&self, id: JobId, route: JobRoute, parts: &Parts, query: Query, body: RequestBody) -> Answer {
        let dependency = self.dependencies.get(&id).filter(|_| route == JobRoute::Download && id != self.job);
        if id != self.job && dependency.is_none() {
            self.other_job.log(|line| tracing::info!(vm = %self.vm, job = %self.job, other = %id, "{line}"));
            return self.refuse(StatusCode::FORBIDDEN, "other_job");
        }
        // 17.5 proves an update by the body only, so that one looks for itself.
        let proven = match check_headers(&parts.headers, dependency.unwrap_or(&self.job_token)) {
            Ok(proven) if proven || route == JobRoute::Update => proven,
            Ok(_) | Err(WrongToken) => return self.refuse(StatusCode::UNAUTHORIZED, "token"),
        };
        match route {
            JobRoute::Update => self.locally(self.update(proven, body)).await,
            JobRoute::Trace => {
                self.spoke();
                self.locally(self.trace(parts, &query, body)).await
            }
            JobRoute::Upload | JobRoute::Download | JobRoute::EnvironmentKey => {
                self.spoke();
                self.artifacts(id, route, dependency, parts, query, body).await
            }
        }
    }

    /// A request that ends here, within its time.
    async fn locally(&self, answer: impl Future<Output = Result<Answer, Answer>>) -> Answer {
        self.in_time(answer).await.unwrap_or_else(|refused| refused)
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Answer>>) -> Result<T, Answer> {
        let late = |_| self.refuse(StatusCode::REQUEST_TIMEOUT, "late");
        timeout(self.limits.local_total, work).await.map_err(late)?
    }

    /// Reads a small body, or answers why not.
    pub(super) async fn read(&self, body: &mut RequestBody, bytes_max: usize) -> Result<bytes::Bytes, Answer> {
        body.read(bytes_max, self.limits.stall).await.map_err(|fault| match fault {
            BodyFault::TooLarge => self.refuse(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            BodyFault::Slow => self.refuse(StatusCode::REQUEST_TIMEOUT, "body_slow"),
            BodyFault::Cut => self.refuse(StatusCode::BAD_REQUEST, "body_cut"),
        })
    }

    /// Reads the body of a runner-level call and checks its token: 401, never 403, which would make
    /// the official runner sleep for 300 s.
    async fn read_runner_request(&self, parts: &Parts, mut body: RequestBody) -> Result<RunnerRequest, Answer> {
        let body = self.read(&mut body, RUNNER_BODY_BYTES_MAX).await?;
        let request: RunnerRequest = object(&body).ok_or_else(|| self.refuse(StatusCode::BAD_REQUEST, "body"))?;
        if !self.guest_token.matches(&request.token) || check_headers(&parts.headers, &self.guest_token).is_err() {
            return Err(self.refuse(StatusCode::UNAUTHORIZED, "token"));
        }
        Ok(request)
    }

    async fn verify(&self, parts: &Parts, body: RequestBody) -> Result<Answer, Answer> {
        let request = self.read_runner_request(parts, body).await?;
        // Only `register` and `verify` ask, by hand, and look at nothing but the status.
        let answer = serde_json::json!({ "id": 1, "token": request.token, "token_expires_at": null });
        Ok(answer::json(StatusCode::OK, answer.to_string()))
    }

    /// The job, 204 if there is none to hand out.
    async fn hand_out(&self, request: RunnerRequest, notes: &Notes) -> Answer {
        let nothing = answer::empty(StatusCode::NO_CONTENT);
        if is_over(&self.view()) {
            return nothing;
        }
        let (reply, answer) = oneshot::channel();
        let mut promise = Promise { answer, notes };
        let asking = async {
            self.tell(GuestEvent::AsksForJob { info: request.info, reply }).await;
            (&mut promise.answer).await.ok().flatten()
        };
        // The hold ends just as the job answers: what it sent by then counts as handed out.
        let handed_out = match timeout(self.limits.poll_hold, asking).await {
            Ok(handed_out) => handed_out,
            Err(_) => promise.last_word(),
        };
        let Some(HandOut { payload, request_id }) = handed_out else { return nothing };
        notes.hand_out_begun();
        // The job counts it as handed out; the guest has not got it.
        reached(Point::K10);
        let mut answer = answer::json(StatusCode::CREATED, payload);
        if let Some(id) = request_id.and_then(|id| HeaderValue::try_from(id).ok()) {
            answer.headers_mut().insert("x-request-id", id);
        }
        answer
    }

    /// Tells the job that its guest spoke, at most once a second. Does not wait: a job that has not got round to what
    /// it was told before hears it with a later request.
    pub(super) fn spoke(&self) {
        let now = Instant::now();
        let mut spoke = self.spoke.lock().unwrap_or_else(PoisonError::into_inner);
        let due = spoke.is_none_or(|last| now >= last + SPOKE_INTERVAL);
        if due && !matches!(self.events.try_send(GuestEvent::Spoke), Err(TrySendError::Full(_))) {
            *spoke = Some(now);
        }
    }
}

/// A header holds a token that is not the one expected.
struct WrongToken;

/// Checks each token that the headers hold; `true` if `JOB-TOKEN` proves the right one. They go no
/// further than this: what GitLab gets is ours (decision D14).
fn check_headers(headers: &HeaderMap, expected: &Secret) -> Result<bool, WrongToken> {
    let mut proven = false;
    for name in ["job-token", "private-token", "runner-token"] {
        for value in headers.get_all(name) {
            if !value.to_str().is_ok_and(|value| expected.matches(value)) {
                return Err(WrongToken);
            }
            proven |= name == "job-token";
        }
    }
    Ok(proven)
}

/// The job's answer to a poll, until it is on its way to the guest. If the connection dies before
/// that, the job learns that its answer was lost.
struct Promise<'a> {
    answer: oneshot::Receiver<Option<HandOut>>,
    notes: &'a Notes,
}

impl Promise<'_> {
    /// Refuses any later answer; returns one that came already.
    fn last_word(&mut self) -> Option<HandOut> {
        self.answer.close();
        self.answer.try_recv().ok().flatten()
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        if self.last_word().is_some() {
            self.notes.hand_out_begun();
        }
    }
}
