//! The stand-in GitLab as the recorded runner's GitLab was: the job with its very payload, and the
//! jobs whose artifacts it fetches.

use crate::message::content;
use crate::recording::{Class, Recording};
use dayfly::clock::Clock;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_exec::standin::{Artifact, ArtifactContent, JobSpec, JobState, ProjectId, Standin};
use serde::Deserialize;
use std::io::{self, Write as _};

/// A GitLab with one job in its queue.
pub(crate) struct Gitlab {
    pub(crate) standin: Standin,
    pub(crate) runner_token: Secret,
    pub(crate) job: JobId,
}

#[derive(Deserialize)]
struct Payload {
    id: u64,
    #[serde(default)]
    dependencies: Option<Vec<Dependency>>,
}

#[derive(Deserialize)]
struct Dependency {
    id: u64,
    token: String,
}

impl Gitlab {
    /// With archives of the sizes that were recorded, which hold no files.
    pub(crate) fn new(recording: &Recording) -> Result<Self, String> {
        Self::with(recording, |bytes| Some(content(usize::try_from(bytes?).ok()?)))
    }

    /// With archives that can be unpacked: the one file of the recorded ones.
    pub(crate) fn with_real_archives(recording: &Recording) -> Result<Self, String> {
        let archive = archive("dep/hello.txt", b"hello from the dependency\n").map_err(|error| error.to_string())?;
        Self::with(recording, |_| Some(archive.clone()))
    }

    fn with(recording: &Recording, archive: impl Fn(Option<u64>) -> Option<Vec<u8>>) -> Result<Self, String> {
        let standin = Standin::new(Clock::system(), Rng::system());
        let project = standin.add_project("grp/proj");
        let runner = standin.add_runner(project);
        let runner_token = standin.runner_token(runner).ok_or("the runner has no token")?;
        let hand_out = recording.requests.iter().find(|r| r.class == Class::Ask && r.answer.status == Some(201));
        let raw = hand_out.ok_or("no request got the job")?.answer.body.clone();
        let payload: Payload = serde_json::from_str(&raw).map_err(|error| format!("the payload: {error}"))?;
        for dependency in payload.dependencies.unwrap_or_default() {
            add_dependency(&standin, project, recording, &dependency, &archive);
        }
        let job = JobId(payload.id);
        let spec = JobSpec::raw(job, Secret::new(recording.job_token.clone()), raw);
        if standin.enqueue(project, spec) != job {
            return Err("the stand-in gave the job another id".into());
        }
        Ok(Self { standin, runner_token, job })
    }
}

/// A zip of one file.
fn archive(name: &str, content: &[u8]) -> zip::result::ZipResult<Vec<u8>> {
    let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    writer.start_file(name, zip::write::SimpleFileOptions::default())?;
    writer.write_all(content)?;
    Ok(writer.finish()?.into_inner())
}

/// A job that has run and left an archive of the size that was recorded. The payload may name a token
/// of its own for it; GitLab takes that of a running job only, so then it still runs.
fn add_dependency(
    standin: &Standin,
    project: ProjectId,
    recording: &Recording,
    dependency: &Dependency,
    archive: impl Fn(Option<u64>) -> Option<Vec<u8>>,
) {
    let own_token = dependency.token != recording.job_token;
    let token = own_token.then(|| Secret::new(dependency.token.clone()));
    let spec = JobSpec { id: Some(JobId(dependency.id)), token, ..JobSpec::script(["true"]) };
    let id = standin.enqueue(project, spec);
    let path = format!("/api/v4/jobs/{}/artifacts", dependency.id);
    let download = recording.requests.iter().find(|r| r.class == Class::Download && r.target.starts_with(&path));
    let bytes = archive(download.and_then(|r| r.answer.body_bytes));
    standin.edit(|model| {
        let Some(job) = model.jobs.get_mut(&id) else { return };
        job.queued = false;
        job.state = if own_token { JobState::Running } else { JobState::Success };
        let Some(bytes) = bytes else { return };
        let archive = Artifact {
            kind: "archive".into(),
            format: "zip".into(),
            filename: "artifacts.zip".into(),
            size: bytes.len() as u64,
            sha256: String::new(),
            accessibility: "public".into(),
            remote: false,
            content: ArtifactContent::Memory(bytes.into()),
        };
        job.artifacts.insert("archive".into(), archive);
    });
}
