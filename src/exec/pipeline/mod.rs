//! What does this `.gitlab-ci.yml` ask for? YAML to jobs, with lines for everything that is wrong.
//!
//! Only the jobs asked for are read, and what they extend, reference and inherit: a job that exec
//! cannot read is no obstacle to one that it can. The rules are GitLab's (CI/CD YAML syntax
//! reference, GitLab 18); where a key has no effect here, a [`Note`] says so.
//!
//! ```text
//! text ─ parse ─► Node ─ resolve (extends, !reference) ─► job ─► Job ─ order ─► Plan
//! ```
//!
//! Pure but for reading the file. Used by `exec` alone.

mod artifacts;
mod duration;
mod error;
mod job;
mod model;
mod node;
mod order;
mod parse;
mod resolve;
#[cfg(test)]
mod tests;

pub use error::{Fault, PipelineError};
pub use model::{AllowFailure, Artifacts, Image, Job, Note, Plan, Variable, When};

use node::Entry;
use resolve::Resolver;
use std::io;
use std::path::Path;
use std::time::Duration;

/// A timeout as GitLab reads it: `1h 30m`, `90 minutes`; at least a second, at most a month.
#[must_use]
pub fn parse_timeout(text: &str) -> Option<Duration> {
    duration::parse(text).filter(|timeout| (Duration::from_secs(1)..=duration::TIMEOUT_MAX).contains(timeout))
}

/// Keys at the top of the file that are no jobs.
const GLOBAL_KEYS: &[&str] = &[
    "after_script",
    "before_script",
    "cache",
    "default",
    "image",
    "include",
    "services",
    "spec",
    "stages",
    "types",
    "variables",
    "workflow",
];

/// Reads `path` and plans the jobs `names`, in any order; doubled names count once.
///
/// # Errors
/// [`PipelineError`]: the file, a fault in what the jobs need, or a name that is no job.
pub fn read(path: &Path, names: &[String]) -> Result<Plan, PipelineError> {
    use std::io::Read as _;
    let unreadable = |source| PipelineError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|f| f.take(parse::FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.len() as u64 > parse::FILE_BYTES_MAX {
        return Err(unreadable(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 1 MiB")));
    }
    let text = String::from_utf8(bytes).map_err(|e| unreadable(io::Error::new(io::ErrorKind::InvalidData, e)))?;
    plan(path, &text, names)
}

/// Plans the jobs `names` of the pipeline `text`; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn plan(path: &Path, text: &str, names: &[String]) -> Result<Plan, PipelineError> {
    let content = |fault| PipelineError::Content { path: path.to_owned(), fault };
    let resolver = Resolver::new(parse::parse(text).map_err(content)?);
    for name in names {
        if GLOBAL_KEYS.contains(&name.as_str()) || resolver.root().entry(name).is_none() {
            let known = resolver.root().mapping().map(job_names).unwrap_or_default();
            return Err(PipelineError::NoSuchJob { path: path.to_owned(), name: name.clone(), known });
        }
        if name.starts_with('.') {
            return Err(PipelineError::Hidden { path: path.to_owned(), name: name.clone() });
        }
    }
    plan_jobs(&resolver, names).map_err(content)
}

fn job_names(entries: &[Entry]) -> Vec<String> {
    let names = entries.iter().map(|e| &e.key);
    names.filter(|k| !k.starts_with('.') && !GLOBAL_KEYS.contains(&k.as_str())).cloned().collect()
}

fn plan_jobs(resolver: &Resolver, names: &[String]) -> Result<Plan, Fault> {
    let mut notes = Vec::new();
    if let Some(include) = resolver.root().get("include") {
        return Err(
            Fault::at(include.line, "other files are not read; copy what the job needs into this one").under("include")
        );
    }
    if let Some(types) = resolver.root().get("types") {
        return Err(Fault::at(types.line, "is no longer known to GitLab; write `stages`").under("types"));
    }
    if let Some(workflow) = resolver.root().get("workflow") {
        let what = "is ignored: a job that is named runs, and variables of its rules are not set".into();
        notes.push(Note { line: workflow.line, job: None, key: "workflow".into(), what });
    }
    let stages = stages(resolver)?;
    let variables = top(resolver, "variables")?;
    let default = defaults(resolver)?;
    let context = job::Context { default: &default, variables: variables.as_ref(), stages: &stages };
    let mut reads = Vec::new();
    // In the order of the file, so that a plan does not depend on how it was asked for.
    for name in resolver.root().mapping()?.iter().map(|e| &e.key).filter(|k| names.contains(k)) {
        let empty = || Fault::at(resolver.root().entry(name).map_or(1, |e| e.line), "is empty").of_job(name);
        let entry = resolver.top(name).map_err(|f| f.of_job(name))?.ok_or_else(empty)?;
        let mut read = job::read(&entry, &context).map_err(|f| f.of_job(name))?;
        notes.append(&mut read.notes);
        reads.push(read);
    }
    let jobs = order::order(reads, &stages, resolver.root(), &mut notes)?;
    let mut seen: Vec<Note> = Vec::new();
    for note in notes {
        // Several jobs may inherit the same line.
        if !seen.contains(&note) {
            seen.push(note);
        }
    }
    seen.sort_by_key(|n| n.line);
    Ok(Plan { jobs, notes: seen })
}

fn top(resolver: &Resolver, key: &str) -> Result<Option<Entry>, Fault> {
    resolver.top(key).map_err(|f| f.under(key))
}

/// `default`, and the global keys that mean the same.
fn defaults(resolver: &Resolver) -> Result<Vec<Entry>, Fault> {
    let mut entries = match top(resolver, "default")? {
        Some(default) => default.value.mapping().map_err(|f| f.under("default"))?.to_vec(),
        None => Vec::new(),
    };
    for key in job::TOP_LEVEL_DEFAULTS {
        let Some(entry) = top(resolver, key)? else { continue };
        if entries.iter().any(|e| e.key == *key) {
            return Err(Fault::at(entry.line, "stands here and in `default`; GitLab takes one of them only").under(key));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// `.pre`, those of the file or GitLab's own, `.post`.
fn stages(resolver: &Resolver) -> Result<Vec<String>, Fault> {
    let middle = match top(resolver, "stages")? {
        Some(entry) => entry.value.texts().map_err(|f| f.under("stages"))?,
        None => ["build", "test", "deploy"].map(str::to_owned).to_vec(),
    };
    let edges = [".pre", ".post"];
    let middle = middle.into_iter().filter(|s| !edges.contains(&s.as_str()));
    Ok([".pre".to_owned()].into_iter().chain(middle).chain([".post".to_owned()]).collect())
}
