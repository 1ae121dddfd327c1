//! The downloader: one job's archive, unpacked into the working directory.

use super::{ArtifactsError, DownloadArguments};
use crate::api::{agent, base_url, is_retried, repeated, wanted_pause};
use std::io;
use std::time::Duration;
use ureq::http::{Request, Response, StatusCode};

/// Tries after the first, which GitLab may redirect; a second apart.
const MORE_TRIES: u32 = 2;
const PAUSE: Duration = Duration::from_secs(1);
/// Redirects followed, as by the official client.
const REDIRECTS_MAX: u32 = 10;
/// `User-Agent` of 19.3's first download.
const FIRST_USER_AGENT: &str = "Go-http-client/1.1";

/// What came of one request.
enum Got {
    /// A whole archive, in a file.
    Archive(std::fs::File),
    /// Another status, and the pause that it asks for; zero: none.
    Status(StatusCode, Duration),
}

/// Downloads and unpacks.
///
/// # Errors
/// GitLab's refusal, or no answer, after all tries; a broken archive.
pub(crate) fn download(arguments: &DownloadArguments) -> Result<(), ArtifactsError> {
    let target = &arguments.target;
    target.check()?;
    let url = format!("{}jobs/{}/artifacts", base_url(&target.url), target.job);
    let mut result = first(&url, &target.token);
    for _ in 0..MORE_TRIES {
        let what = match &result {
            Ok(Got::Archive(_)) => break,
            Ok(Got::Status(status, _)) if matches!(status.as_u16(), 401 | 403 | 404) => break,
            Ok(Got::Status(status, _)) => status.as_str().to_owned(),
            Err(error) => error.to_string(),
        };
        crate::log(&format!("WARNING: Downloading artifacts from coordinator... {what}"));
        std::thread::sleep(PAUSE);
        // The question mark without a query is the official runner's.
        result = followed(&format!("{url}?"), &target.token);
    }
    match result {
        Ok(Got::Archive(file)) => {
            crate::log(&format!(
                "Downloading artifacts from coordinator... ok  id={} status=200 token={}",
                target.job,
                target.shown_token()
            ));
            super::archive::unpack(file).map_err(ArtifactsError::Archive)
        }
        Ok(Got::Status(status, _)) => Err(ArtifactsError::Refused(status.as_u16())),
        Err(error) => Err(ArtifactsError::Unreachable(error)),
    }
}

/// The first try: one request that GitLab may answer with the storage's address. It is not followed, but
/// the same is asked again, following.
fn first(url: &str, token: &str) -> io::Result<Got> {
    let url = format!("{url}?direct_download=true");
    match get(&agent(0), &url, FIRST_USER_AGENT, token)? {
        Got::Status(status, _) if status.is_redirection() => followed(&url, token),
        got => Ok(got),
    }
}

/// One request that follows redirects, repeated at HTTP level.
fn followed(url: &str, token: &str) -> io::Result<Got> {
    let client = agent(REDIRECTS_MAX);
    repeated(
        || get(&client, url, &crate::info::user_agent(), token),
        |got| match got {
            Got::Status(status, wanted) if is_retried(*status) => Some(*wanted),
            _ => None,
        },
    )
}

fn get(client: &ureq::Agent, url: &str, user_agent: &str, token: &str) -> io::Result<Got> {
    let request = Request::get(url)
        .header("User-Agent", user_agent)
        .header("Job-Token", token)
        .header("X-Request-Id", crate::random_hex(32))
        .body(())
        .map_err(io::Error::other)?;
    let answer: Response<ureq::Body> = client.run(request).map_err(ureq::Error::into_io)?;
    if answer.status() != StatusCode::OK {
        let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let wanted = wanted_pause(header("RateLimit-ResetTime"), header("Retry-After"));
        return Ok(Got::Status(answer.status(), wanted));
    }
    let mut file = tempfile::tempfile()?;
    io::copy(&mut answer.into_body().into_with_config().limit(u64::MAX).reader(), &mut file)?;
    io::Seek::rewind(&mut file)?;
    Ok(Got::Archive(file))
}
