//! `artifacts-uploader` and `artifacts-downloader`: processes of their own, started by a stage's script
//! in the project directory, with connections of their own. They say on standard error, and so in the log, what happens.

mod archive;
mod download;
mod upload;

pub(crate) use archive::{collect, unpack, write_zip};
pub(crate) use download::download;
pub(crate) use upload::upload;

/// Why a transfer failed for good. The stage's script then exits with 1, and the job fails by its script.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArtifactsError {
    /// A flag is missing.
    #[error("flag `{0}` is missing")]
    Missing(&'static str),
    /// GitLab's answer, after the last try.
    #[error("GitLab answered {0}")]
    Refused(u16),
    /// No answer, after the last try.
    #[error("reach GitLab")]
    Unreachable(#[source] std::io::Error),
    /// The archive cannot be made or unpacked.
    #[error("work on the archive")]
    Archive(#[source] std::io::Error),
    /// A path of the job cannot be read as a pattern.
    #[error("read the path `{0}`")]
    Pattern(String, #[source] glob::PatternError),
}

/// Where to, and by which right.
#[derive(Default)]
pub(crate) struct Target {
    /// Base URL of GitLab.
    pub(crate) url: String,
    /// A job's token.
    pub(crate) token: String,
    /// A job's id.
    pub(crate) job: String,
}

impl Target {
    fn check(&self) -> Result<(), ArtifactsError> {
        match () {
            () if self.url.is_empty() => Err(ArtifactsError::Missing("--url")),
            () if self.token.is_empty() => Err(ArtifactsError::Missing("--token")),
            () if self.job.is_empty() => Err(ArtifactsError::Missing("--id")),
            () => Ok(()),
        }
    }

    /// What the log may show of the token.
    fn shown_token(&self) -> String {
        crate::config::short_token(&self.token)
    }
}

/// The uploader's flags.
#[derive(Default)]
pub(crate) struct UploadArguments {
    pub(crate) target: Target,
    /// Files, directories and patterns, from the working directory.
    pub(crate) paths: Vec<String>,
    /// What of these to leave out.
    pub(crate) excludes: Vec<String>,
    /// Also what git does not know.
    pub(crate) untracked: bool,
    /// Name of the archive; empty: `artifacts`.
    pub(crate) name: String,
    /// GitLab's words for a time; empty: GitLab's default.
    pub(crate) expire_in: String,
    /// `zip`, `gzip` or `raw`; empty: zip.
    pub(crate) format: String,
    /// `archive` or a kind of report; empty: archive.
    pub(crate) kind: String,
}

/// The downloader's flags.
#[derive(Default)]
pub(crate) struct DownloadArguments {
    pub(crate) target: Target,
}
