//! The runner's half of GitLab's API, with the retries, headers and readings of answers of 19.3.
//!
//! Every call carries an `X-Request-Id` that stays the same over its HTTP-level retries (up to five
//! attempts of the same body for 408, 429, 500, 502, 503, 504 and from 512 on).

use serde::Serialize;
use serde_json::value::RawValue;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use ureq::http::{HeaderMap, Method, Request, StatusCode};

/// Attempts of one call at HTTP level.
const ATTEMPTS_MAX: u32 = 5;
/// First pause between attempts where GitLab names none; doubled each time, up to a minute.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Bound of the pauses that this program chooses itself.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A job with all its variables; GitLab's own are a few hundred KiB at most.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// The official client's limits.
const CONNECT_MAX: Duration = Duration::from_secs(30);
const ANSWER_MAX: Duration = Duration::from_secs(10 * 60);
const EXCHANGE_MAX: Duration = Duration::from_secs(60 * 60);
const IDLE_MAX: Duration = Duration::from_secs(90);

/// Why a call got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The connection failed, or the answer was cut.
    #[error("call GitLab")]
    Http(#[source] ureq::Error),
    /// URL or token have characters that no request can carry.
    #[error("build the request")]
    Request(#[source] ureq::http::Error),
}

/// A complete answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header's text; empty if it is missing or no text.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// What `Job-Status` and the status say about the job.
    fn job_wish(&self) -> Option<JobWish> {
        match self.header("Job-Status") {
            "canceled" | "failed" => Some(JobWish::Abort),
            "canceling" => Some(JobWish::Cancel),
            _ if self.status == StatusCode::FORBIDDEN => Some(JobWish::Abort),
            _ => None,
        }
    }

    /// The pause between two PATCHes that GitLab asks for; zero, negative and garbled values are ignored.
    fn interval(&self) -> Option<Duration> {
        let seconds: u64 = self.header("X-GitLab-Trace-Update-Interval").parse().ok()?;
        (seconds > 0).then(|| Duration::from_secs(seconds))
    }
}

/// What GitLab wants of the job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum JobWish {
    Abort,
    Cancel,
}

/// Outcome of `jobs/request`.
pub(crate) enum Polled {
    /// A job, as its 201's body, and the id of that answer.
    Job { body: Vec<u8>, correlation_id: String },
    /// None now, or an answer that is as good as none.
    Nothing,
    /// 403: the runner token is not valid.
    Forbidden,
}

/// Outcome of a PATCH or PUT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reported {
    pub(crate) outcome: Outcome,
    /// GitLab asks to end the script but to run `after_script`.
    pub(crate) cancel: bool,
    /// The pause until the next tick, if GitLab names one.
    pub(crate) interval: Option<Duration>,
}

/// What became of a PATCH or PUT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// Taken; for a PATCH all its bytes are.
    Accepted,
    /// PATCH only: GitLab wants bytes from this offset on.
    WantsOffset(usize),
    /// Final PUT only: taken, but the log is still being stored; to be asked again.
    NotCompleted,
    /// Final PUT only: the log must be sent again from its beginning.
    TraceInvalid,
    /// No such job.
    NotFound,
    /// The job is over for GitLab.
    Abort,
    /// Anything else, also no answer.
    Failed,
}

/// Body of `PUT /jobs/:id`, members in the recorded order.
#[derive(Serialize)]
pub(crate) struct Update<'a> {
    info: &'a RawValue,
    token: &'a str,
    pub(crate) state: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) failure_reason: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    checksum: String,
    output: Output,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) exit_code: i32,
}

#[derive(Serialize)]
struct Output {
    #[serde(skip_serializing_if = "str::is_empty")]
    checksum: String,
    #[serde(skip_serializing_if = "is_zero_size")]
    bytesize: usize,
}

#[derive(Serialize)]
struct Poll<'a> {
    info: &'a RawValue,
    token: &'a str,
    system_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    last_update: &'a str,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_zero(number: &i32) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_zero_size(number: &usize) -> bool {
    *number == 0
}

/// The connection to one GitLab on behalf of one runner.
pub(crate) struct Api {
    agent: ureq::Agent,
    /// With `/api/v4/`.
    base: String,
    info: Box<RawValue>,
    user_agent: String,
    runner_token: String,
    system_id: String,
    last_update: Mutex<String>,
}

/// A job's id and token: what its calls are made with.
#[derive(Clone)]
pub(crate) struct JobKey {
    pub(crate) id: u64,
    pub(crate) token: String,
}

impl Api {
    /// A client for `url` (from config.toml); makes no call.
    pub(crate) fn new(url: &str, runner_token: &str, system_id: &str, executor: &str) -> Self {
        Self {
            agent: agent(0),
            base: base_url(url),
            info: crate::info::json(executor),
            user_agent: crate::info::user_agent(),
            runner_token: runner_token.to_owned(),
            system_id: system_id.to_owned(),
            last_update: Mutex::default(),
        }
    }

    /// Asks for a job.
    pub(crate) fn request_job(&self) -> Polled {
        let last_update = self.last_update().clone();
        let poll =
            Poll { info: &self.info, token: &self.runner_token, system_id: &self.system_id, last_update: &last_update };
        let body = serde_json::to_vec(&poll).expect("strings always serialise");
        let headers = [
            ("Accept", "application/json"),
            ("Content-Type", "application/json"),
            ("Runner-Token", self.runner_token.as_str()),
        ];
        let answer = match self.call(&Method::POST, "jobs/request", &headers, &body) {
            Ok(answer) => answer,
            Err(error) => {
                crate::log(&format!("WARNING: checking for jobs... failed: {}", crate::chain(&error)));
                return Polled::Nothing;
            }
        };
        match answer.header("X-GitLab-Last-Update") {
            "" => {}
            last_update => last_update.clone_into(&mut self.last_update()),
        }
        let is_json = answer.header("Content-Type").split(';').next() == Some("application/json");
        match answer.status.as_u16() {
            201 if is_json => {
                Polled::Job { correlation_id: answer.header("X-Request-Id").to_owned(), body: answer.body }
            }
            204 => Polled::Nothing,
            403 => Polled::Forbidden,
            status => {
                crate::log(&format!("WARNING: checking for jobs... failed: status {status}"));
                Polled::Nothing
            }
        }
    }

    /// The body of an update without a word about the log, as the early one has it.
    pub(crate) fn update<'a>(&'a self, job: &'a JobKey, state: &'static str) -> Update<'a> {
        let output = Output { checksum: String::new(), bytesize: 0 };
        Update {
            info: &self.info,
            token: &job.token,
            state,
            failure_reason: "",
            checksum: String::new(),
            output,
            exit_code: 0,
        }
    }

    /// Sends `PUT /jobs/:id`.
    pub(crate) fn put(&self, job: &JobKey, update: &Update<'_>) -> Reported {
        let body = serde_json::to_vec(update).expect("strings and numbers always serialise");
        let headers = [("Content-Type", "application/json"), ("Job-Token", job.token.as_str())];
        let answer = self.call(&Method::PUT, &format!("jobs/{}", job.id), &headers, &body);
        reported(answer, "update the job", |answer| match answer.status.as_u16() {
            200 => Outcome::Accepted,
            202 => Outcome::NotCompleted,
            404 => Outcome::NotFound,
            412 => Outcome::TraceInvalid,
            _ => Outcome::Failed,
        })
    }

    /// Sends `PATCH /jobs/:id/trace`: `bytes` of the log from `start` on.
    pub(crate) fn patch(&self, job: &JobKey, bytes: &[u8], start: usize, debug_trace: bool) -> Reported {
        let range = format!("{start}-{}", start + bytes.len() - 1);
        let headers =
            [("Content-Range", range.as_str()), ("Content-Type", "text/plain"), ("Job-Token", job.token.as_str())];
        let path = format!("jobs/{}/trace?debug_trace={debug_trace}", job.id);
        let answer = self.call(&Method::PATCH, &path, &headers, bytes);
        reported(answer, "send the log", |answer| match answer.status.as_u16() {
            202 => Outcome::Accepted,
            404 => Outcome::NotFound,
            // The number behind the dash is a size; without one, all is sent again.
            416 => Outcome::WantsOffset(
                answer.header("Range").rsplit_once('-').and_then(|(_, size)| size.parse().ok()).unwrap_or(0),
            ),
            _ => Outcome::Failed,
        })
    }

    fn last_update(&self) -> MutexGuard<'_, String> {
        crate::locked(&self.last_update)
    }

    fn call(&self, method: &Method, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer, ApiError> {
        let request_id = crate::random_hex(32);
        let mut headers = headers.to_vec();
        headers.push(("X-Request-Id", &request_id));
        let url = format!("{}{path}", self.base);
        with_retries(|| call_once(&self.agent, method, &url, &self.user_agent, &headers, body))
    }
}

/// Reads an answer about a job: first what GitLab wants of it, then what the call made of it.
fn reported(answer: Result<Answer, ApiError>, what: &str, read: impl Fn(&Answer) -> Outcome) -> Reported {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            crate::log(&format!("WARNING: failed to {what}: {}", crate::chain(&error)));
            return Reported { outcome: Outcome::Failed, cancel: false, interval: None };
        }
    };
    let wish = answer.job_wish();
    let outcome = if wish == Some(JobWish::Abort) { Outcome::Abort } else { read(&answer) };
    if outcome != Outcome::Accepted {
        crate::log(&format!("WARNING: failed to {what}: status {}, {outcome:?}", answer.status.as_u16()));
    }
    Reported { outcome, cancel: wish == Some(JobWish::Cancel), interval: answer.interval() }
}

/// A client that follows at most this many redirects.
pub(crate) fn agent(redirects_max: u32) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(redirects_max)
        .max_redirects_will_error(false)
        // In a guest the URL is the relay's, never behind a proxy.
        .proxy(None)
        .accept("")
        .user_agent("")
        .timeout_connect(Some(CONNECT_MAX))
        .timeout_recv_response(Some(ANSWER_MAX))
        .timeout_global(Some(EXCHANGE_MAX))
        .max_idle_age(IDLE_MAX)
        .build()
        .new_agent()
}

/// The configured URL with the API's path, as all calls need it.
pub(crate) fn base_url(url: &str) -> String {
    let url = url.trim_end_matches('/');
    format!("{}/api/v4/", url.strip_suffix("/ci").unwrap_or(url))
}

/// Repeats `attempt` while its answer says that another one may help, at most five times.
///
/// # Errors
/// Those of the attempt: without an answer nothing is repeated at this level.
pub(crate) fn with_retries(attempt: impl Fn() -> Result<Answer, ApiError>) -> Result<Answer, ApiError> {
    repeated(attempt, |answer| {
        let wanted = wanted_pause(answer.header("RateLimit-ResetTime"), answer.header("Retry-After"));
        is_retried(answer.status).then_some(wanted)
    })
}

/// The attempts of one request. `failed` tells whether another may help: the pause that the answer asks for; zero: none.
///
/// # Errors
/// Those of the attempt.
pub(crate) fn repeated<A, E>(
    attempt: impl Fn() -> Result<A, E>,
    failed: impl Fn(&A) -> Option<Duration>,
) -> Result<A, E> {
    let mut own = FIRST_PAUSE;
    for _ in 1..ATTEMPTS_MAX {
        let answer = attempt()?;
        let Some(wanted) = failed(&answer) else { return Ok(answer) };
        if wanted.is_zero() {
            std::thread::sleep(own);
            own = (own * 2).min(PAUSE_MAX);
        } else {
            std::thread::sleep(wanted);
        }
    }
    attempt()
}

/// Whether 19.3 sends the same request again after this status.
pub(crate) fn is_retried(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504 | 512..)
}

/// The pause that an answer asks for: until `RateLimit-ResetTime` (a date), else `Retry-After` in whole seconds. Zero: none.
pub(crate) fn wanted_pause(reset_time: &str, retry_after: &str) -> Duration {
    let reset = jiff::fmt::rfc2822::parse(&reset_time.replace(" GMT", " +0000"));
    let until = reset.ok().and_then(|at| Duration::try_from(at.timestamp() - jiff::Timestamp::now()).ok());
    until.filter(|pause| !pause.is_zero()).unwrap_or_else(|| Duration::from_secs(retry_after.parse().unwrap_or(0)))
}

/// One HTTP exchange.
///
/// # Errors
/// [`ApiError`]: no complete answer.
pub(crate) fn call_once(
    agent: &ureq::Agent,
    method: &Method,
    url: &str,
    user_agent: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer, ApiError> {
    let mut request = Request::builder().method(method).uri(url).header("User-Agent", user_agent);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = if method == Method::GET {
        agent.run(request.body(()).map_err(ApiError::Request)?)
    } else {
        agent.run(request.body(body).map_err(ApiError::Request)?)
    };
    let (parts, body) = answer.map_err(ApiError::Http)?.into_parts();
    let body = body.into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec().map_err(ApiError::Http)?;
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}

impl Update<'_> {
    /// Adds the log's checksum and size.
    pub(crate) fn with_trace(mut self, (checksum, bytesize): (String, usize)) -> Self {
        self.checksum.clone_from(&checksum);
        self.output = Output { checksum, bytesize };
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &'static str)]) -> Answer {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, ureq::http::HeaderValue::from_static(value));
        }
        Answer { status: StatusCode::from_u16(status).expect("a status"), headers: map, body: Vec::new() }
    }

    #[test]
    fn an_update_has_the_recorded_members_in_the_recorded_order() {
        let api = Api::new("http://192.0.2.1/", "glrt-x", "s_0123456789ab", "shell");
        let job = JobKey { id: 7, token: "JT".to_owned() };
        let text = |update: &Update<'_>| {
            let text = serde_json::to_string(update).expect("serialises");
            text.split_once(",\"token\"").expect("info comes first").1.to_owned()
        };
        assert_eq!(text(&api.update(&job, "running")), r#":"JT","state":"running","output":{}}"#);
        let empty = api.update(&job, "success").with_trace(("crc32:00000000".to_owned(), 0));
        assert_eq!(
            text(&empty),
            r#":"JT","state":"success","checksum":"crc32:00000000","output":{"checksum":"crc32:00000000"}}"#
        );
        let mut failed = api.update(&job, "failed").with_trace(("crc32:0000000a".to_owned(), 9));
        (failed.failure_reason, failed.exit_code) = ("script_failure", 3);
        assert_eq!(
            text(&failed),
            r#":"JT","state":"failed","failure_reason":"script_failure","checksum":"crc32:0000000a","output":{"checksum":"crc32:0000000a","bytesize":9},"exit_code":3}"#
        );
    }

    #[test]
    fn the_statuses_of_19_3_are_retried_and_no_others() {
        for status in [408, 429, 500, 502, 503, 504, 520] {
            assert!(is_retried(StatusCode::from_u16(status).expect("a status")), "{status}");
        }
        for status in [200, 202, 400, 401, 403, 404, 409, 416, 501, 505, 511] {
            assert!(!is_retried(StatusCode::from_u16(status).expect("a status")), "{status}");
        }
    }

    #[test]
    fn a_pause_is_a_date_in_reset_time_else_seconds_in_retry_after() {
        let seconds = |reset_time: &str, retry_after| wanted_pause(reset_time, retry_after).as_secs();
        let past = "Wed, 21 Oct 2015 07:28:00 GMT";
        assert_eq!([seconds("", "2"), seconds("", past), seconds("", "0"), seconds("", "-1")], [2, 0, 0, 0]);
        assert_eq!([seconds(past, "9"), seconds(past, "0")], [9, 0]);
        let soon = jiff::Timestamp::now() + Duration::from_secs(30);
        let until = seconds(&soon.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string(), "9");
        assert!((25..=30).contains(&until), "{until}");
    }

    #[test]
    fn job_status_and_403_decide_over_the_job() {
        assert_eq!(answer(202, &[("Job-Status", "canceled")]).job_wish(), Some(JobWish::Abort));
        assert_eq!(answer(403, &[]).job_wish(), Some(JobWish::Abort));
        assert_eq!(answer(200, &[("Job-Status", "canceling")]).job_wish(), Some(JobWish::Cancel));
        for other in ["running", "success", "pending", "skipped"] {
            assert_eq!(answer(202, &[("Job-Status", other)]).job_wish(), None, "{other}");
        }
    }

    #[test]
    fn a_useless_interval_is_ignored() {
        for value in ["0", "-3", "soon", ""] {
            assert_eq!(answer(202, &[("X-GitLab-Trace-Update-Interval", value)]).interval(), None, "{value}");
        }
        assert_eq!(answer(202, &[("X-GitLab-Trace-Update-Interval", "60")]).interval(), Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_url_may_have_a_path_and_slashes_at_its_end() {
        assert_eq!(base_url("http://192.0.2.1"), "http://192.0.2.1/api/v4/");
        assert_eq!(base_url("http://h/gitlab//"), "http://h/gitlab/api/v4/");
        assert_eq!(base_url("http://h/ci"), "http://h/api/v4/");
    }
}
