//! What our own calls to GitLab have in common: time limits, fixed headers, request ids.
//!
//! Two limits each: for the head of the answer, and for the exchange as a whole. They are the ones
//! of threats.md §6.5.

use super::transport::{Body, Call, Connection, full};
use crate::hex::hex;
use crate::rng::Rng;
use crate::secret::Secret;
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Request};
use std::fmt::Write as _;
use std::time::Duration;

/// What we call ourselves. GitLab shows the runner's version from `info`, not from here.
pub(super) const OUR_USER_AGENT: &str = concat!("dayfly/", env!("CARGO_PKG_VERSION"));

/// GitLab may hold a poll for 50 s (`apiCiLongPollingDuration`), and sites set more.
const POLL_HEAD: Duration = Duration::from_secs(120);
/// A payload is at most 32 MiB; a minute is generous for it.
const POLL_TOTAL: Duration = Duration::from_secs(180);
/// `verify`, updates and trace: GitLab answers them from memory, Redis or one database row.
const LOCAL: Duration = Duration::from_secs(60);
/// The official runner's limit for the head of an artifact answer: object storage can be slow.
const ARTIFACT_HEAD: Duration = Duration::from_secs(600);
/// The official runner's `DefaultArtifactUploadTimeout`.
const ARTIFACT_TOTAL: Duration = Duration::from_secs(3600);

/// Name of the header with a job's token.
pub(super) const JOB_TOKEN: HeaderName = HeaderName::from_static("job-token");
/// Name of the header with a runner's token.
pub(super) const RUNNER_TOKEN: HeaderName = HeaderName::from_static("runner-token");
/// Name of the header with a request's id.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The kinds of calls, by their limits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// `jobs/request`.
    Poll,
    /// Small ones, answered at once.
    Small,
    /// Artifacts, on a connection of their own.
    Artifacts,
    /// Another forwarded call, likewise.
    Forwarded,
}

/// A call under construction.
pub(super) struct Draft {
    method: Method,
    path: String,
    headers: HeaderMap,
}

impl Draft {
    /// `path` is ours, begins with a slash and needs no encoding.
    pub(super) fn new(method: Method, path: String, rng: &Rng) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(OUR_USER_AGENT));
        headers.insert(REQUEST_ID, HeaderValue::try_from(request_id(rng)).expect("hex digits are a header value"));
        Self { method, path, headers }
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Adds a header with a secret: marked as such, so that no `Debug` below us prints it.
    pub(super) fn secret(self, name: HeaderName, secret: &Secret) -> Self {
        let mut value =
            HeaderValue::from_str(secret.expose()).expect("tokens are visible ASCII: checked where they come in");
        value.set_sensitive(true);
        self.header(name, value)
    }

    pub(super) fn json(self, body: &impl serde::Serialize, kind: Kind) -> Call {
        let body = serde_json::to_vec(body).expect("structs of strings and numbers always serialise");
        self.header(CONTENT_TYPE, HeaderValue::from_static("application/json")).bytes(body.into(), kind)
    }

    pub(super) fn accept_json(self) -> Self {
        self.header(ACCEPT, HeaderValue::from_static("application/json"))
    }

    pub(super) fn bytes(self, body: Bytes, kind: Kind) -> Call {
        self.body(full(body), kind)
    }

    pub(super) fn body(self, body: Body, kind: Kind) -> Call {
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.path.parse().expect("paths are ours, queries are encoded");
        *request.headers_mut() = self.headers;
        let (connection, head_timeout, total_timeout) = match kind {
            Kind::Poll => (Connection::Shared, POLL_HEAD, POLL_TOTAL),
            Kind::Small => (Connection::Shared, LOCAL, LOCAL),
            Kind::Artifacts => (Connection::Own, ARTIFACT_HEAD, ARTIFACT_TOTAL),
            Kind::Forwarded => (Connection::Own, LOCAL, LOCAL),
        };
        Call { request, connection, head_timeout, total_timeout }
    }
}

/// A new id, of the form that the official runner sends since 18.3: 32 hex digits.
fn request_id(rng: &Rng) -> String {
    hex(&rng.bytes::<16>())
}

/// Whether `text` may be a request id: what it is made of can neither split a header nor a log line.
pub(super) fn is_request_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Whether `text` can be a token in a header: visible ASCII, and not absurdly long (job tokens may
/// be JWTs of kilobytes).
pub(super) fn is_token(text: &str) -> bool {
    (1..=16 * 1024).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// Query pairs as text, with everything encoded that could end a pair or the query. What is
/// encoded already stays as it is.
pub fn query(pairs: &[(String, String)]) -> String {
    let mut text = String::new();
    for (key, value) in pairs {
        text.push(if text.is_empty() { '?' } else { '&' });
        encode(&mut text, key);
        text.push('=');
        encode(&mut text, value);
    }
    text
}

fn encode(text: &mut String, part: &str) {
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~%+*:/,".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_32_hex_digits_and_new_each_time() {
        let rng = Rng::seeded(1);
        let (a, b) = (request_id(&rng), request_id(&rng));
        assert!(a.len() == 32 && a.bytes().all(|c| c.is_ascii_hexdigit()) && a != b, "{a} {b}");
    }

    #[test]
    fn only_plain_words_are_request_ids() {
        assert!(is_request_id("01J_abc-9") && is_request_id(&"x".repeat(64)));
        for bad in ["", "a b", "a\r\nb", "ä", "a:b", &"x".repeat(65)] {
            assert!(!is_request_id(bad), "{bad:?}");
        }
    }

    /// T5: a value cannot bring another pair with it.
    #[test]
    fn query_values_cannot_break_out() {
        let check = |value: &str, expected: &str| {
            assert_eq!(query(&[("expire_in".to_owned(), value.to_owned())]), format!("?expire_in={expected}"));
        };
        check("1+week", "1+week");
        check("1%20week", "1%20week");
        check("1&token=x", "1%26token%3Dx");
        check("1#token", "1%23token");
        check("1 ?\r\n", "1%20%3F%0D%0A");
        check("ü", "%C3%BC");
        assert_eq!(query(&[]), "");
        assert_eq!(query(&[("a".into(), "1".into()), ("b=".into(), String::new())]), "?a=1&b%3D=");
    }
}
