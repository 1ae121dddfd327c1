//! Request heads, routes, queries and headers: what we take them for, and what hyper does.

use super::requests::{Request, by_hyper};
use crate::pieces::{Cuts, Peer};
use dayfly::cache::Key;
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::guest::readers::{self, JobRoute, NoRoute, Query, Route};
use dayfly::guest::readers::{FIELDS_MAX, Framing, HEAD_BYTES_MAX, Scan, TARGET_BYTES_MAX, check, scan};
use dayfly::guest::readers::{request_headers, response_headers};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Request as HttpRequest, StatusCode};

/// A head that we pass is one request to hyper too, with the same method, target, fields and framing; it does not
/// matter how it was cut, and no head holds the end of another.
pub fn request_head(input: &[u8]) {
    let whole = scan(input, &mut 0);
    let (mut scanned, mut end, mut pieced) = (0, 0, Ok(Scan::Partial));
    for piece in Cuts::of(input).pieces(input) {
        end += piece.len();
        pieced = scan(&input[..end], &mut scanned);
        if pieced != Ok(Scan::Partial) {
            break;
        }
    }
    assert_eq!(whole, pieced, "how a head is cut matters");
    let Ok(Scan::Whole(length)) = whole else { return };
    let head = &input[..length];
    assert!(length <= HEAD_BYTES_MAX);
    assert_eq!(head.windows(4).position(|four| four == b"\r\n\r\n"), Some(length - 4), "two heads in one");
    let Ok(framing) = check(head) else { return };

    let served = by_hyper(Peer::waiting(head));
    assert_eq!(served.len(), 1, "hyper reads {} requests", served.len());
    let (ours, hypers) = (read(head), &served[0]);
    assert_eq!((&ours.method, &ours.target), (&hypers.method, &hypers.target));
    assert_eq!(ours.fields, hypers.fields);
    assert!(ours.fields.len() <= FIELDS_MAX && ours.target.len() <= TARGET_BYTES_MAX);
    assert_eq!(ours.fields.iter().filter(|(name, _)| name == "host").count(), 1);
    match framing {
        Framing::Length(length) => assert_eq!(hypers.length, Some(length)),
        Framing::Chunked => assert_eq!(hypers.length, None),
    }
    routed(&ours.method, &ours.target);
}

/// A head in the plainest reading.
fn read(head: &[u8]) -> Request {
    let text = std::str::from_utf8(head).unwrap();
    let mut lines = text.trim_end_matches("\r\n").split("\r\n");
    let words: Vec<_> = lines.next().unwrap().split(' ').collect();
    let fields = lines.map(|line| line.split_once(':').unwrap());
    let mut fields: Vec<_> =
        fields.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().as_bytes().to_vec())).collect();
    fields.sort_by(|a, b| a.0.cmp(&b.0));
    Request { method: words[0].into(), target: words[1].into(), fields, length: None, body: None }
}

/// A method and a target, apart by a space, as [`routed`] wants them.
pub fn route(input: &[u8]) {
    if let Some((method, target)) = std::str::from_utf8(input).ok().and_then(|text| text.split_once(' ')) {
        routed(method, target);
    }
}

/// A path is a route only as it is spelt, for that route's method only; of a query the listed pairs go on as they
/// were, and none with a key that anybody could read as a credential.
fn routed(method: &str, target: &str) {
    const BELOW: [(&str, &str, JobRoute); 5] = [
        ("PUT", "", JobRoute::Update),
        ("PATCH", "/trace", JobRoute::Trace),
        ("POST", "/artifacts", JobRoute::Upload),
        ("GET", "/artifacts", JobRoute::Download),
        ("GET", "/runtime_environment_key", JobRoute::EnvironmentKey),
    ];
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let found = readers::route(method, path);
    match found {
        Ok(Route::Job(JobId(id), route)) => {
            assert!(id > 0);
            let spelt = |(m, below, r): &(&str, &str, JobRoute)| {
                (*m, *r) == (method, route) && path == format!("/api/v4/jobs/{id}{below}")
            };
            assert!(BELOW.iter().any(spelt), "{method} {path:?} is taken for {route:?} of {id}");
        }
        Ok(Route::AskForJob) => assert_eq!((method, path), ("POST", "/api/v4/jobs/request")),
        Ok(Route::Verify) => assert_eq!((method, path), ("POST", "/api/v4/runners/verify")),
        Ok(Route::Discovery) => assert_eq!((method, path), ("GET", "/api/v4/runners/router/discovery")),
        Ok(Route::RunnerAdministration) => {
            assert!(path.starts_with("/api/v4/runners") && ["POST", "DELETE"].contains(&method));
        }
        Ok(Route::Cache(_)) => {
            assert!(path.starts_with("/cache/") && ["GET", "HEAD", "PUT"].contains(&method));
            // What of it is a key names the project by digits, and holds no step out of it.
            if let Some((project, key)) = Key::of_path(path) {
                assert!(path.starts_with(&format!("/cache/project/{project}/")) && key.file().len() == 64);
                assert!(path.split('/').all(|part| !["..", "."].contains(&decoded(part).as_str())), "{path:?}");
            }
        }
        Err(NoRoute::Method(allowed)) => {
            assert!(allowed.split(", ").all(|allowed| allowed != method && readers::route(allowed, path).is_ok()));
        }
        Err(NoRoute::NotFound) => {
            let id = path.strip_prefix("/api/v4/jobs/").and_then(|rest| rest.split('/').next()).unwrap_or("");
            let plain = id.len() < 20 && id.bytes().all(|digit| digit.is_ascii_digit()) && !id.starts_with('0');
            let known = BELOW.iter().any(|(_, below, _)| path == format!("/api/v4/jobs/{id}{below}"));
            assert!(id.is_empty() || !plain || !known, "{path:?} is a route");
        }
    }
    let keys = found.map_or(&[][..], Route::query_keys);
    let Ok(read) = Query::parse(query, keys) else { return };
    let pairs: Vec<_> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    assert_eq!(read.pairs.len() as u64 + read.dropped, pairs.len() as u64);
    for pair in &pairs {
        let key = decoded(pair.split('=').next().unwrap()).to_ascii_lowercase();
        let credential = ["token", "password", "secret", "auth"].iter().any(|word| key.contains(word));
        assert!(!credential, "{query:?} went through");
    }
    for (key, value) in &read.pairs {
        assert!(keys.contains(&key.as_str()));
        assert!(value.bytes().all(|byte| byte.is_ascii_graphic() && !b"&;#?\"<>\\".contains(&byte)), "{value:?}");
        assert_eq!(read.pairs.iter().filter(|(other, _)| other == key).count(), 1);
    }
    // What GitLab gets to read is what was asked, and reads back as itself.
    let sent = dayfly::gitlab::readers::query(&read.pairs);
    let sent = sent.strip_prefix('?').unwrap_or_default();
    let again = Query::parse(sent, keys).expect("what is sent would be let through").pairs;
    let plain = |pairs: &[(String, String)]| pairs.iter().map(|(k, v)| (decoded(k), decoded(v))).collect::<Vec<_>>();
    assert_eq!(plain(&again), plain(&read.pairs));
    assert!(HttpRequest::builder().uri(format!("/x?{sent}")).body(()).is_ok());
}

/// Percent-decoded once.
fn decoded(text: &str) -> String {
    let mut bytes = text.as_bytes();
    let mut plain = Vec::new();
    while let Some((byte, rest)) = bytes.split_first() {
        let hex = rest.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).filter(|_| *byte == b'%');
        let hex = hex.filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                plain.push(byte);
                bytes = &rest[2..];
            }
            None => {
                plain.push(*byte);
                bytes = rest;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// A status, then fields, a line each. Of any header fields only the listed ones go on to GitLab or come back to the
/// guest, none twice, and those that command the guest are within bounds.
pub fn forwarded_headers(input: &[u8]) {
    let mut lines = input.split(|byte| *byte == b'\n');
    let status = lines.next().and_then(|line| std::str::from_utf8(line).ok()?.parse().ok());
    let mut headers = HeaderMap::new();
    for line in lines.take(300) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii())) {
            headers.append(name, value);
        }
    }
    for (route, more) in
        [(JobRoute::Upload, "content-type"), (JobRoute::Download, "range"), (JobRoute::EnvironmentKey, "accept")]
    {
        let Some(passed) = request_headers(route, &headers) else {
            assert_eq!(route, JobRoute::Upload);
            continue;
        };
        for (name, value) in &passed {
            assert!(["accept", "x-request-id", more].contains(&name.as_str()), "{name} goes on");
            assert_eq!(headers.get_all(name).iter().collect::<Vec<_>>(), [value]);
            assert!(value.to_str().is_ok_and(|text| text.len() <= 300), "{name}: {value:?}");
        }
    }
    let Some(status) = status.and_then(|status: u16| StatusCode::from_u16(status).ok()) else { return };
    let clock = Clock::system();
    for direct in [false, true] {
        let Some(passed) = response_headers(status, &headers, direct, &clock) else {
            assert!(status.is_informational() || status.is_redirection());
            continue;
        };
        assert!(!status.is_redirection() || direct, "a redirect comes back that nobody asked for");
        for (name, value) in &passed {
            let copied = headers.get(name) == Some(value);
            let fits = match name.as_str() {
                "content-type" | "content-range" | "accept-ranges" | "content-disposition" | "job-status" => copied,
                "x-request-id" => copied && value.to_str().is_ok_and(|id| (1..=64).contains(&id.len())),
                "retry-after" => value.to_str().is_ok_and(|text| text.parse::<u64>().is_ok_and(|wait| wait <= 60)),
                "ratelimit-resettime" => headers.contains_key(name),
                "location" => copied && direct && status.is_redirection(),
                _ => false,
            };
            assert!(fits, "{name}: {value:?} comes back");
            assert_eq!(passed.get_all(name).iter().count(), 1);
        }
    }
}
