//! `GET /jobs/:id/artifacts`: the archive of this or another job, and the object storage behind it.

use super::super::answer::Answer;
use super::super::auth;
use super::super::job::{Artifact, Job, User};
use super::super::model::Model;
use super::super::params::Params;
use super::content::ArtifactContent;
use dayfly::gitlab::JobId;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;

/// What will be streamed once the lock is released.
#[derive(Debug)]
pub(in crate::standin) struct Wanted {
    pub(in crate::standin) content: ArtifactContent,
    pub(in crate::standin) size: u64,
    pub(in crate::standin) filename: String,
    /// Whether the headers are those of object storage, not GitLab's own.
    remote: bool,
}

impl Wanted {
    fn of(artifact: &Artifact) -> Self {
        let Artifact { content, size, filename, remote, .. } = artifact;
        Self { content: content.clone(), size: *size, filename: filename.clone(), remote: *remote }
    }
}

/// Who may have which archive. The token must be that of an executing job: else 401.
pub(in crate::standin) fn download(
    model: &mut Model,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    now: Timestamp,
) -> Result<Result<Wanted, Answer>, Answer> {
    let direct = params.boolean("direct_download")?.unwrap_or(false);
    let mode = params.text("download_mode")?;
    if mode.as_deref().is_some_and(|mode| !["proxy", "direct"].contains(&mode)) {
        return Err(Answer::bad_parameter("download_mode does not have a valid value"));
    }
    let direct = mode.as_deref().map_or(direct, |mode| mode == "direct");
    let shown = auth::shown_job_token(params, headers)?;
    let asking = shown.and_then(|token| model.job_by_token(&token)).and_then(|job| model.jobs.get(&job));
    let asking = asking.filter(|job| job.state.is_executing() && !job.token_is_expired(now));
    let Some(asking) = asking else {
        model.metrics.refused += 1;
        return Err(Answer::refusal(StatusCode::UNAUTHORIZED, None));
    };
    let forbidden = || Answer::refusal(StatusCode::FORBIDDEN, None);
    let target = model.jobs.get(&id).ok_or_else(forbidden)?;
    may_read(model, asking, target)?;
    let not_found = || Answer::message(StatusCode::NOT_FOUND, "404 Not Found");
    let expired = target.artifacts_expire_at.is_some_and(|end| end <= now);
    let archive = target.artifacts.get("archive").filter(|_| !expired && !target.erased).ok_or_else(not_found)?;
    if archive.remote && direct {
        let base = &model.settings.external_url;
        let location =
            format!("{base}/-/object-storage/{}/{}?signature={}", target.id, archive.filename, archive.sha256);
        return Ok(Err(Answer::empty(StatusCode::FOUND).with("location", &location)));
    }
    Ok(Ok(Wanted::of(archive)))
}

/// Jobs of one project may read each other's artifacts; across projects the other one must have this
/// one on its allow list, and the user must be able to see its pipelines. An entry with single permissions
/// must have that for jobs, unless everybody may see them; no entry here has any.
fn may_read(model: &Model, asking: &Job, target: &Job) -> Result<(), Answer> {
    let forbidden = || Answer::refusal(StatusCode::FORBIDDEN, None);
    let project = model.projects.get(&target.project).ok_or_else(forbidden)?;
    let own = model.projects.get(&asking.project).ok_or_else(forbidden)?;
    let open = project.public && project.public_builds;
    if asking.project == target.project {
        return if open || asking.spec.user != User::Nowhere { Ok(()) } else { Err(forbidden()) };
    }
    let listed = project.job_token_allowlist.contains(own.name()) || project.job_token_allowlist.contains(&own.path);
    if !listed || !(open || asking.spec.user == User::Everywhere) {
        return Err(forbidden());
    }
    if project.job_token_policies_enabled && !open {
        let name = project.name();
        let detail = format!(
            "Insufficient permissions to access this resource in project {name}. \
             The following token permission is required: read_jobs."
        );
        return Err(Answer::refusal(StatusCode::FORBIDDEN, Some(&detail)));
    }
    Ok(())
}

/// `GET /-/object-storage/…`: the signature is all it takes.
pub(in crate::standin) fn from_storage(model: &Model, path: &str, params: &Params) -> Result<Wanted, Answer> {
    let forbidden = || Answer::refusal(StatusCode::FORBIDDEN, None);
    let id = path.split('/').nth(3).and_then(|id| id.parse().ok()).map(JobId).ok_or_else(forbidden)?;
    let archive = model.jobs.get(&id).and_then(|job| job.artifacts.get("archive")).ok_or_else(forbidden)?;
    if params.text("signature")?.as_deref() != Some(archive.sha256.as_str()) {
        return Err(forbidden());
    }
    Ok(Wanted::of(archive))
}

/// Streams it: whole, or the one range that was asked for.
pub(in crate::standin) async fn ranged(wanted: Wanted, headers: &HeaderMap) -> Answer {
    let range = auth::header(headers, "range");
    let part = match range.as_deref().map(|range| parse_range(range, wanted.size)) {
        None | Some(Range::Ignored) => None,
        Some(Range::Part(start, end)) => Some((start, end)),
        Some(Range::Unsatisfiable) => {
            return Answer::empty(StatusCode::RANGE_NOT_SATISFIABLE)
                .with("content-range", &format!("bytes */{}", wanted.size));
        }
    };
    let (start, length) = part.map_or((0, wanted.size), |(start, end)| (start, end - start + 1));
    let body = match wanted.content.body(start, length).await {
        Ok(Some(body)) => body,
        Ok(None) | Err(_) => return Answer::message(StatusCode::NOT_FOUND, "404 Not Found"),
    };
    let mut answer = Answer::empty(if part.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK });
    answer.body = body;
    let disposition = format!("attachment; filename=\"{}\"", wanted.filename.replace(['"', '\\', '\r', '\n'], "_"));
    if let Some((start, end)) = part {
        answer = answer.with("content-range", &format!("bytes {start}-{end}/{}", wanted.size));
    }
    if !wanted.remote {
        answer = answer.with("content-transfer-encoding", "binary");
    }
    answer
        .with("content-type", "application/octet-stream")
        .with("content-length", &length.to_string())
        .with("accept-ranges", "bytes")
        .with("content-disposition", &disposition)
}

enum Range {
    Ignored,
    Part(u64, u64),
    Unsatisfiable,
}

/// One range of bytes; several, or other units, are ignored.
fn parse_range(range: &str, size: u64) -> Range {
    let Some((first, last)) = range.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return Range::Ignored;
    };
    let end = size.saturating_sub(1);
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(start), _) if start >= size => Range::Unsatisfiable,
        (Ok(start), Ok(last)) if last >= start => Range::Part(start, last.min(end)),
        (Ok(start), Err(_)) if last.is_empty() => Range::Part(start, end),
        (Err(_), Ok(tail)) if first.is_empty() && tail > 0 && size > 0 => Range::Part(size.saturating_sub(tail), end),
        _ => Range::Ignored,
    }
}
