//! What a pipeline file comes to: jobs ready to run, in order, and remarks for the developer.

use super::error::Line;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The jobs asked for, in the order in which they run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The jobs.
    pub jobs: Vec<Job>,
    /// What was read and is not obeyed, one line each.
    pub notes: Vec<Note>,
    /// The files that it was read from: the pipeline file, then what it includes, in the order of reading.
    pub files: Vec<PathBuf>,
}

/// One job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its name.
    pub name: String,
    /// Line of its name.
    pub line: Line,
    /// Its key in the file, where it is one of several jobs of that key.
    pub(super) key: String,
    /// Which of how many jobs of its key it is: `CI_NODE_INDEX` and `CI_NODE_TOTAL`.
    pub node: Option<(usize, usize)>,
    /// Its stage.
    pub stage: String,
    /// `before_script`, then `script`.
    pub script: Vec<String>,
    /// `after_script`; empty: none.
    pub after_script: Vec<String>,
    /// Global ones, then the job's, each key once.
    pub variables: Vec<Variable>,
    /// `image`, for images whose runner has an executor that obeys it.
    pub image: Option<Image>,
    /// `services`, likewise.
    pub services: Vec<Service>,
    /// `artifacts`.
    pub artifacts: Artifacts,
    /// `timeout`.
    pub timeout: Option<Duration>,
    /// `allow_failure`.
    pub allow_failure: AllowFailure,
    /// `hooks:pre_get_sources_script`.
    pub pre_get_sources_script: Vec<String>,
    /// Jobs of this plan that must run before.
    pub after: Vec<String>,
    /// Jobs of this plan whose artifacts it gets.
    pub artifacts_from: Vec<String>,
}

impl Job {
    /// Whether it may upload anything.
    #[must_use]
    pub fn uploads(&self) -> bool {
        self.artifacts.untracked || !self.artifacts.paths.is_empty() || !self.artifacts.reports.is_empty()
    }
}

/// One variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: String,
    /// `expand: false`: the runner leaves `$OTHER` in the value alone.
    pub raw: bool,
}

/// `image`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its entry point.
    pub entrypoint: Vec<String>,
}

/// One of `services`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its image's name.
    pub name: String,
    /// What the job calls it, if not by that.
    pub alias: Option<String>,
    /// Its entry point.
    pub entrypoint: Vec<String>,
    /// Its command.
    pub command: Vec<String>,
    /// Its own variables.
    pub variables: Vec<(String, String)>,
}

/// Which failures of a job count as success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowFailure {
    /// None.
    No,
    /// All.
    Yes,
    /// Those of the script with these exit codes.
    ExitCodes(Vec<i32>),
}

impl AllowFailure {
    /// Whether a script that ended with `exit_code` (none: not by an exit code) may fail.
    #[must_use]
    pub fn covers(&self, exit_code: Option<i32>) -> bool {
        match self {
            Self::No => false,
            Self::Yes => true,
            Self::ExitCodes(codes) => exit_code.is_some_and(|code| codes.contains(&code)),
        }
    }
}

/// `artifacts`: the archive, if there are `paths` or `untracked`, and the reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Artifacts {
    /// Name of the archive; empty: the runner's default.
    pub name: String,
    /// What goes in.
    pub paths: Vec<String>,
    /// What stays out.
    pub exclude: Vec<String>,
    /// Whether files go in that git does not know.
    pub untracked: bool,
    /// When the archive is uploaded.
    pub when: When,
    /// How long GitLab would keep it, as written.
    pub expire_in: Option<String>,
    /// Reports: their type, as the runner uploads it, and their files.
    pub reports: Vec<(String, Vec<String>)>,
}

/// When the runner uploads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum When {
    /// If the script succeeded.
    #[default]
    OnSuccess,
    /// If it failed.
    OnFailure,
    /// In any case.
    Always,
}

impl When {
    /// GitLab's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OnSuccess => "on_success",
            Self::OnFailure => "on_failure",
            Self::Always => "always",
        }
    }
}

/// A remark: something in the file that has no effect here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Where.
    pub line: Line,
    /// The job; `default` and the global keys have none.
    pub job: Option<String>,
    /// The key.
    pub key: String,
    /// What that means.
    pub what: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.line)?;
        if let Some(job) = &self.job {
            write!(f, "job `{job}`: ")?;
        }
        write!(f, "key `{}`: {}", self.key, self.what)
    }
}
