//! Reading GitLab's answers: bodies within bounds, headers within limits, statuses as errors.
//!
//! Nothing here trusts what came: each number is clamped (threats.md T30), each text is cut and
//! cleaned, each body has a bound in bytes and in time (T27). Nothing is decompressed: we never ask
//! for it, so compressed bytes are bytes like any other.

use super::transport::Body;
use super::{GitlabError, JobStatus};
use crate::secret::Secret;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, DATE, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER};
use http::{Response, StatusCode};
use http_body_util::BodyExt as _;
use std::time::Duration;

/// What we read of an answer whose body says nothing to us but perhaps an error's text.
const SMALL_BYTES_MAX: usize = 64 * 1024;
/// How long we read such a body: its status is the answer, the rest only lets the connection live.
const SMALL_READ: Duration = Duration::from_secs(5);
/// GitLab's longest word on when to come back that we believe.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);
/// 429 without a time. GitLab counts per minute, and not all of its limiters say when to come back.
const RATE_LIMIT_DEFAULT: Duration = Duration::from_secs(10);
/// Of a redirect's target, within the 200 that a message has.
const TARGET_CHARS_MAX: usize = 140;
/// As the official runner (`MaxUpdateInterval`).
const INTERVAL_MAX: Duration = Duration::from_secs(15 * 60);

/// A body that was read within bounds.
pub(super) struct Read {
    /// What came.
    pub(super) bytes: Bytes,
    /// Why it is not all: `None` if it is.
    pub(super) cut: Option<String>,
}

/// Reads at most `bytes_max` bytes; the rest, and its connection, are given up.
pub(super) async fn read(mut body: Body, bytes_max: usize) -> Read {
    let mut bytes = BytesMut::new();
    loop {
        let cut = match body.frame().await {
            None => None,
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                let room = bytes_max - bytes.len();
                bytes.extend_from_slice(&data[..data.len().min(room)]);
                if data.len() <= room {
                    continue;
                }
                Some(format!("longer than {bytes_max} bytes"))
            }
            Some(Err(error)) => Some(format!("broke off after {} bytes: {}", bytes.len(), chain(&*error))),
        };
        return Read { bytes: bytes.freeze(), cut };
    }
}

/// Reads the body of an answer whose status says it all. A body that breaks, stalls or never
/// ends changes nothing about the status.
pub(super) async fn read_small(body: Body) -> Bytes {
    tokio::time::timeout(SMALL_READ, read(body, SMALL_BYTES_MAX)).await.map(|read| read.bytes).unwrap_or_default()
}

/// An error and all its causes, for a text.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = clean(&error.to_string(), 200);
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&clean(&error.to_string(), 200));
        cause = error.source();
    }
    text
}

/// Whether the answer is a page for people: no answer of GitLab's API, whatever its status says
/// (a login or maintenance page of something in between: G22).
pub fn is_page(headers: &HeaderMap) -> bool {
    media_type(headers)
        .is_some_and(|t| t.eq_ignore_ascii_case("text/html") || t.eq_ignore_ascii_case("application/xhtml+xml"))
}

/// Whether the answer says that it is JSON.
pub fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|t| t.eq_ignore_ascii_case("application/json"))
}

/// The content type without its parameters.
pub fn media_type(headers: &HeaderMap) -> Option<&str> {
    text(headers, &CONTENT_TYPE)?.split(';').next().map(str::trim)
}

fn text(headers: &HeaderMap, name: impl http::header::AsHeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim)
}

/// What the headers of an answer say about the job. Words that we don't know mean that it runs on,
/// as the official runner reads them.
pub fn job_status<T>(response: &Response<T>) -> JobStatus {
    if response.status() == StatusCode::FORBIDDEN {
        return JobStatus::Over;
    }
    match text(response.headers(), "job-status") {
        Some("canceling") => JobStatus::Canceling,
        Some("canceled" | "failed") => JobStatus::Over,
        _ => JobStatus::Running,
    }
}

/// `X-GitLab-Trace-Update-Interval`, in seconds, clamped; `None` if there is no number.
pub fn update_interval(headers: &HeaderMap) -> Option<Duration> {
    let text = text(headers, "x-gitlab-trace-update-interval")?;
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let seconds = whole_number(digits)?;
    Some(Duration::from_secs(if negative { 1 } else { seconds }).clamp(Duration::from_secs(1), INTERVAL_MAX))
}

/// Digits only; what is too large for a u64 is the largest.
fn whole_number(digits: &str) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().unwrap_or(u64::MAX))
}

/// When to come back: `RateLimit-ResetTime` (a date, RFC 1123), else `Retry-After` (whole seconds
/// only, as the official runner reads it).
///
/// The date is compared with the same answer's `Date`, so a clock that differs from GitLab's
/// (G21) changes nothing; without a `Date` it says nothing.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let reset = date(headers, "ratelimit-resettime").zip(date(headers, DATE));
    let reset = reset.map(|(reset, now)| Duration::try_from(reset.duration_since(now)).unwrap_or_default());
    let told = reset.or_else(|| whole_number(text(headers, RETRY_AFTER)?).map(Duration::from_secs))?;
    Some(told.min(RETRY_AFTER_MAX))
}

/// A date as HTTP writes it, always in GMT. A civil one, because an instant of jiff's does not
/// reach to the end of the year 9999.
fn date(headers: &HeaderMap, name: impl http::header::AsHeaderName) -> Option<jiff::civil::DateTime> {
    jiff::fmt::strtime::parse("%a, %d %b %Y %H:%M:%S GMT", text(headers, name)?).ok()?.to_datetime().ok()
}

/// The size that GitLab's `Range: 0-SIZE` names, as the official runner reads it: the number
/// after the dash, and 0 if there is none that can be read.
pub fn range_size(headers: &HeaderMap) -> u64 {
    let Some((_, size)) = text(headers, &RANGE).and_then(|range| range.split_once('-')) else { return 0 };
    if size.is_empty() || !size.bytes().all(|b| b.is_ascii_digit()) {
        return 0;
    }
    size.parse().unwrap_or(0)
}

/// The error that an answer means which the caller has no use for. `token` is taken out of
/// GitLab's message, should a server echo it.
pub async fn error(what: &'static str, response: Response<Body>, token: &Secret) -> GitlabError {
    let (parts, body) = response.into_parts();
    let status = parts.status.as_u16();
    let retry_after = retry_after(&parts.headers);
    match status {
        429 => {
            read_small(body).await;
            let retry_after = retry_after.unwrap_or(RATE_LIMIT_DEFAULT).max(Duration::from_secs(1));
            GitlabError::RateLimited { retry_after }
        }
        409 => {
            read_small(body).await;
            GitlabError::Conflict
        }
        408 | 500.. => {
            read_small(body).await;
            GitlabError::Unavailable { status: Some(status), retry_after, source: None }
        }
        // A success that GitLab never sent.
        200..=299 if is_page(&parts.headers) => {
            read_small(body).await;
            GitlabError::Unavailable { status: Some(status), retry_after, source: None }
        }
        300..=399 => {
            let target = parts.headers.get(LOCATION).map(|location| redirect_target(location, token));
            let message = format!("a redirect{}; redirects are never followed", target.unwrap_or_default());
            GitlabError::Unexpected { what, status, message }
        }
        _ => {
            let body = read_small(body).await;
            let message = if is_page(&parts.headers) { "a page for people".to_owned() } else { message(&body) };
            GitlabError::Unexpected { what, status, message: clean(&without(message, token), 200) }
        }
    }
}

/// `text` without the token, should a server echo it.
fn without(text: String, token: &Secret) -> String {
    if token.expose().is_empty() { text } else { text.replace(token.expose(), "[redacted]") }
}

/// A redirect's target with its whole path, by which people know where they are sent; a query, a name and a password in
/// it may be secrets, and are left out, and so is what is neither an address nor a path.
fn redirect_target(location: &HeaderValue, token: &Secret) -> String {
    let Ok(location) = location.to_str() else { return String::new() };
    let target = match url::Url::parse(location) {
        Ok(url) if url.has_host() => format!("{}{}", url.origin().ascii_serialization(), url.path()),
        Err(_) if location.starts_with('/') && !location.starts_with("//") => {
            location.split(['?', '#']).next().unwrap_or_default().to_owned()
        }
        _ => return String::new(),
    };
    // Before it is cut: half a token is one that is not found.
    format!(" to `{}`", clean(&without(target, token), TARGET_CHARS_MAX))
}

/// What to make of a redirect, by the target that its message names.
pub(super) fn redirect_remedy(message: &str) -> String {
    let target = message.split('`').nth(1).unwrap_or_default();
    match target.split_once("/api/v4/") {
        Some((address, _)) if address.contains("://") => {
            format!("check `url`: that leads to `{address}`, which may be the right one")
        }
        _ if ["sign_in", "login", "auth", "saml"].iter().any(|word| target.contains(word)) => {
            "check `url`: that is a login page; let requests below /api/v4/ pass it, or give the address behind it"
                .into()
        }
        _ => "check `url`: it must be the address that GitLab itself shows for its runners".into(),
    }
}

/// GitLab's own words: `{"message": …}` or `{"error": …}`, else the text itself.
fn message(body: &[u8]) -> String {
    use serde_json::Value;
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return String::from_utf8_lossy(body).into_owned() };
    match value.get("message").or_else(|| value.get("error")).unwrap_or(&value) {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `text` on one line, without control characters and what turns writing around, at most
/// `chars_max` characters.
pub(super) fn clean(text: &str, chars_max: usize) -> String {
    let turns =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let visible =
        text.chars().map(|c| if c.is_control() || turns(c) || matches!(c, '\u{2028}' | '\u{2029}') { ' ' } else { c });
    visible.take(chars_max).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::transport::full;
    use super::*;
    use crate::secret::Secret;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(n, v)| (http::HeaderName::from_static(n), HeaderValue::from_bytes(v.as_bytes()).unwrap()))
            .collect()
    }

    /// T30: absurd update intervals are clamped, what is no number is ignored.
    #[test]
    fn update_intervals_are_clamped() {
        let check = |value: &str, expected: Option<u64>| {
            let got = update_interval(&headers(&[("x-gitlab-trace-update-interval", value)]));
            assert_eq!(got, expected.map(Duration::from_secs), "{value:?}");
        };
        check("3", Some(3));
        check("60", Some(60));
        check("0", Some(1));
        check("-1", Some(1));
        check("901", Some(900));
        check("1000000000000000000", Some(900));
        check("99999999999999999999999", Some(900));
        check("NaN", None);
        check("", None);
        check("-", None);
        check("1e3", None);
        check("+3", None);
        assert_eq!(update_interval(&HeaderMap::new()), None);
    }

    /// T30: absurd times to come back are clamped.
    /// G21: GitLab's clock may be hours off.
    #[test]
    fn retry_times_are_clamped_and_know_no_clock_of_ours() {
        let check = |pairs: &[(&'static str, &str)], expected: Option<u64>| {
            assert_eq!(retry_after(&headers(pairs)), expected.map(Duration::from_secs), "{pairs:?}");
        };
        check(&[("retry-after", "30")], Some(30));
        check(&[("retry-after", "0")], Some(0));
        check(&[("retry-after", "-1")], None);
        check(&[("retry-after", "1000000000000000000")], Some(300));
        check(&[("retry-after", "NaN")], None);
        check(&[("retry-after", "Fri, 31 Dec 9999 23:59:59 GMT")], None);
        let now = ("date", "Sat, 01 Jan 2000 00:00:00 GMT");
        check(&[now, ("ratelimit-resettime", "Sat, 01 Jan 2000 00:00:40 GMT")], Some(40));
        check(&[now, ("ratelimit-resettime", "Sat, 01 Jan 2000 00:00:40 GMT"), ("retry-after", "7")], Some(40));
        check(&[now, ("ratelimit-resettime", "Fri, 31 Dec 9999 23:59:59 GMT")], Some(300));
        check(&[now, ("ratelimit-resettime", "Thu, 01 Jan 1970 00:00:00 GMT")], Some(0));
        check(&[now, ("ratelimit-resettime", "soon"), ("retry-after", "7")], Some(7));
        check(&[("ratelimit-resettime", "Sat, 01 Jan 2000 00:00:40 GMT")], None);
    }

    #[test]
    fn a_416_without_a_readable_range_means_zero() {
        let check =
            |value: &str, expected: u64| assert_eq!(range_size(&headers(&[("range", value)])), expected, "{value:?}");
        check("0-0", 0);
        check("0-1234", 1234);
        check("0-18446744073709551615", u64::MAX);
        check("0-18446744073709551616", 0);
        check("0--5", 0);
        check("0-5-6", 0);
        check("bytes=0-12", 12);
        check("0-+5", 0);
        check("nonsense", 0);
        check("0-", 0);
        assert_eq!(range_size(&HeaderMap::new()), 0);
    }

    proptest::proptest! {
        /// T30: no header value of any kind breaks the readers, and none leaves its limits.
        #[test]
        fn header_readers_stay_within_their_limits(value in proptest::collection::vec(0x20u8..=0xff, 0..40)) {
            let Ok(value) = HeaderValue::from_bytes(&value) else { return Ok(()) };
            let mut headers = HeaderMap::new();
            for name in ["x-gitlab-trace-update-interval", "retry-after", "ratelimit-resettime", "date", "range", "job-status"] {
                headers.insert(name, value.clone());
            }
            proptest::prop_assert!(update_interval(&headers).is_none_or(|i| (Duration::from_secs(1)..=INTERVAL_MAX).contains(&i)));
            proptest::prop_assert!(retry_after(&headers).is_none_or(|r| r <= RETRY_AFTER_MAX));
            let _ = range_size(&headers);
        }
    }

    #[test]
    fn job_status_words_are_read_as_the_official_runner_does() {
        let check = |status: u16, word: Option<&str>, expected: JobStatus| {
            let mut response = Response::builder().status(status);
            if let Some(word) = word {
                response = response.header("Job-Status", word);
            }
            assert_eq!(job_status(&response.body(()).unwrap()), expected, "{status} {word:?}");
        };
        check(200, None, JobStatus::Running);
        check(200, Some("running"), JobStatus::Running);
        check(202, Some("canceling"), JobStatus::Canceling);
        check(202, Some("canceled"), JobStatus::Over);
        check(200, Some("failed"), JobStatus::Over);
        check(200, Some("pending"), JobStatus::Running);
        check(403, None, JobStatus::Over);
        check(403, Some("success"), JobStatus::Over);
        check(403, Some("canceling"), JobStatus::Over);
        check(416, None, JobStatus::Running);
    }

    async fn error_of(response: http::response::Builder, body: &str) -> GitlabError {
        error("PUT", response.body(full(body.to_owned())).unwrap(), &Secret::new("tok-secret")).await
    }

    #[tokio::test]
    async fn messages_are_cleaned_and_never_hold_the_token() {
        let json = || Response::builder().status(400).header("content-type", "application/json");
        let GitlabError::Unexpected { message, .. } =
            error_of(json(), r#"{"message":"bad\u001b[31m tok-secret\r\nstate"}"#).await
        else {
            panic!()
        };
        assert_eq!(message, "bad [31m [redacted]  state");
        let GitlabError::Unexpected { message, .. } = error_of(json(), r#"{"message":{"base":["no"]}}"#).await else {
            panic!()
        };
        assert_eq!(message, r#"{"base":["no"]}"#);
        let GitlabError::Unexpected { message, .. } = error_of(json(), &"x".repeat(100_000)).await else { panic!() };
        assert_eq!(message.len(), 200);
    }

    /// T27: a body that drips for ever is read for 5 s, and costs what has come.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_not_read_for_long() {
        let started = tokio::time::Instant::now();
        assert!(read_small(Drip(Box::pin(tokio::time::sleep(Duration::from_secs(1)))).boxed_unsync()).await.is_empty());
        assert_eq!(started.elapsed(), SMALL_READ);
    }

    /// A byte a second, for ever.
    struct Drip(std::pin::Pin<Box<tokio::time::Sleep>>);

    impl http_body::Body for Drip {
        type Data = Bytes;
        type Error = super::super::transport::BodyError;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            context: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
            std::task::ready!(self.0.as_mut().poll(context));
            let next = tokio::time::Instant::now() + Duration::from_secs(1);
            self.0.as_mut().reset(next);
            std::task::Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from_static(b"x")))))
        }
    }

    /// G22: a page for people is no success, and no verdict on us.
    #[tokio::test]
    async fn a_page_for_people_counts_as_unavailable() {
        let page = Response::builder().status(200).header("content-type", "text/html; charset=utf-8");
        assert!(matches!(error_of(page, "<html>").await, GitlabError::Unavailable { status: Some(200), .. }));
        for (location, shown) in [
            ("https://me:pw@login.example/x/y?token=abc#f", "https://login.example/x/y"),
            ("/users/sign_in?token=abc", "/users/sign_in"),
            ("https://login.example/tok-secret", "https://login.example/[redacted]"),
            (&format!("/{}", "x".repeat(300)), &format!("/{}", "x".repeat(139))),
        ] {
            let redirect = Response::builder().status(302).header("location", location);
            let GitlabError::Unexpected { message, .. } = error_of(redirect, "").await else { panic!() };
            assert_eq!(message, format!("a redirect to `{shown}`; redirects are never followed"));
        }
        for odd in ["https//me:pw@login.example", "//me:pw@login.example/x", "mailto:me", ""] {
            let redirect = Response::builder().status(302).header("location", odd);
            let GitlabError::Unexpected { message, .. } = error_of(redirect, "").await else { panic!() };
            assert_eq!(message, "a redirect; redirects are never followed");
        }
    }

    #[tokio::test]
    async fn a_429_without_a_time_still_waits() {
        let limited = |r: http::response::Builder| async { error_of(r.status(429), "").await };
        assert!(
            matches!(limited(Response::builder()).await, GitlabError::RateLimited { retry_after } if retry_after == RATE_LIMIT_DEFAULT)
        );
        let zero = Response::builder().header("retry-after", "0");
        assert!(
            matches!(limited(zero).await, GitlabError::RateLimited { retry_after } if retry_after == Duration::from_secs(1))
        );
    }
}
