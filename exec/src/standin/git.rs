//! Bare repositories, read-only, by git's plain ("dumb") HTTP protocol: files, nothing else.
//!
//! The caller makes the directory (`git clone --bare`, `git update-server-info`) and names it in
//! [`super::Project::repository`]. This protocol knows no shallow fetch: payloads that use it need
//! depth 0. Every file costs a job token: that of an executing job of the project.

use super::Standin;
use super::answer::Answer;
use super::artifacts::FileBody;
use super::auth;
use super::git_smart;
use super::model::Model;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use std::path::PathBuf;

/// Larger files are not served; a pack of that size has no place in an `exec` or a test.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// What a request may have: a repository, and what of it is asked for.
fn find(model: &Model, path: &str, headers: &HeaderMap, now: Timestamp) -> Result<(PathBuf, String), Answer> {
    let not_found = || Answer::message(StatusCode::NOT_FOUND, "404 Not Found");
    let challenge = || {
        let answer = Answer::message(StatusCode::UNAUTHORIZED, "HTTP Basic: Access denied");
        answer.with("www-authenticate", "Basic realm=\"GitLab\"")
    };
    let (project, file) = path.strip_prefix('/').and_then(|path| path.split_once(".git/")).ok_or_else(not_found)?;
    // Without a right token nobody learns which projects exist.
    let token = basic_password(headers).ok_or_else(challenge)?;
    let job = model.job_by_token(&token).and_then(|job| model.jobs.get(&job)).ok_or_else(challenge)?;
    let project =
        model.projects.get(&job.project).filter(|own| own.path == project && !own.deleting).ok_or_else(challenge)?;
    let agent = auth::header(headers, "user-agent").unwrap_or_default();
    if model.settings.refuse_git_of.as_ref().is_some_and(|name| agent.starts_with(name)) {
        return Err(Answer::message(StatusCode::FORBIDDEN, "403 Forbidden"));
    }
    if !job.state.is_executing() || job.token_is_expired(now) || job.erased {
        return Err(challenge());
    }
    let root = project.repository.clone().ok_or_else(not_found)?;
    Ok((root, file.to_owned()))
}

/// The password of `Authorization: Basic` for the user that GitLab gives to jobs.
fn basic_password(headers: &HeaderMap) -> Option<String> {
    let value = auth::header(headers, "authorization")?;
    let (scheme, encoded) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(BASE64_STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    (user == "gitlab-ci-token").then(|| password.to_owned())
}

/// The names that a plain HTTP client asks for; nothing with dots that lead elsewhere.
fn is_served(file: &str) -> bool {
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    match file {
        "HEAD" | "info/refs" | "objects/info/packs" => true,
        file => match file.strip_prefix("objects/") {
            Some(object) => match object.strip_prefix("pack/pack-") {
                Some(pack) => {
                    let name = pack.strip_suffix(".pack").or_else(|| pack.strip_suffix(".idx")).unwrap_or_default();
                    hex(name, 40) || hex(name, 64)
                }
                None => object.split_once('/').is_some_and(|(a, b)| hex(a, 2) && (hex(b, 38) || hex(b, 62))),
            },
            None => false,
        },
    }
}

/// Answers one request.
pub(super) async fn serve(standin: &Standin, request: &http::request::Parts, body: Bytes) -> Answer {
    let (now, method, query) = (standin.now(), &request.method, request.uri.query());
    let found = standin.read(|model| {
        let found = find(model, request.uri.path(), &request.headers, now);
        found.map(|(root, file)| (root, file, model.settings.smart_git))
    });
    let (root, file, smart) = match found {
        Ok(found) => found,
        Err(answer) => return answer,
    };
    let not_found = || Answer::message(StatusCode::NOT_FOUND, "404 Not Found");
    if smart && git_smart::is_asked(method, &file, query) {
        return git_smart::serve(standin, method, (&root, &file, query), &request.headers, body).await;
    }
    if !is_served(&file) {
        return not_found();
    }
    let path = root.join(&file);
    if method != Method::GET && method != Method::HEAD {
        return Answer::refusal(StatusCode::FORBIDDEN, None);
    }
    // A link inside the repository must not lead out of it either.
    let (Ok(root), Ok(path)) = (tokio::fs::canonicalize(root).await, tokio::fs::canonicalize(path).await) else {
        return not_found();
    };
    let Ok(file) = tokio::fs::File::open(&path).await else { return not_found() };
    let Ok(meta) = file.metadata().await else { return not_found() };
    if !path.starts_with(&root) || !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return not_found();
    }
    let mut answer = Answer::empty(StatusCode::OK);
    if method == Method::GET {
        answer.body = FileBody::new(file, meta.len()).map_err(Into::into).boxed_unsync();
    }
    answer
        .with("content-type", "application/octet-stream")
        .with("content-length", &meta.len().to_string())
        .with("cache-control", "no-cache")
}

#[cfg(test)]
mod tests {
    use super::is_served;

    #[test]
    fn only_names_of_a_repository_are_served() {
        let hash = "0123456789abcdef0123456789abcdef01234567";
        for file in ["HEAD", "info/refs", "objects/info/packs"] {
            assert!(is_served(file), "{file}");
        }
        assert!(is_served(&format!("objects/{}/{}", &hash[..2], &hash[2..])));
        assert!(is_served(&format!("objects/pack/pack-{hash}.pack")));
        for file in [
            "config",
            "../x",
            "objects/../config",
            "objects/pack/../../config",
            "objects/00/..",
            "",
            "hooks/x",
            "objects/pack/pack-.pack",
        ] {
            assert!(!is_served(file), "{file}");
        }
    }
}
