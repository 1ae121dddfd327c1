//! `POST /jobs/:id/artifacts`: one multipart file, streamed; nothing is stored unless it came whole.

use super::super::Standin;
use super::super::answer::Answer;
use super::super::auth::{self, Expired};
use super::super::job::Artifact;
use super::super::model::{InnerFault, Model, after};
use super::super::params::Params;
use super::super::payload::artifact_format;
use super::super::settings::ArtifactKeep;
use super::content::ArtifactContent;
use super::multipart::{self, Multipart, MultipartError, Part};
use super::{dotenv, expiry};
use bytes::BytesMut;
use dayfly::gitlab::{Body, JobId};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::path::PathBuf;
use tokio::io::AsyncWriteExt as _;

/// Formats that GitLab stores.
const FORMATS: [&str; 3] = ["zip", "gzip", "raw"];

/// A dotenv report is read whole; GitLab allows 5 KiB unpacked.
const DOTENV_BYTES_MAX: u64 = 64 << 10;

/// What the query says about an upload.
struct Wanted {
    kind: String,
    format: String,
    accessibility: Option<String>,
    expire_in: Option<String>,
}

impl Wanted {
    fn read(params: &Params) -> Result<Self, Answer> {
        let invalid = |key: &str| Answer::bad_parameter(&format!("{key} does not have a valid value"));
        let kind = params.text("artifact_type")?.unwrap_or_else(|| "archive".into());
        let format = params.text("artifact_format")?.unwrap_or_else(|| "zip".into());
        let accessibility = params.text("accessibility")?;
        if artifact_format(&kind).is_none() {
            return Err(invalid("artifact_type"));
        }
        if !FORMATS.contains(&format.as_str()) {
            return Err(invalid("artifact_format"));
        }
        if accessibility.as_deref().is_some_and(|word| !["public", "private", "none"].contains(&word)) {
            return Err(invalid("accessibility"));
        }
        Ok(Self { kind, format, accessibility, expire_in: params.text("expire_in")? })
    }
}

/// A file that came whole.
struct Received {
    filename: String,
    size: u64,
    sha256: String,
    content: ArtifactContent,
    /// Its bytes, for reports that are read.
    small: Option<Vec<u8>>,
}

/// The front proxy's call, and what it does by itself before it reads a body.
pub(in crate::standin) fn authorize(
    model: &mut Model,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    now: Timestamp,
) -> Result<u64, Answer> {
    let token = auth::shown_job_token(params, headers)?;
    auth::job(model, id, token.as_deref(), Expired::Refused, now)?;
    if !model.settings.artifacts_enabled {
        return Err(Answer::refusal(StatusCode::METHOD_NOT_ALLOWED, None));
    }
    let project = model.jobs.get(&id).and_then(|job| model.projects.get(&job.project));
    let bytes_max = project.map_or(0, |project| project.artifact_bytes_max(&model.settings));
    let announced = params.integer("filesize")?.and_then(|size| u64::try_from(size).ok());
    if announced.is_some_and(|size| size > bytes_max) {
        return Err(too_large());
    }
    Ok(bytes_max)
}

fn too_large() -> Answer {
    Answer::message(StatusCode::PAYLOAD_TOO_LARGE, "file size has reached maximum size limit")
}

/// Takes an upload in.
pub(in crate::standin) async fn upload(
    standin: &Standin,
    id: JobId,
    params: &Params,
    headers: &HeaderMap,
    body: Body,
    now: Timestamp,
) -> Result<Answer, Answer> {
    let (bytes_max, keep) = standin.edit(|model| {
        let bytes_max = authorize(model, id, params, headers, now)?;
        Ok::<_, Answer>((bytes_max, model.settings.artifact_keep.clone()))
    })?;
    let file = receive(standin, headers, body, bytes_max, &keep).await?;
    let content = file.content.clone();
    let answer = standin.edit(|model| store(model, id, params, file, standin.now()));
    let is_kept = standin.read(|model| {
        let artifacts = model.jobs.get(&id).into_iter().flat_map(|job| job.artifacts.values());
        artifacts.into_iter().any(|artifact| same_file(&artifact.content, &content))
    });
    if let ArtifactContent::File(path) = &content
        && !is_kept
    {
        remove(path).await;
    }
    answer
}

fn same_file(a: &ArtifactContent, b: &ArtifactContent) -> bool {
    matches!((a, b), (ArtifactContent::File(a), ArtifactContent::File(b)) if a == b)
}

async fn remove(path: &PathBuf) {
    if let Err(error) = tokio::fs::remove_file(path).await {
        tracing::warn!(%error, "stand-in: a refused upload stays in the artifact directory");
    }
}

/// Reads the multipart body: exactly one file, in the field `file`.
async fn receive(
    standin: &Standin,
    headers: &HeaderMap,
    body: Body,
    bytes_max: u64,
    keep: &ArtifactKeep,
) -> Result<Received, Answer> {
    let content_type = auth::header(headers, "content-type").unwrap_or_default();
    let Some(boundary) = multipart::boundary(&content_type) else {
        return Err(Answer::bad_parameter("file is missing"));
    };
    let mut multipart = Multipart::new(body, &boundary, bytes_max);
    let mut received = None;
    loop {
        // A plain field is GitLab's to ignore: it is read and forgotten.
        let filename = match multipart.next_part().await {
            Ok(Some(Part { filename: None, .. })) => continue,
            Ok(None) => break,
            // The front proxy takes one file, and only under this name.
            Ok(Some(Part { filename: Some(filename), name }))
                if name.as_deref() == Some("file") && received.is_none() =>
            {
                Ok(filename)
            }
            Ok(Some(_)) => Err(MultipartError::Broken),
            Err(error) => Err(error),
        };
        match filename {
            Ok(filename) => {
                received = Some(receive_file(standin, &mut multipart, filename, bytes_max, keep).await?);
            }
            Err(error) => {
                discard(received).await;
                return Err(refusal(&error));
            }
        }
    }
    received.ok_or_else(|| Answer::bad_parameter("file is missing"))
}

fn refusal(error: &MultipartError) -> Answer {
    match error {
        MultipartError::TooLarge => too_large(),
        MultipartError::Cut | MultipartError::Broken => {
            Answer::message(StatusCode::INTERNAL_SERVER_ERROR, "500 Internal Server Error")
        }
    }
}

async fn discard(received: Option<Received>) {
    if let Some(Received { content: ArtifactContent::File(path), .. }) = received {
        remove(&path).await;
    }
}

/// Reads one file to where it is kept, counting and hashing.
async fn receive_file(
    standin: &Standin,
    multipart: &mut Multipart,
    filename: String,
    bytes_max: u64,
    keep: &ArtifactKeep,
) -> Result<Received, Answer> {
    let memory_max = match keep {
        ArtifactKeep::Memory { bytes_max: memory_max } => bytes_max.min(*memory_max),
        ArtifactKeep::Directory(_) | ArtifactKeep::Discard => bytes_max,
    };
    let io_error = || Answer::message(StatusCode::SERVICE_UNAVAILABLE, "503 Service Unavailable");
    let mut file = match keep {
        ArtifactKeep::Directory(directory) => {
            let path = directory.join(format!("upload-{}", standin.edit(Model::new_id)));
            let file = tokio::fs::File::create(&path).await.map_err(|_| io_error())?;
            Some((path, file))
        }
        ArtifactKeep::Memory { .. } | ArtifactKeep::Discard => None,
    };
    let mut memory = matches!(keep, ArtifactKeep::Memory { .. }).then(BytesMut::new);
    let mut small = Some(Vec::new());
    let (mut size, mut hash) = (0_u64, Sha256::new());
    let outcome = loop {
        let chunk = match multipart.chunk().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break Ok(()),
            Err(error) => break Err(refusal(&error)),
        };
        size = size.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
        if size > memory_max {
            break Err(too_large());
        }
        hash.update(&chunk);
        if let Some(memory) = &mut memory {
            memory.extend_from_slice(&chunk);
        }
        small = small.filter(|_| size <= DOTENV_BYTES_MAX);
        if let Some(small) = &mut small {
            small.extend_from_slice(&chunk);
        }
        if let Some((_, file)) = &mut file
            && file.write_all(&chunk).await.is_err()
        {
            break Err(io_error());
        }
    };
    let flushed = match &mut file {
        Some((_, file)) => file.flush().await.map_err(|_| io_error()),
        None => Ok(()),
    };
    if let Err(answer) = outcome.and(flushed) {
        if let Some((path, _)) = &file {
            remove(path).await;
        }
        return Err(answer);
    }
    let content = match (file, memory) {
        (Some((path, _)), _) => ArtifactContent::File(path),
        (None, Some(memory)) => ArtifactContent::Memory(memory.freeze()),
        (None, None) => ArtifactContent::Gone,
    };
    let mut sha256 = String::new();
    for byte in hash.finalize() {
        // Writing to a String never fails.
        let _ = write!(sha256, "{byte:02x}");
    }
    Ok(Received { filename, size, sha256, content, small })
}

/// What GitLab proper does with a file that came whole. The job may be over by now.
fn store(model: &mut Model, id: JobId, params: &Params, file: Received, now: Timestamp) -> Result<Answer, Answer> {
    let wanted = Wanted::read(params)?;
    if model.inner_fault == Some(InnerFault::ObjectStorage) {
        return Err(Answer::message(StatusCode::SERVICE_UNAVAILABLE, "503 Service Unavailable"));
    }
    let remote = model.settings.remote_artifacts;
    let default_expiry = model.settings.default_artifacts_expire_in.clone();
    let gone = || Answer::refusal(StatusCode::FORBIDDEN, None);
    let job = model.jobs.get_mut(&id).ok_or_else(gone)?;
    if let Some(known) = job.artifacts.get(&wanted.kind) {
        if known.sha256 == file.sha256 {
            return Ok(Answer::number(StatusCode::CREATED));
        }
        return Err(Answer::message(StatusCode::BAD_REQUEST, "another artifact of the same type already exists"));
    }
    if artifact_format(&wanted.kind) != Some(wanted.format.as_str()) {
        return Err(Answer::json(
            StatusCode::BAD_REQUEST,
            &json!({ "message": "Invalid file format with specified file type" }),
        ));
    }
    if wanted.kind == "dotenv" {
        let parsed = dotenv::parse(file.small.as_deref().unwrap_or_default());
        job.dotenv = parsed.map_err(|message| Answer::message(StatusCode::BAD_REQUEST, &message))?;
    }
    let expire_in = wanted.expire_in.as_ref().or(default_expiry.as_ref());
    let expire_in = expire_in.and_then(|text| expiry::parse(text).unwrap_or(None));
    job.artifacts_expire_at = expire_in.map(|duration| after(now, duration));
    let configured = job.spec.artifacts.as_ref().and_then(|artifacts| {
        let access = artifacts.get("access").and_then(|access| access.as_str());
        let hidden = artifacts.get("public").and_then(serde_json::Value::as_bool) == Some(false);
        match (access, hidden) {
            (Some("all"), _) => Some("public"),
            (Some("none"), _) => Some("none"),
            (Some(_), _) | (None, true) => Some("private"),
            (None, false) => None,
        }
    });
    let accessibility = wanted.accessibility.unwrap_or_else(|| configured.unwrap_or("public").to_owned());
    let Received { filename, size, sha256, content, .. } = file;
    let artifact = Artifact {
        kind: wanted.kind.clone(),
        format: wanted.format,
        filename,
        size,
        sha256,
        accessibility,
        remote,
        content,
    };
    job.artifacts.insert(wanted.kind, artifact);
    Ok(Answer::number(StatusCode::CREATED))
}
