//! The same repositories by git's own ("smart") HTTP protocol, as a real GitLab speaks it: `git http-backend` answers, so
//! shallow and partial fetches work as they do there. Only where [`super::Settings::smart_git`] says so.

use super::Standin;
use super::answer::Answer;
use super::artifacts::FileBody;
use super::auth;
use bytes::Bytes;
use dayfly::process::Program;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, SeekFrom};

/// A fetch of a large history on a busy host.
const DEADLINE: Duration = Duration::from_secs(600);

/// Bytes of the head that the program writes before a body.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Whether a request is one of this protocol.
pub(super) fn is_asked(method: &Method, file: &str, query: Option<&str>) -> bool {
    match (method, file) {
        (&Method::GET, "info/refs") => query == Some("service=git-upload-pack"),
        (&Method::POST, "git-upload-pack") => true,
        _ => false,
    }
}

/// Answers one request for `file` of the repository at `root`, whose asker has the right to it.
pub(super) async fn serve(
    standin: &Standin,
    method: &Method,
    (root, file, query): (&Path, &str, Option<&str>),
    headers: &HeaderMap,
    body: Bytes,
) -> Answer {
    let failed = || Answer::message(StatusCode::INTERNAL_SERVER_ERROR, "500 Internal Server Error");
    let (Some(parent), Some(name)) = (root.parent(), root.file_name()) else { return failed() };
    // Whole first, so that a client that reads slowly holds no process.
    let Ok(answer) = tempfile::NamedTempFile::new() else { return failed() };
    let header = |name: &str| auth::header(headers, name).unwrap_or_default().to_owned();
    let settings =
        [("safe.directory", "*"), ("uploadpack.allowAnySHA1InWant", "true"), ("uploadpack.allowFilter", "true")];
    let mut program = Program::new("git", DEADLINE)
        .arg("http-backend")
        .stdin(body)
        .stdout_file(answer.path())
        .env("GIT_PROJECT_ROOT", parent)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("PATH_INFO", format!("/{}/{file}", name.to_string_lossy()))
        .env("REQUEST_METHOD", method.as_str())
        .env("QUERY_STRING", query.unwrap_or_default())
        .env("CONTENT_TYPE", header("content-type"))
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("GIT_PROTOCOL", header("git-protocol"))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_COUNT", settings.len().to_string());
    for (n, (key, value)) in settings.iter().enumerate() {
        program = program.env(format!("GIT_CONFIG_KEY_{n}"), key).env(format!("GIT_CONFIG_VALUE_{n}"), value);
    }
    if let Err(error) = program.run().await {
        tracing::debug!(%error, "stand-in: git http-backend");
        return failed();
    }
    let Ok(mut answered) = tokio::fs::File::open(answer.path()).await else { return failed() };
    let Ok(length) = answered.metadata().await.map(|meta| meta.len()) else { return failed() };
    let mut head = vec![0; HEAD_BYTES_MAX];
    let mut read = 0;
    while read < head.len() {
        match answered.read(&mut head[read..]).await {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(_) => return failed(),
        }
    }
    let Some(end) = head[..read].windows(4).position(|four| four == b"\r\n\r\n") else { return failed() };
    let text = String::from_utf8_lossy(&head[..end]).into_owned();
    let body_at = end as u64 + 4;
    if answered.seek(SeekFrom::Start(body_at)).await.is_err() {
        return failed();
    }
    let bytes = length - body_at;
    let is_host = header("user-agent").starts_with("dayfly/");
    standin.edit(|model| {
        let counted = if is_host { &mut model.metrics.git_bytes_host } else { &mut model.metrics.git_bytes };
        *counted += bytes;
    });
    let mut answer = Answer::empty(StatusCode::OK);
    for line in text.lines() {
        let Some((name, value)) = line.split_once(": ") else { continue };
        match name.to_ascii_lowercase().as_str() {
            "status" => {
                let code = value.split(' ').next().and_then(|code| code.parse::<u16>().ok());
                answer.status = code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(answer.status);
            }
            "content-type" => answer = answer.with("content-type", value),
            "cache-control" => answer = answer.with("cache-control", value),
            _ => {}
        }
    }
    answer.body = FileBody::new(answered, bytes).map_err(Into::into).boxed_unsync();
    answer.with("content-length", &bytes.to_string())
}
