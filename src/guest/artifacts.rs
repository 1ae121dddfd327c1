//! Artifacts and the environment key: the three routes that go on to GitLab, streaming both ways.
//!
//! What goes on is made anew from what passed an allow-list (threats.md §6.1, §6.2), with our token;
//! what comes back is GitLab's true status and body, with the headers of another allow-list; how an
//! outage of GitLab's is bridged stands in `outage`. Bodies are never stored, and a body that
//! breaks off on one side breaks off on the other.

use super::answer::{self, Answer};
use super::body::{Held, Pace, Paced, RequestBody};
use super::handler::Handler;
use super::outage::{self, WAIT_MAX};
use super::routes::{JobRoute, Query};
use super::trace::is_over;
use crate::clock::Clock;
use crate::gitlab::{Forward, ForwardRoute, JobId, transport};
use crate::secret::Secret;
use crate::telemetry::chain;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// GitLab may pause this long within an answer: a slow object store behind it.
const GITLAB_PAUSE: Duration = Duration::from_secs(300);
/// A request beyond the rate of forwarded ones is delayed by at most this, then answered 429.
const FORWARD_DELAY_MAX: Duration = Duration::from_secs(10);
/// A signed URL of an object store at most.
const LOCATION_BYTES_MAX: usize = 8 * 1024;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const RESET_TIME: HeaderName = HeaderName::from_static("ratelimit-resettime");
/// Headers of GitLab's answer that pass as they are.
const PASSED_BACK: [HeaderName; 5] = [
    header::CONTENT_TYPE,
    header::CONTENT_RANGE,
    header::ACCEPT_RANGES,
    header::CONTENT_DISPOSITION,
    HeaderName::from_static("job-status"),
];

impl Handler {
    /// Sends one request on. `dependency` is the token for another job's artifacts.
    pub(super) async fn artifacts(
        &self,
        id: JobId,
        route: JobRoute,
        dependency: Option<&Secret>,
        parts: &Parts,
        query: Query,
        body: RequestBody,
    ) -> Answer {
        if is_over(&self.view()) {
            return self.refuse_over();
        }
        let Some(headers) = request_headers(route, &parts.headers) else {
            return self.refuse(StatusCode::BAD_REQUEST, "content_type");
        };
        match self.forwards.take(1, FORWARD_DELAY_MAX) {
            Some(Duration::ZERO) => {}
            Some(delay) => tokio::time::sleep(delay).await,
            None => {
                self.metrics().refused.inc("forward_rate");
                return answer::come_again_after(StatusCode::TOO_MANY_REQUESTS, FORWARD_DELAY_MAX);
            }
        }
        // More transfers than GitLab grants one job wait here, for one stall at most.
        let permit = match timeout(self.limits().stall, Arc::clone(&self.transfers).acquire_owned()).await {
            Ok(permit) => permit.expect("never closed"),
            Err(_) => return answer::come_again(StatusCode::TOO_MANY_REQUESTS),
        };
        // Whoever asks GitLab to stream follows a redirect as it likes, with the job's token.
        let asked = route == JobRoute::Download && query.get("direct_download") == Some("true");
        let redirected = self.direct_download && asked;
        let query = self.query(route, query);
        let deadline = Instant::now() + self.limits().transfer_total;
        let up = Pace { stall: self.limits().stall, deadline, bytes: self.metrics().artifact_up_bytes.clone() };
        let down = Pace { stall: GITLAB_PAUSE, deadline, bytes: self.metrics().artifact_down_bytes.clone() };
        let forward = match route {
            JobRoute::Upload => {
                let body = body.into_stream(up).boxed_unsync();
                Forward { route: ForwardRoute::UploadArtifacts, query, headers, body }
            }
            JobRoute::Download => {
                let route = ForwardRoute::DownloadArtifacts(id);
                Forward { route, query, headers, body: transport::full("") }
            }
            _ => Forward { route: ForwardRoute::RuntimeEnvironmentKey, query, headers, body: transport::full("") },
        };
        let Some(answer) = self.forward(forward, dependency, deadline).await else {
            return self.bridged(route, parts, answer::error(StatusCode::BAD_GATEWAY)).await;
        };
        let (status, length) = (answer.status(), answer.body().size_hint().exact());
        let Some(mut headers) = response_headers(status, answer.headers(), redirected, &self.clock) else {
            self.metrics().refused.inc("redirect");
            self.not_redirected.log(|line| {
                let (method, status, direct_download) = (&parts.method, status.as_u16(), self.direct_download);
                tracing::info!(vm = %self.vm(), job = %self.job, %method, status, asked, direct_download, "{line}");
            });
            return answer::error(StatusCode::BAD_GATEWAY);
        };
        // Where the body knows its length, hyper frames it so; else GitLab's word for it stands.
        if length.is_none()
            && status != StatusCode::NOT_MODIFIED
            && let Some(told) = answer.headers().get(header::CONTENT_LENGTH)
        {
            headers.insert(header::CONTENT_LENGTH, told.clone());
        }
        let mut passed = Response::new(());
        *passed.status_mut() = status;
        *passed.headers_mut() = headers;
        let passed = passed.map(|()| Held::new(Paced::new(answer.into_body(), down), permit).boxed_unsync());
        self.bridged(route, parts, passed).await
    }

    /// GitLab's answer; `None`: there was none.
    async fn forward(
        &self,
        forward: Forward,
        dependency: Option<&Secret>,
        deadline: Instant,
    ) -> Option<Response<transport::Body>> {
        match timeout_at(deadline, self.client.forward(forward, dependency)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => {
                let error = chain(&error);
                self.not_forwarded.log(|line| tracing::info!(vm = %self.vm(), job = %self.job, error, "{line}"));
            }
            Err(_) => {}
        }
        None
    }

    /// The answer, if it is a failure of GitLab's, as one after which the runner comes again late enough.
    async fn bridged(&self, route: JobRoute, parts: &Parts, mut answer: Answer) -> Answer {
        let outage = if route == JobRoute::Upload { &self.uploads } else { &self.fetches };
        let Some(wait) = outage.note(answer.status()) else { return answer };
        if outage::waits_for_nobody(&parts.headers) {
            tokio::time::sleep(WAIT_MAX).await;
            return answer;
        }
        let headers = answer.headers_mut();
        let told = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        headers.insert(header::RETRY_AFTER, HeaderValue::from(told.unwrap_or(0).max(wait.as_secs())));
        // Which would go before it.
        headers.remove(&RESET_TIME);
        answer
    }

    /// The pairs that go on. A direct download would be a redirect to a store that the guest may
    /// not reach; without the key GitLab streams (decision D7).
    fn query(&self, route: JobRoute, query: Query) -> Vec<(String, String)> {
        let mut pairs = query.pairs;
        if route == JobRoute::Download && !self.direct_download {
            pairs.retain(|(key, value)| key == "download_mode" && value == "proxy");
        }
        pairs
    }
}

/// The headers that go on; `None` if an upload's type is not the one that GitLab takes.
pub fn request_headers(route: JobRoute, headers: &HeaderMap) -> Option<HeaderMap> {
    let mut passed = HeaderMap::new();
    let mut pass = |name: HeaderName, fits: fn(&str) -> bool| {
        // Of a repeated header nothing passes: which one counts is a matter of opinion.
        let mut values = headers.get_all(&name).iter();
        if let (Some(value), None) = (values.next(), values.next())
            && value.to_str().is_ok_and(fits)
        {
            passed.insert(name, value.clone());
            return true;
        }
        false
    };
    pass(header::ACCEPT, |accept| accept.len() <= 256);
    pass(X_REQUEST_ID, is_request_id);
    match route {
        JobRoute::Upload if !pass(header::CONTENT_TYPE, is_multipart) => return None,
        JobRoute::Download => {
            pass(header::RANGE, is_range);
        }
        _ => {}
    }
    Some(passed)
}

fn is_request_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

fn is_multipart(content_type: &str) -> bool {
    let (kind, parameters) = content_type.split_once(';').unwrap_or((content_type, ""));
    kind.eq_ignore_ascii_case("multipart/form-data") && parameters.len() <= 256
}

fn is_range(range: &str) -> bool {
    let digits = |range: &str| range.bytes().all(|byte| byte.is_ascii_digit() || b"-, ".contains(&byte));
    range.len() <= 128 && range.strip_prefix("bytes=").is_some_and(digits)
}

/// The headers that come back; `None` for an answer that must not: a redirect where none may pass
/// (`redirected`: one may), or no final status at all.
pub fn response_headers(status: StatusCode, headers: &HeaderMap, redirected: bool, clock: &Clock) -> Option<HeaderMap> {
    if status.is_informational() {
        return None;
    }
    let mut passed = HeaderMap::new();
    for name in PASSED_BACK {
        if let Some(value) = headers.get(&name) {
            passed.insert(name, value.clone());
        }
    }
    if let Some(id) = headers.get(X_REQUEST_ID).filter(|id| id.to_str().is_ok_and(is_request_id)) {
        passed.insert(X_REQUEST_ID, id.clone());
    }
    if let Some(wait) = headers.get(header::RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, clock)) {
        passed.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    }
    if let Some(at) = headers.get(&RESET_TIME).and_then(|value| reset_time(value.to_str().ok()?, clock)) {
        passed.insert(RESET_TIME, at);
    }
    if status.is_redirection() {
        let location = headers.get(header::LOCATION).filter(|location| redirected && is_location(location))?;
        passed.insert(header::LOCATION, location.clone());
    }
    Some(passed)
}

fn is_location(location: &HeaderValue) -> bool {
    location.len() <= LOCATION_BYTES_MAX
        && location.to_str().is_ok_and(|url| url.starts_with("https://") || url.starts_with("http://"))
}

/// Whole seconds (or a date, which the official runner does not read), clamped. Anything else is
/// dropped: the runner then waits by its own rule.
fn retry_after(value: &str, clock: &Clock) -> Option<Duration> {
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        value.parse().map_or(Duration::MAX, Duration::from_secs)
    } else {
        Duration::try_from(date(value)?.duration_since(clock.now())).unwrap_or(Duration::ZERO)
    };
    Some(wait.min(WAIT_MAX))
}

/// A date, clamped to the same distance from now.
fn reset_time(value: &str, clock: &Clock) -> Option<HeaderValue> {
    let now = clock.now();
    let latest = now.checked_add(WAIT_MAX).ok()?;
    let at = date(value)?.clamp(now, latest);
    let text = rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).ok()?;
    HeaderValue::try_from(text).ok()
}

fn date(value: &str) -> Option<Timestamp> {
    rfc2822::DateTimeParser::new().parse_timestamp(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> Clock {
        Clock::simulated("2026-01-02T12:00:00Z".parse().unwrap())
    }

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::try_from(*value).unwrap());
        }
        map
    }

    /// T5, T8: what goes on to GitLab is named here, and nothing else goes.
    #[tokio::test(start_paused = true)]
    async fn only_listed_headers_go_on() {
        let sent = map(&[
            ("user-agent", "gitlab-runner 19.3.0 (x; go1.25; linux/amd64)"),
            ("accept", "a/b"),
            ("content-type", "multipart/form-data; boundary=x"),
            ("range", "bytes=0-0"),
            ("x-request-id", "0123abcd"),
            ("job-token", "t"),
            ("private-token", "t"),
            ("authorization", "t"),
            ("cookie", "t"),
            ("job_token", "t"),
            ("x-forwarded-for", "1.2.3.4"),
            ("connection", "x-request-id"),
            ("transfer-encoding", "chunked"),
            ("content-length", "9"),
        ]);
        let passed = request_headers(JobRoute::Upload, &sent).unwrap();
        let expected = map(&[
            ("accept", "a/b"),
            ("x-request-id", "0123abcd"),
            ("content-type", "multipart/form-data; boundary=x"),
        ]);
        assert_eq!(passed, expected);
        assert_eq!(request_headers(JobRoute::Download, &sent).unwrap().get("range").unwrap(), "bytes=0-0");
        assert_eq!(request_headers(JobRoute::EnvironmentKey, &sent).unwrap().len(), 2);
        assert!(request_headers(JobRoute::Upload, &map(&[("content-type", "application/json")])).is_none());
        let odd = map(&[("x-request-id", "a b"), ("range", "lines=1"), ("accept", "x"), ("accept", "y")]);
        assert!(request_headers(JobRoute::Download, &odd).unwrap().is_empty());
    }

    /// T29: of GitLab's headers the guest sees a list.
    #[tokio::test(start_paused = true)]
    async fn only_listed_headers_come_back() {
        let mut sent = map(&[
            ("content-type", "application/zip"),
            ("accept-ranges", "bytes"),
            ("content-disposition", "attachment"),
            ("job-status", "running"),
            ("x-request-id", "r-1"),
            ("set-cookie", "a=b"),
            ("server", "nginx"),
            ("x-gitlab-meta", "{}"),
            ("link", "<x>"),
            ("alt-svc", "h3"),
            ("connection", "close"),
            ("location", "https://elsewhere.example/"),
        ]);
        for n in 0..300 {
            sent.insert(HeaderName::try_from(format!("x-{n}")).unwrap(), HeaderValue::from_static("y"));
        }
        let passed = response_headers(StatusCode::OK, &sent, true, &clock()).unwrap();
        assert_eq!(passed.len(), 5);
        assert!(!passed.contains_key("location") && !passed.contains_key("set-cookie"));
    }

    /// T26: a redirect passes only where the site allows direct downloads.
    #[tokio::test(start_paused = true)]
    async fn a_redirect_passes_only_to_a_direct_download() {
        let sent = map(&[("location", "https://store.example/x?sig=1")]);
        for status in [301, 302, 303, 307, 308] {
            let status = StatusCode::from_u16(status).unwrap();
            assert!(response_headers(status, &sent, false, &clock()).is_none());
            let passed = response_headers(status, &sent, true, &clock()).unwrap();
            assert_eq!(passed.get("location").unwrap(), "https://store.example/x?sig=1");
            assert!(response_headers(status, &map(&[("location", "/relative")]), true, &clock()).is_none());
            assert!(response_headers(status, &map(&[]), true, &clock()).is_none());
        }
        assert!(response_headers(StatusCode::SWITCHING_PROTOCOLS, &map(&[]), true, &clock()).is_none());
    }

    /// T30: absurd waits.
    #[tokio::test(start_paused = true)]
    async fn waits_are_clamped_or_dropped() {
        for (value, expected) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("61", Some(60)),
            ("1000000000000000000", Some(60)),
            ("99999999999999999999999", Some(60)),
            ("-1", None),
            ("NaN", None),
            ("", None),
            ("Fri, 02 Jan 2026 12:00:10 GMT", Some(10)),
            ("Mon, 01 Nov 9999 00:00:00 GMT", Some(60)),
            // Beyond what a timestamp can be: no date.
            ("Fri, 31 Dec 9999 23:59:59 GMT", None),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
        ] {
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(value, &clock()), expected, "{value}");
        }
        let reset = |value| reset_time(value, &clock());
        assert_eq!(reset("Fri, 02 Jan 2026 12:00:10 GMT").unwrap(), "Fri, 02 Jan 2026 12:00:10 GMT");
        assert_eq!(reset("Mon, 01 Nov 9999 00:00:00 GMT").unwrap(), "Fri, 02 Jan 2026 12:01:00 GMT");
        assert_eq!(reset("Thu, 01 Jan 1970 00:00:00 GMT").unwrap(), "Fri, 02 Jan 2026 12:00:00 GMT");
        assert_eq!(reset("soon"), None);
    }
}
