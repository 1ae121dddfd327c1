//! What must hold for any bytes of GitLab? Its payloads and its answers; see [`crate::fuzzing`].

use crate::pieces::now;
use bytes::Bytes;
use dayfly::gitlab::readers::{
    error, is_json, is_page, job_status, media_type, range_size, retry_after, salvage, update_interval,
};
use dayfly::gitlab::transport::full;
use dayfly::gitlab::{GitlabError, JobPayload, JobStatus};
use dayfly::secret::Secret;
use http::header::{HeaderName, HeaderValue};
use http::{Response, StatusCode};
use serde_json::Value;
use std::time::Duration;

/// A payload is kept as it came, or refused; with a timeout lowered, it differs from what came in that number and in
/// nothing else; its names are fit for people, and what can be read whole can be salvaged.
pub fn payload(input: &[u8]) {
    let raw = Bytes::copy_from_slice(input);
    let salvaged = salvage(input);
    let Ok(payload) = JobPayload::parse(raw.clone(), None) else { return };
    assert_eq!(payload.raw(), &raw);
    assert!(payload.id.0 > 0 && i64::try_from(payload.id.0).is_ok());
    let (id, token) = salvaged.expect("what is whole can be salvaged");
    assert_eq!((id, token.expose()), (payload.id, payload.token.expose()));
    for text in [&payload.name, &payload.project] {
        assert!(text.chars().count() <= 255 && !text.chars().any(char::is_control), "{text:?}");
    }
    let tokens = payload.dependencies.iter().map(|dependency| &dependency.token).chain([&payload.token]);
    for token in tokens {
        assert!(!token.expose().is_empty() && token.expose().bytes().all(|byte| byte.is_ascii_graphic()));
        let mut value = HeaderValue::from_str(token.expose()).expect("a token is a header value");
        value.set_sensitive(true);
    }
    // Short ones occur by chance. A job cannot be named after its token, which is drawn later; a fuzzed one can.
    let token = payload.token.expose();
    let named = [&payload.name, &payload.project].iter().any(|text| text.contains(token));
    assert!(token.len() < 12 || named || !format!("{payload:?}").contains(token));

    let Some(timeout) = payload.timeout else {
        assert_eq!(payload.with_timeout(Duration::from_secs(5)), raw);
        return;
    };
    for remaining in [1, timeout.as_secs() / 2, timeout.as_secs().saturating_sub(1), timeout.as_secs(), u64::MAX] {
        spliced(&payload, timeout.as_secs(), remaining);
    }
}

fn spliced(payload: &JobPayload, timeout: u64, remaining: u64) {
    let raw = payload.raw();
    let spliced = payload.with_timeout(Duration::from_secs(remaining));
    let told = timeout.min(remaining).max(1);
    if told == timeout {
        assert_eq!(&spliced, raw);
        return;
    }
    let digits = told.to_string();
    let shorter = raw.len() - spliced.len();
    let is_splice = |at: usize| {
        let end = at + digits.len();
        spliced[at..end] == *digits.as_bytes()
            && spliced[..at] == raw[..at]
            && spliced[end..] == raw[end + shorter..]
            && std::str::from_utf8(&raw[at..end + shorter]).is_ok_and(|number| number.parse() == Ok(timeout))
    };
    assert!((0..=spliced.len() - digits.len()).any(is_splice), "more than a number was changed");
    let again = JobPayload::parse(spliced.clone(), None).expect("a splice is a payload");
    assert_eq!(again.timeout, Some(Duration::from_secs(told)));
    assert_eq!((again.id, again.token.expose()), (payload.id, payload.token.expose()));
    assert_eq!((&again.name, &again.project), (&payload.name, &payload.project));
    assert_eq!((again.debug_trace, again.trace_sections), (payload.debug_trace, payload.trace_sections));
    assert_eq!(again.dependencies.len(), payload.dependencies.len());
    let tree = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).ok();
    let (before, after) = (tree(raw), tree(&spliced));
    assert_eq!(before.is_some(), after.is_some());
    let mut changed = before.clone();
    if let Some(number) = changed.as_mut().and_then(|tree| tree.pointer_mut("/runner_info/timeout")) {
        *number = told.into();
    }
    // Where a member stands twice, the tree may not show the one that counts.
    assert!(after == changed || after == before, "another tree than before");
}

/// A status, fields a line each, an empty line, a body: what we read of such an answer is within its limits, and what
/// we say about it is one clean line without the token.
pub fn gitlab_answers(input: &[u8]) {
    const TOKEN: &str = "glcbt-secret";
    let mut rest = input;
    let mut line = || {
        let end = rest.iter().position(|byte| *byte == b'\n');
        let line = &rest[..end.unwrap_or(rest.len())];
        rest = end.map_or(&[][..], |end| &rest[end + 1..]);
        line
    };
    let status = std::str::from_utf8(line()).ok().and_then(|text| text.trim().parse::<u16>().ok());
    let Some(status) = status.and_then(|status| StatusCode::from_u16(status).ok()) else { return };
    let mut response = Response::new(());
    *response.status_mut() = status;
    for _ in 0..100 {
        let line = line();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { break };
        let name = HeaderName::from_bytes(&line[..colon]);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii())) {
            response.headers_mut().append(name, value);
        }
    }
    let headers = response.headers();
    assert!(update_interval(headers).is_none_or(|i| (1..=900).contains(&i.as_secs()) && i.subsec_nanos() == 0));
    assert!(retry_after(headers).is_none_or(|wait| wait <= Duration::from_secs(300)));
    let range = headers.get("range").and_then(|value| value.to_str().ok()).and_then(|range| range.split_once('-'));
    // A blank before it is no number to the official runner, either.
    let size = range.map(|(_, size)| size).filter(|size| size.bytes().all(|digit| digit.is_ascii_digit()));
    assert_eq!(range_size(headers), size.and_then(|size| size.parse().ok()).unwrap_or(0));
    assert!(!(is_page(headers) && is_json(headers)));
    assert!(media_type(headers).is_none_or(|kind| !kind.contains(';')));
    let over = job_status(&response) == JobStatus::Over;
    assert!(over || status != StatusCode::FORBIDDEN);

    let body = rest.to_vec();
    let answer = response.map(|()| full(body));
    let what = "a fuzzed call";
    let token = Secret::new(TOKEN);
    let Some(error) = now(error(what, answer, &token)) else { panic!("an answer that is there is waited for") };
    let told = match &error {
        GitlabError::Unexpected { message, .. } => message.clone(),
        other => other.to_string(),
    };
    assert!(!told.contains(TOKEN), "{told}");
    assert!(!told.chars().any(char::is_control) && told.chars().count() <= 200, "{told:?}");
    assert!(error.retry_after().is_none_or(|wait| wait <= Duration::from_secs(300)));
    let _ = (error.explain(), error.is_transient());
}
