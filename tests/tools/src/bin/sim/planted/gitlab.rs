//! Mistakes on the way to GitLab.

use super::Bug;
use crate::seams::gitlab::{find_route, read_update};
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::gitlab::transport::{Body, OpenError, full};
use dayfly::gitlab::{Call, Connection, Endpoint, JobId, OpenTransport, Transport, TransportError};
use dayfly_exec::standin::Route;
use http::header::{CONTENT_RANGE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// So often [`Bug::RetryStorm`] tries again at once.
const STORM: usize = 10;

/// How long [`Bug::LateAfterOutage`] asks for no job after a failure.
const LATE: Duration = Duration::from_secs(300);

/// Opens transports with a bug before them.
pub(super) struct Opener {
    pub(super) bug: Bug,
    pub(super) opener: Arc<dyn OpenTransport>,
}

impl OpenTransport for Opener {
    fn open(&self, endpoint: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        let transport = self.opener.open(endpoint)?;
        Ok(Arc::new(Wrong { bug: self.bug, transport, kept: Arc::default() }))
    }
}

#[derive(Clone)]
struct Wrong {
    bug: Bug,
    transport: Arc<dyn Transport>,
    kept: Arc<Mutex<Kept>>,
}

/// What a bug remembers.
#[derive(Default)]
struct Kept {
    /// The trace of each job, as it was sent.
    traces: BTreeMap<JobId, Vec<u8>>,
    /// Jobs of which GitLab has asked for other bytes of the trace.
    refused: BTreeSet<JobId>,
    /// The end of a trace that was not passed on yet, with its offset.
    held_back: BTreeMap<JobId, (u64, Bytes)>,
    no_poll_before: Option<Instant>,
}

/// A request with its whole body.
#[derive(Clone)]
struct Request {
    route: Route,
    parts: http::request::Parts,
    body: Bytes,
    connection: Connection,
    head_timeout: Duration,
    total_timeout: Duration,
}

impl Request {
    fn is_final(&self) -> bool {
        self.route == Route::UpdateJob && self.json()["state"] != "running"
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    fn with(&self, json: &Value) -> Self {
        Self { body: json.to_string().into(), ..self.clone() }
    }

    /// Where a piece of trace begins.
    fn offset(&self) -> u64 {
        let range = self.parts.headers.get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        range.and_then(|range| range.split('-').next()?.parse().ok()).unwrap_or(0)
    }

    /// The same with this piece of trace.
    fn with_piece(&self, offset: u64, body: Bytes) -> Self {
        let mut request = Self { body, ..self.clone() };
        let range = format!("{offset}-{}", (offset + request.body.len() as u64).saturating_sub(1));
        let range = HeaderValue::try_from(range).expect("digits are a header value");
        request.parts.headers.insert(CONTENT_RANGE, range);
        request
    }

    fn token(&self) -> String {
        let token = self.parts.headers.get("job-token").and_then(|token| token.to_str().ok());
        token.unwrap_or_default().to_owned()
    }
}

impl Transport for Wrong {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response<Body>, TransportError>> {
        let wrong = self.clone();
        Box::pin(async move { wrong.exchange(call).await })
    }
}

type Answered = Result<Response<Body>, TransportError>;

fn answer(status: StatusCode) -> Answered {
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = status;
    Ok(response)
}

/// Whether GitLab has not said what it makes of the request.
fn has_failed(answered: &Answered) -> bool {
    let limited = |status: StatusCode| status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
    answered.as_ref().map_or(true, |response| limited(response.status()))
}

/// The bytes of a checksum the other way round.
fn swapped(checksum: &Value) -> Value {
    let digits = checksum.as_str().and_then(|text| text.strip_prefix("crc32:"));
    let crc = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
    Value::String(format!("crc32:{:08x}", crc.swap_bytes()))
}

impl Wrong {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn exchange(&self, call: Call) -> Answered {
        let (route, job) = find_route(call.request.method(), call.request.uri().path());
        if !matches!(route, Route::RequestJob | Route::UpdateJob | Route::AppendTrace) {
            return self.transport.call(call).await;
        }
        let Call { request, connection, head_timeout, total_timeout } = call;
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(TransportError::Broken)?.to_bytes();
        let request = Request { route, parts, body, connection, head_timeout, total_timeout };
        match (route, job) {
            (Route::UpdateJob, Some(job)) => self.update(&request, job).await,
            (Route::AppendTrace, Some(job)) => self.append(&request, job).await,
            _ => self.poll(&request).await,
        }
    }

    async fn send(&self, request: &Request) -> Answered {
        let Request { parts, body, connection, head_timeout, total_timeout, .. } = request.clone();
        let request = http::Request::from_parts(parts, full(body));
        let mut answered = self.transport.call(Call { request, connection, head_timeout, total_timeout }).await;
        if let (Bug::RetryAfterIgnored, Ok(response)) = (self.bug, &mut answered) {
            response.headers_mut().remove(RETRY_AFTER);
            response.headers_mut().remove("ratelimit-resettime");
        }
        answered
    }

    /// The same request again and again, until it is answered.
    async fn send_in_a_storm(&self, request: &Request) -> Answered {
        let mut answered = self.send(request).await;
        for _ in 0..STORM {
            if !has_failed(&answered) {
                break;
            }
            answered = self.send(request).await;
        }
        answered
    }

    async fn poll(&self, request: &Request) -> Answered {
        match self.bug {
            Bug::RunnerTokenInLog => {
                tracing::info!(body = %String::from_utf8_lossy(&request.body), "asking for a job");
                self.send(request).await
            }
            Bug::LateAfterOutage => {
                if self.kept().no_poll_before.is_some_and(|until| Instant::now() < until) {
                    return Err(TransportError::Connect("GitLab has failed lately".into()));
                }
                let answered = self.send(request).await;
                self.kept().no_poll_before = has_failed(&answered).then(|| Instant::now() + LATE);
                answered
            }
            Bug::PayloadRewritten => {
                let answered = self.send(request).await?;
                if answered.status() != StatusCode::CREATED {
                    return Ok(answered);
                }
                let (parts, body) = answered.into_parts();
                let body = body.collect().await.map_err(TransportError::Broken)?.to_bytes();
                let parsed = serde_json::from_slice::<Value>(&body);
                let body = parsed.map_or(body, |payload| format!("{payload:#}").into());
                Ok(Response::from_parts(parts, full(body)))
            }
            Bug::RetryStorm => self.send_in_a_storm(request).await,
            _ => self.send(request).await,
        }
    }

    async fn update(&self, request: &Request, job: JobId) -> Answered {
        let mut json = request.json();
        let update = read_update(&json);
        let is_final = request.is_final();
        match self.bug {
            Bug::VerdictDropped if is_final => {
                let answered = self.send(request).await;
                if has_failed(&answered) { answer(StatusCode::OK) } else { answered }
            }
            Bug::DoubleReport if is_final => {
                let answered = self.send(request).await?;
                if answered.status() == StatusCode::OK {
                    json["state"] = if update.state == "success" { "failed" } else { "success" }.into();
                    // Whatever comes of it, the first was answered.
                    let _ = self.send(&request.with(&json)).await;
                }
                Ok(answered)
            }
            Bug::SuccessTurnedFailed if update.state == "success" => {
                let answered = self.send(request).await;
                if has_failed(&answered) {
                    (json["state"], json["failure_reason"]) = ("failed".into(), "runner_system_failure".into());
                    // Whatever comes of it, the daemon knows of the first alone.
                    let _ = self.send(&request.with(&json)).await;
                }
                answered
            }
            Bug::AuthorBlamed if update.reason.as_deref() == Some("runner_system_failure") => {
                json["failure_reason"] = "script_failure".into();
                self.send(&request.with(&json)).await
            }
            Bug::WrongChecksum if update.trace.is_some() => {
                let sum = swapped(&json["output"]["checksum"]);
                (json["checksum"], json["output"]["checksum"]) = (sum.clone(), sum);
                self.send(&request.with(&json)).await
            }
            Bug::WrongSize if update.trace.is_some() => {
                let size = json["output"]["bytesize"].as_u64().unwrap_or(0);
                json["output"]["bytesize"] = size.saturating_sub(1).into();
                self.send(&request.with(&json)).await
            }
            Bug::LostLastLine if self.kept().held_back.contains_key(&job) => {
                json["output"] = json!({});
                if let Some(members) = json.as_object_mut() {
                    members.remove("checksum");
                }
                self.send(&request.with(&json)).await
            }
            Bug::JobTokenInLog => {
                tracing::info!(token = request.token(), "tells GitLab of a job");
                self.send(request).await
            }
            Bug::CancelUnheard => self.unheard(request, StatusCode::OK).await,
            Bug::RetryStorm => self.send_in_a_storm(request).await,
            _ => self.send(request).await,
        }
    }

    async fn append(&self, request: &Request, job: JobId) -> Answered {
        match self.bug {
            Bug::LostLastLine => self.append_but_the_last(request, job).await,
            Bug::UploadOffByOne => self.append_too_early(request, job).await,
            Bug::CredentialInUrl => {
                let mut request = request.clone();
                let uri = format!("{}&job_token={}", request.parts.uri, request.token());
                request.parts.uri = Uri::try_from(uri).expect("a token is made of a URL's characters");
                self.send(&request).await
            }
            Bug::CancelUnheard => self.unheard(request, StatusCode::ACCEPTED).await,
            Bug::RetryStorm => self.send_in_a_storm(request).await,
            _ => self.send(request).await,
        }
    }

    /// GitLab's answer without its word on the job.
    async fn unheard(&self, request: &Request, taken: StatusCode) -> Answered {
        let mut answered = self.send(request).await?;
        answered.headers_mut().remove("job-status");
        if answered.status() == StatusCode::FORBIDDEN {
            *answered.status_mut() = taken;
        }
        Ok(answered)
    }

    /// The last byte waits for the next piece.
    async fn append_but_the_last(&self, request: &Request, job: JobId) -> Answered {
        let before = self.kept().held_back.remove(&job);
        let (mut offset, mut bytes) = (request.offset(), request.body.clone());
        let follows = |(at, held): &(u64, Bytes)| at + held.len() as u64 == offset;
        if let Some((at, held)) = before.clone().filter(follows) {
            (offset, bytes) = (at, [held, bytes].concat().into());
        }
        let last = bytes.split_off(bytes.len().saturating_sub(1));
        let end = offset + bytes.len() as u64;
        let answered = if bytes.is_empty() {
            answer(StatusCode::ACCEPTED)
        } else {
            self.send(&request.with_piece(offset, bytes)).await
        };
        let held = match &answered {
            Ok(response) if response.status() == StatusCode::ACCEPTED => Some((end, last)),
            // GitLab has named the place from which it goes on.
            Ok(response) if response.status() == StatusCode::RANGE_NOT_SATISFIABLE => None,
            _ => before,
        };
        if let Some(held) = held {
            self.kept().held_back.insert(job, held);
        }
        answered
    }

    /// Once GitLab has asked for other bytes, each piece is taken from one byte before its place.
    async fn append_too_early(&self, request: &Request, job: JobId) -> Answered {
        let offset = usize::try_from(request.offset()).unwrap_or(0);
        let early = {
            let mut kept = self.kept();
            let trace = kept.traces.entry(job).or_default();
            trace.resize(offset, b'?');
            trace.extend_from_slice(&request.body);
            let from = offset.saturating_sub(1);
            let early = Bytes::copy_from_slice(&trace[from..from + request.body.len()]);
            kept.refused.contains(&job).then_some(early)
        };
        let sent = early.map_or_else(|| request.clone(), |early| request.with_piece(request.offset(), early));
        let answered = self.send(&sent).await?;
        if answered.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            self.kept().refused.insert(job);
        }
        Ok(answered)
    }
}
