//! One request, one response: history, planned faults, body limits, and the way to the routes.

use super::Standin;
use super::answer::Answer;
use super::artifacts;
use super::auth;
use super::fault::Fault;
use super::history::{BODY_KEPT_BYTES, Recorded};
use super::misbehave::{BodyFrame, misbehave, planned};
use super::model::Model;
use super::params::{Media, Params};
use super::routes::{self, Route};
use super::{git, queue, runner_routes, trace, update};
use bytes::{Bytes, BytesMut};
use dayfly::gitlab::{Body, JobId};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body as HttpBody;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// Largest body that is read whole. The official runner's pieces of trace are at most 1 MiB.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Bodies of all connections that are being read whole: a client may open many.
const READING_BYTES_MAX: usize = 256 << 20;

/// The front proxy's limit for a poll, while long polling is on.
const LONG_POLL_BODY_MAX: usize = 32 << 10;

/// The connection ends without a (whole) answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection was cut")]
pub struct Cut;

/// A request without its body.
struct Head {
    route: Route,
    job: Option<JobId>,
    number: u64,
    request: http::request::Parts,
}

/// A body's share of [`READING_BYTES_MAX`]; dropping it gives the share back.
struct Room<'a> {
    reading: &'a AtomicUsize,
    bytes: usize,
}

impl Room<'_> {
    /// `false`: there is no room for so many bytes more.
    fn take(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        self.reading.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= READING_BYTES_MAX
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.reading.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Standin {
    /// One exchange. `connection` goes into the history.
    ///
    /// # Errors
    /// [`Cut`] where a planned fault cuts the connection.
    ///
    /// # Cancel safety
    /// The model changes in one step once the request's body is there; a dropped future is a client
    /// that went away, before or after that step.
    pub async fn exchange(&self, request: Request<Body>, connection: u64) -> Result<Response<Body>, Cut> {
        let (parts, body) = request.into_parts();
        let (route, job) = routes::find(&parts.method, parts.uri.path());
        let recorded = Recorded {
            number: 0,
            at: self.now(),
            connection,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            route,
            job,
            headers: parts.headers.clone(),
            body: None,
            body_bytes: 0,
            status: None,
            faulted: false,
        };
        let (number, faults) = self.edit(|model| {
            let faults = model.script.take(&recorded);
            let number = model.history.push(Recorded { faulted: !faults.is_empty(), ..recorded });
            (number, faults)
        });
        let head = Head { route, job, number, request: parts };
        let mut after = None;
        for fault in faults {
            match fault {
                Fault::Delay(duration) => tokio::time::sleep(duration).await,
                Fault::Status { code, headers, body } => {
                    let response = planned(code, &headers, body);
                    self.note_status(number, response.status());
                    return Ok(response);
                }
                Fault::DropBeforeApply => return Err(Cut),
                Fault::DropInBody(bytes) => {
                    self.swallow(number, body, bytes).await;
                    return Err(Cut);
                }
                Fault::Silence => std::future::pending().await,
                other => {
                    after = Some(other);
                    break;
                }
            }
        }
        let response = self.dispatch(&head, body).await.into_response();
        let response = match after {
            Some(fault) => misbehave(fault, response).await?,
            None => response,
        };
        self.note_status(number, response.status());
        Ok(response)
    }

    fn note_status(&self, number: u64, status: StatusCode) {
        self.edit(|model| {
            if let Some(entry) = model.history.get_mut(number) {
                entry.status = Some(status);
            }
        });
    }

    /// Reads at most this much of a body.
    async fn swallow(&self, number: u64, mut body: Body, bytes: u64) {
        let mut read = 0_u64;
        while read < bytes {
            let Some(Ok(frame)) = body.frame().await else { break };
            read += frame.data_ref().map_or(0, |data| u64::try_from(data.len()).unwrap_or(u64::MAX));
        }
        self.edit(|model| {
            if let Some(entry) = model.history.get_mut(number) {
                entry.body_bytes = read;
            }
        });
    }

    /// A whole body; a broken one ends the exchange, for nobody waits for an answer.
    async fn collect(&self, number: u64, mut body: Body, bytes_max: usize) -> Result<Bytes, Answer> {
        let mut all = BytesMut::new();
        let mut room = Room { reading: &self.reading, bytes: 0 };
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else {
                return Err(Answer::message(StatusCode::BAD_REQUEST, "400 Bad Request"));
            };
            let Ok(data) = frame.into_data() else { continue };
            if !room.take(data.len()) {
                return Err(Answer::message(StatusCode::SERVICE_UNAVAILABLE, "503 Service Unavailable"));
            }
            all.extend_from_slice(&data);
            if all.len() > bytes_max {
                return Err(Answer::message(StatusCode::PAYLOAD_TOO_LARGE, "413 Request Entity Too Large"));
            }
        }
        let all = all.freeze();
        self.edit(|model| {
            if let Some(entry) = model.history.get_mut(number) {
                entry.body_bytes = u64::try_from(all.len()).unwrap_or(u64::MAX);
                if all.len() <= BODY_KEPT_BYTES && entry.route != Route::AppendTrace {
                    // A copy: the piece may be a part of a larger buffer of the connection.
                    model.history.keep_body(number, &Bytes::copy_from_slice(&all));
                }
            }
        });
        Ok(all)
    }

    async fn dispatch(&self, head: &Head, body: Body) -> Answer {
        let answer = match head.route {
            Route::UploadArtifacts => self.upload(head, body).await,
            Route::Git => match self.collect(head.number, body, BODY_BYTES_MAX).await {
                Ok(body) => Ok(git::serve(self, &head.request, body).await),
                Err(refusal) => Err(refusal),
            },
            Route::RequestJob => self.request_job(head, body).await,
            Route::DownloadArtifacts | Route::ObjectStorage => self.download(head).await,
            Route::Unknown => Err(Answer::error(StatusCode::NOT_FOUND, "404 Not Found")),
            _ => self.plain(head, body).await,
        };
        answer.unwrap_or_else(|refusal| refusal)
    }

    /// The routes that need a whole body and one step in the model.
    async fn plain(&self, head: &Head, body: Body) -> Result<Answer, Answer> {
        let body = self.collect(head.number, body, BODY_BYTES_MAX).await?;
        let headers = &head.request.headers;
        let mut params = Params::from_query(head.request.uri.query());
        params.merge_body(headers, &body)?;
        self.edit(|model| {
            let now = self.now();
            gate(model, head, &params, now)?;
            let job = head.job.unwrap_or(JobId(0));
            match head.route {
                Route::UpdateJob => update::update(model, job, &params, now),
                Route::AppendTrace => trace::append(model, job, &params, headers, &body, now),
                Route::RuntimeEnvironmentKey => environment_key(model, job, &params, headers, now),
                Route::AuthorizeArtifacts => authorize(model, job, &params, headers, now),
                Route::VerifyRunner => runner_routes::verify(model, &params, now),
                Route::RegisterRunner => runner_routes::register(model, &params, now),
                Route::DeleteRunner => runner_routes::delete(model, &params, headers, now),
                Route::DeleteManager => runner_routes::delete_manager(model, &params, headers, now),
                Route::ResetToken => runner_routes::reset(model, &params, now),
                Route::Discovery => runner_routes::discovery(model, headers, now),
                _ => Err(Answer::error(StatusCode::NOT_FOUND, "404 Not Found")),
            }
        })
    }

    /// The long poll is the front proxy's: with a current `last_update` it holds the request until the
    /// queue moves, and then answers 204 at once; the job comes on the next ask.
    async fn request_job(&self, head: &Head, body: Body) -> Result<Answer, Answer> {
        let headers = &head.request.headers;
        let hold = self.read(|model| model.settings.long_poll);
        let polls = !hold.is_zero();
        let mark = |answer: Answer| if polls { answer.with("gitlab-ci-builds-polling", "yes") } else { answer };
        let body_max = if polls { LONG_POLL_BODY_MAX } else { BODY_BYTES_MAX };
        let body = self.collect(head.number, body, body_max).await.map_err(mark)?;
        let mut params = Params::from_query(head.request.uri.query());
        params.merge_body(headers, &body).map_err(mark)?;
        if polls && headers.contains_key("content-type") && Media::of(headers) == Media::Json {
            let text = |key| params.0.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let (token, last_update) = (text("token"), text("last_update"));
            if !token.is_empty() && !last_update.is_empty() && self.queue_stands(&token, &last_update) {
                // The answer is the same for a queue that moved and one that did not.
                let _ = self.wait_for(|model| !queue_is_at(model, &token, &last_update), hold).await;
                return Ok(mark(Answer::empty(StatusCode::NO_CONTENT)));
            }
        }
        let answer = self.edit(|model| {
            let now = self.now();
            gate(model, head, &params, now)?;
            queue::request(model, &params, now)
        });
        answer.map(mark).map_err(mark)
    }

    fn queue_stands(&self, token: &str, last_update: &str) -> bool {
        self.read(|model| queue_is_at(model, token, last_update))
    }

    async fn upload(&self, head: &Head, body: Body) -> Result<Answer, Answer> {
        let params = Params::from_query(head.request.uri.query());
        self.edit(|model| gate(model, head, &params, self.now()))?;
        let job = head.job.unwrap_or(JobId(0));
        let counted = Counted { body, standin: self.clone(), number: head.number }.boxed_unsync();
        artifacts::upload(self, job, &params, &head.request.headers, counted, self.now()).await
    }

    async fn download(&self, head: &Head) -> Result<Answer, Answer> {
        let params = Params::from_query(head.request.uri.query());
        let headers = &head.request.headers;
        let wanted = self.edit(|model| {
            let now = self.now();
            if head.route == Route::ObjectStorage {
                return artifacts::from_storage(model, head.request.uri.path(), &params).map(Ok);
            }
            gate(model, head, &params, now)?;
            artifacts::download(model, head.job.unwrap_or(JobId(0)), &params, headers, now)
        })?;
        match wanted {
            Ok(wanted) => Ok(artifacts::ranged(wanted, headers).await),
            Err(redirect) => Ok(redirect),
        }
    }
}

fn queue_is_at(model: &Model, token: &str, last_update: &str) -> bool {
    model.runners.values().any(|runner| runner.token.matches(token) && runner.queue_value == last_update)
}

/// What comes before parameters and authentication: migrations, then rate limits.
fn gate(model: &mut Model, head: &Head, params: &Params, now: jiff::Timestamp) -> Result<(), Answer> {
    model.reap(now);
    model.caller = caller(model, &head.request.headers);
    if model.settings.migrations_backoff {
        let message = "Executing database migrations. Please retry later.";
        return Err(Answer::message(StatusCode::TOO_MANY_REQUESTS, message).with("retry-after", "60"));
    }
    let limiter = match head.route {
        Route::RequestJob => "runner_jobs_request_api",
        Route::UpdateJob | Route::UploadArtifacts | Route::DownloadArtifacts => "runner_jobs_api",
        Route::AppendTrace => "runner_jobs_patch_trace_api",
        _ => return Ok(()),
    };
    let token = match head.route {
        Route::RequestJob => params.text("token").unwrap_or(None),
        _ => auth::shown_job_token(params, &head.request.headers).unwrap_or(None),
    };
    let Model { throttle, settings, .. } = model;
    throttle.count(&settings.rate_limits, limiter, token.as_deref(), now)
}

/// The last address in `X-Forwarded-For` that is no proxy's of the house, if that header is trusted.
fn caller(model: &Model, headers: &HeaderMap) -> Option<String> {
    let list = auth::header(headers, "x-forwarded-for").filter(|_| model.settings.trust_forwarded_for)?;
    let addresses = list.split(',').rev().filter_map(|address| address.trim().parse::<std::net::IpAddr>().ok());
    let foreign = |address: &std::net::IpAddr| match address {
        std::net::IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_private()),
        std::net::IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unique_local()),
    };
    addresses.into_iter().find(foreign).map(|address| address.to_string())
}

/// `GET /jobs/:id/runtime_environment_key`
fn environment_key(
    model: &mut Model,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    now: jiff::Timestamp,
) -> Result<Answer, Answer> {
    let token = auth::shown_job_token(params, headers)?;
    auth::job(model, id, token.as_deref(), auth::Expired::Refused, now)?;
    let key = model.jobs.get(&id).and_then(|job| job.spec.runtime_environment_key.as_ref());
    match key.filter(|_| model.settings.runtime_environment_keys) {
        Some(key) => Ok(Answer::json(StatusCode::OK, &json!({ "runtime_environment_key": key }))),
        None => Err(Answer::message(StatusCode::NOT_FOUND, "404 Not Found")),
    }
}

/// `POST /jobs/:id/artifacts/authorize`: only the front proxy can sign it.
fn authorize(
    model: &mut Model,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    now: jiff::Timestamp,
) -> Result<Answer, Answer> {
    let signature = auth::header(headers, "gitlab-workhorse-api-request").unwrap_or_default();
    if !model.workhorse_token.matches(&signature) {
        return Err(Answer::refusal(StatusCode::FORBIDDEN, None));
    }
    let bytes_max = artifacts::authorize(model, id, params, headers, now)?;
    let body = if model.settings.remote_artifacts {
        let object = format!("{}/-/object-storage/{id}/upload", model.settings.external_url);
        json!({
            "RemoteObject": {
                "ID": id.to_string(), "GetURL": object, "StoreURL": object, "DeleteURL": object,
                "MultipartUpload": { "PartSize": 5 << 20, "PartURLs": [object], "CompleteURL": object, "AbortURL": object },
                "SkipDelete": true,
            },
            "MaximumSize": bytes_max,
        })
    } else {
        json!({ "TempPath": "/var/opt/gitlab/artifacts/tmp/uploads", "MaximumSize": bytes_max })
    };
    let answer = Answer::json(StatusCode::OK, &body);
    Ok(answer.with("content-type", "application/vnd.gitlab-workhorse+json"))
}

/// Counts an upload's bytes into the history.
struct Counted {
    body: Body,
    standin: Standin,
    number: u64,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = dayfly::gitlab::transport::BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<BodyFrame> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
            self.standin.edit_quietly(|model| {
                if let Some(entry) = model.history.get_mut(self.number) {
                    entry.body_bytes = entry.body_bytes.saturating_add(bytes);
                }
            });
        }
        polled
    }
}
