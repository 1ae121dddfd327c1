//! What does this `.gitlab-ci.yml` ask for? YAML to jobs, with lines for everything that is wrong.
//!
//! Only the jobs asked for are read, and what they extend, reference and inherit: a job that exec
//! cannot read is no obstacle to one that it can. The rules are GitLab's (CI/CD YAML syntax
//! reference, GitLab 18); where a key has no effect here, a [`Note`] says so.
//!
//! ```text
//! text ─ parse, inputs, include ─► Node ─ resolve (extends, !reference) ─► job, matrix ─► Job ─ order ─► Plan
//! ```
//!
//! Pure but for reading files ([`Sources`]). Used by `exec` alone.

mod artifacts;
mod containers;
mod duration;
mod error;
mod include;
mod inputs;
mod job;
mod list;
mod matrix;
mod model;
mod node;
mod order;
mod parse;
mod resolve;
pub mod sources;
#[cfg(test)]
mod include_tests;
#[cfg(test)]
mod tests;

pub use error::{Fault, Line, PipelineError};
pub use list::{Listed, list};
pub use model::{AllowFailure, Artifacts, Image, Job, Note, Plan, Service, Variable, When};

use include::Loader;
use matrix::Variant;
use node::Entry;
use resolve::Resolver;
use sources::{Memory, Sources};
use std::io;
use std::path::{Path, PathBuf};
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

/// Reads `path` and what it includes, and plans the jobs `names`, in any order; doubled names count once.
///
/// # Errors
/// [`PipelineError`]: the file, a fault in what the jobs need, or a name that is no job.
pub fn read(path: &Path, names: &[String], sources: &dyn Sources) -> Result<Plan, PipelineError> {
    plan_with(path, &text(path)?, names, sources)
}

/// The text of a pipeline file.
fn text(path: &Path) -> Result<String, PipelineError> {
    let unreadable = |source| PipelineError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(unreadable(io::ErrorKind::IsADirectory.into())),
        _ => sources::read_text(file).map_err(unreadable),
    }
}

/// Plans the jobs `names` of the pipeline `text`, which includes nothing; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn plan(path: &Path, text: &str, names: &[String]) -> Result<Plan, PipelineError> {
    plan_with(path, text, names, &Memory::default())
}

/// Plans the jobs `names` of the pipeline `text`, which includes what `sources` has; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn plan_with(path: &Path, text: &str, names: &[String], sources: &dyn Sources) -> Result<Plan, PipelineError> {
    let pipeline = Pipeline::load(path, text, sources)?;
    pipeline.plan(names)
}

/// A pipeline's files, merged; no job has been looked at.
struct Pipeline {
    path: PathBuf,
    files: Vec<PathBuf>,
    notes: Vec<Note>,
    resolver: Resolver,
    globals: Globals,
}

/// What the file says for all jobs.
struct Globals {
    stages: Vec<String>,
    variables: Option<Entry>,
    default: Vec<Entry>,
}

/// A job that was asked for: its key, and which of its jobs if it is several.
struct Chosen {
    key: String,
    variant: Option<Variant>,
}

impl Pipeline {
    fn load(path: &Path, text: &str, sources: &dyn Sources) -> Result<Self, PipelineError> {
        let mut loader = Loader::new(sources);
        let root = loader.load(path.to_owned(), text);
        let hint = loader.hint();
        let Loader { files, notes, .. } = loader;
        let read = root.and_then(|root| {
            let resolver = Resolver::new(root, hint);
            let globals = globals(&resolver)?;
            Ok((resolver, globals))
        });
        match read {
            Ok((resolver, globals)) => Ok(Self { path: path.to_owned(), files, notes, resolver, globals }),
            Err(fault) => Err(content(path, &files, fault)),
        }
    }

    fn plan(&self, names: &[String]) -> Result<Plan, PipelineError> {
        let mut chosen: Vec<Chosen> = Vec::new();
        for name in names {
            let one = self.choose(name)?;
            if !chosen.iter().any(|c| c.key == one.key && c.variant == one.variant) {
                chosen.push(one);
            }
        }
        let notes = self.notes.clone();
        self.resolver.refill();
        let jobs = plan_jobs(&self.resolver, &self.globals, &chosen, notes)
            .map_err(|fault| content(&self.path, &self.files, fault))?;
        Ok(Plan { files: self.files.clone(), ..jobs })
    }

    /// The job of this name.
    fn choose(&self, name: &str) -> Result<Chosen, PipelineError> {
        let root = self.resolver.root();
        let is_key = |key: &str| !GLOBAL_KEYS.contains(&key) && root.entry(key).is_some();
        if name.starts_with('.') && is_key(name) {
            return Err(PipelineError::Hidden { path: self.path.clone(), name: name.to_owned() });
        }
        if is_key(name) {
            // A fault of the job is told where it is read.
            let Ok(Some(several)) = self.variants(name) else { return Ok(Chosen { key: name.into(), variant: None }) };
            if several.iter().all(|variant| variant.variables.is_empty()) {
                return Ok(Chosen { key: name.into(), variant: None });
            }
            let some = several.iter().take(matrix::SHOWN_MAX).map(|v| v.name.clone()).collect();
            return Err(PipelineError::Several {
                path: self.path.clone(),
                name: name.into(),
                count: several.len(),
                some,
            });
        }
        // `key 1/4` or `key: [a, b]`, of a key that may hold blanks and colons itself.
        let ends = name.match_indices([' ', ':']).map(|(at, _)| at);
        let keys = ends.filter_map(|at| name.get(..at)).filter(|key| is_key(key) && !key.starts_with('.'));
        for key in keys {
            self.resolver.refill();
            let several = self.variants(key).ok().flatten().into_iter().flatten();
            if let Some(variant) = several.into_iter().find(|variant| variant.name == name) {
                return Ok(Chosen { key: key.to_owned(), variant: Some(variant) });
            }
        }
        let known = root.mapping().map(job_names).unwrap_or_default();
        let hint = self.resolver.hint().to_owned();
        Err(PipelineError::NoSuchJob { path: self.path.clone(), name: name.to_owned(), known, hint })
    }

    /// The jobs of a key, if it is several.
    fn variants(&self, key: &str) -> Result<Option<Vec<Variant>>, Fault> {
        let Some(entry) = self.resolver.top(key)? else { return Ok(None) };
        entry.value.get("parallel").map_or(Ok(None), |e| matrix::variants(key, &e.value))
    }
}

/// A fault, in the file that it is in.
fn content(path: &Path, files: &[PathBuf], fault: Fault) -> PipelineError {
    let path = files.get(fault.line.file).map_or(path, PathBuf::as_path).to_owned();
    PipelineError::Content { path, fault }
}

fn job_names(entries: &[Entry]) -> Vec<String> {
    let names = entries.iter().map(|e| &e.key);
    names.filter(|k| !k.starts_with('.') && !GLOBAL_KEYS.contains(&k.as_str())).cloned().collect()
}

fn globals(resolver: &Resolver) -> Result<Globals, Fault> {
    if let Some(types) = resolver.root().get("types") {
        return Err(Fault::at(types.line, "is no longer known to GitLab; write `stages`").under("types"));
    }
    Ok(Globals { stages: stages(resolver)?, variables: top(resolver, "variables")?, default: defaults(resolver)? })
}

fn plan_jobs(resolver: &Resolver, globals: &Globals, chosen: &[Chosen], mut notes: Vec<Note>) -> Result<Plan, Fault> {
    if let Some(workflow) = resolver.root().get("workflow") {
        let what = "is ignored: a job that is named runs, and variables of its rules are not set".into();
        notes.push(Note { line: workflow.line, job: None, key: "workflow".into(), what });
    }
    let Globals { stages, variables, default } = globals;
    let context = job::Context { default, variables: variables.as_ref(), stages, hint: resolver.hint() };
    let mut reads = Vec::new();
    // In the order of the file, so that a plan does not depend on how it was asked for.
    for key in resolver.root().mapping()?.iter().map(|e| &e.key) {
        let mut variants: Vec<&Chosen> = chosen.iter().filter(|c| c.key == *key).collect();
        if variants.is_empty() {
            continue;
        }
        variants.sort_by_key(|c| c.variant.as_ref().map(|v| v.index));
        let line = resolver.root().entry(key).map_or(Line::from(1), |e| e.line);
        let empty = || Fault::at(line, "is empty").of_job(key);
        let entry = resolver.top(key).map_err(|f| f.of_job(key))?.ok_or_else(empty)?;
        for Chosen { variant, .. } in variants {
            let mut read = job::read(&entry, variant.as_ref(), &context).map_err(|f| f.of_job(key))?;
            notes.append(&mut read.notes);
            reads.push(read);
        }
    }
    let jobs = order::order(reads, stages, resolver, &mut notes)?;
    let mut seen: Vec<Note> = Vec::new();
    for note in notes {
        // Several jobs may inherit the same line.
        if !seen.contains(&note) {
            seen.push(note);
        }
    }
    seen.sort_by_key(|n| n.line);
    Ok(Plan { jobs, notes: seen, files: Vec::new() })
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
