//! What stands behind and beside a head: chunks, ranges, updates.

use super::requests::{by_hyper, dechunked};
use crate::pieces::{Cuts, Peer};
use dayfly::guest::readers::Chunks;
use dayfly::guest::readers::RunnerRequest;
use dayfly::guest::readers::object;
use dayfly::guest::readers::{self, parse_content_range};
use dayfly::guest::readers::{Said, Update};
use http::header::{CONTENT_RANGE, HeaderMap, HeaderValue};
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// A body in chunks ends for hyper where it ends for us, with the same data; how it is cut does not matter; and what
/// we have not seen the end of, hyper has not either.
pub fn chunked_body(input: &[u8]) {
    let mut whole = Chunks::new();
    let once = whole.follow(input);
    let (mut pieced, mut taken) = (Chunks::new(), Ok(0));
    for piece in Cuts::of(input).pieces(input) {
        taken = taken.and_then(|sum| pieced.follow(piece).map(|taken| sum + taken));
    }
    assert_eq!(once, taken, "how a body is cut matters");
    let Ok(end) = once else { return };
    assert_eq!(whole, pieced);
    assert!(whole.is_done() || end == input.len());

    let head = b"PUT /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice();
    let next = b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n".as_slice();
    // A body that goes on might take the next request for data, and hyper would be right.
    let next = if whole.is_done() { next } else { b"" };
    let served = by_hyper(Peer::waiting(&[head, &input[..end], next].concat()));
    if whole.is_done() {
        assert_eq!(served.iter().map(|request| request.target.as_str()).collect::<Vec<_>>(), ["/a", "/b"]);
        assert_eq!(served[0].body, Some(dechunked(&input[..end])));
    } else {
        assert!(served.iter().all(|request| request.body.is_none()), "hyper sees an end that we do not");
    }
}

/// A `Content-Range` names an offset only if its two numbers, plain digits within 64 bits, span exactly the body; two
/// of them name none.
pub fn content_range(input: &[u8]) {
    let Ok(value) = std::str::from_utf8(input) else { return };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = |text: &str| {
        let text = text.trim_start_matches('0');
        if text.is_empty() { Some(0) } else { text.parse::<u64>().ok().map(u128::from) }
    };
    let named = value.split_once('-').filter(|(first, last)| digits(first) && digits(last));
    let named = named.and_then(|(first, last)| Some((number(first)?, number(last)?)));
    let span = named.and_then(|(first, last)| usize::try_from((last + 1).checked_sub(first)?).ok());
    let lengths = [Some(0), Some(1), Some(Cuts::of(input).number()), Some(usize::MAX), span];
    let near = span.into_iter().flat_map(|span| [span.wrapping_sub(1), span.wrapping_add(1)]);
    for length in lengths.into_iter().flatten().chain(near) {
        let right = named.filter(|_| length > 0 && span == Some(length)).map(|(first, _)| first);
        assert_eq!(parse_content_range(value, length).map(u128::from), right, "for {length} bytes");
        let Ok(header) = HeaderValue::from_str(value) else { continue };
        let mut headers = HeaderMap::new();
        headers.append(CONTENT_RANGE, header.clone());
        assert_eq!(readers::content_range(&headers, length).map(u128::from), right);
        headers.append(CONTENT_RANGE, header);
        assert_eq!(readers::content_range(&headers, length), None, "two ranges name one offset");
    }
}

/// An update is a JSON object with each member that we read at most once; its verdict is one that GitLab can be told.
/// What a runner asks with is an object, too.
pub fn update_body(input: &[u8]) {
    if let Some(request) = object::<RunnerRequest>(input) {
        let members: BTreeMap<String, &RawValue> = serde_json::from_slice(input).expect("a request is an object");
        assert_eq!(serde_json::from_str::<String>(members["token"].get()).unwrap(), request.token);
    }
    let Some(update) = object::<Update>(input) else { return };
    let members: BTreeMap<String, &RawValue> = serde_json::from_slice(input).expect("an update is an object");
    let member = |name: &str| members.get(name).and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    assert_eq!(update.token, member("token"));
    match update.said() {
        None => {}
        Some(Said::Running) => assert_eq!(member("state").as_deref(), Some("running")),
        Some(Said::Verdict(verdict)) => {
            let state = if verdict.success { "success" } else { "failed" };
            assert_eq!(member("state").as_deref(), Some(state));
            let plain = |reason: &String| {
                (1..=64).contains(&reason.len()) && reason.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
            };
            assert!(verdict.failure_reason.as_ref().is_none_or(|reason| !verdict.success && plain(reason)));
            let told = members.get("exit_code").is_some_and(|code| code.get() != "null");
            assert_eq!(verdict.exit_code.is_some(), told);
            let again = serde_json::to_vec(&verdict).unwrap();
            assert_eq!(serde_json::from_slice::<dayfly::gitlab::Verdict>(&again).unwrap(), verdict);
        }
    }
}
