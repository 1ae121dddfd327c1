//! What may be wrong with a pipeline file: always where, what, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why the jobs asked for cannot be made out of the pipeline file.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The file cannot be read.
    #[error("read pipeline file `{}`; name another one with --file", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Something in the file is wrong, or is something that `exec` cannot do.
    #[error("{}:{fault}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where and what.
        fault: Fault,
    },
    /// No job of that name.
    #[error("{}: no job `{name}`; {}{hint}", path.display(), known_jobs(known))]
    NoSuchJob {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// The names there are, in the order of the file.
        known: Vec<String>,
        /// Where else it may stand: nothing, or words that go on with the sentence.
        hint: String,
    },
    /// A job that is several was asked for.
    #[error("{}: `{name}` is {count} jobs; name one of them: {}", path.display(), some_names(some, *count))]
    Several {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// How many there are.
        count: usize,
        /// The first of their names.
        some: Vec<String>,
    },
    /// A hidden job was asked for.
    #[error("{}: `{name}` is a hidden job, a template for others; name a job without a leading dot", path.display())]
    Hidden {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
}

fn known_jobs(known: &[String]) -> String {
    if known.is_empty() { "the file has none".to_owned() } else { format!("its jobs: {}", known.join(", ")) }
}

fn some_names(some: &[String], count: usize) -> String {
    let names: Vec<String> = some.iter().map(|name| format!("`{name}`")).collect();
    format!("{}{}", names.join(", "), if count > some.len() { ", …" } else { "" })
}

/// A line of one of the files that make a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// Which file: 0 is the pipeline file, others were included ([`super::Plan::files`]).
    pub file: usize,
    /// The line, from 1.
    pub number: usize,
}

impl From<usize> for Line {
    /// A line of the pipeline file.
    fn from(number: usize) -> Self {
        Self { file: 0, number }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number.fmt(f)
    }
}

/// One fault: line, job and key where there are any, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub line: Line,
    /// The job being read; `default` and the global keys have none.
    pub job: Option<String>,
    /// Path of the key: `artifacts:reports:junit`.
    pub key: Option<String>,
    /// What is wrong, and the remedy.
    pub what: String,
}

impl Fault {
    /// A fault of the file itself.
    pub(super) fn at(line: impl Into<Line>, what: impl Into<String>) -> Self {
        Self { line: line.into(), job: None, key: None, what: what.into() }
    }

    /// Names the key, in front of what is named already.
    pub(super) fn under(mut self, key: &str) -> Self {
        self.key = Some(match self.key {
            Some(inner) => format!("{key}:{inner}"),
            None => key.to_owned(),
        });
        self
    }

    /// Names the job, unless one is named.
    pub(super) fn of_job(mut self, job: &str) -> Self {
        self.job.get_or_insert_with(|| job.to_owned());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.line)?;
        if let Some(job) = &self.job {
            write!(f, "job `{job}`: ")?;
        }
        if let Some(key) = &self.key {
            write!(f, "key `{key}`: ")?;
        }
        f.write_str(&self.what)
    }
}
