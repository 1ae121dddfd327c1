//! `include`: all local files of a pipeline in one tree, and the names of what is not read.
//!
//! Merged as GitLab does it: what is included comes first, in its order, each file after what it includes itself;
//! the including file is laid over it; mappings are merged key by key, everything else is replaced. Files of other
//! projects, templates, components and the web are not read: they are noted, and only a job that needs something of
//! theirs is refused.
//!
//! Bounds: 150 files, as in GitLab, nested 50 deep; 16 MiB of text, 1,000,000 values looked at while merging.

use super::error::{Fault, Line};
use super::inputs::{self, Given};
use super::model::Note;
use super::node::{Entry, Node, Value};
use super::parse;
use super::resolve::deep_merge;
use super::sources::Sources;
use std::path::PathBuf;
use std::rc::Rc;

/// Included files, as in GitLab (`ci_max_includes`).
const FILES_MAX: usize = 150;
/// Files that include each other. GitLab counts files only.
const DEPTH_MAX: usize = 50;
/// Bytes of all files.
const BYTES_MAX: usize = 16 * 1024 * 1024;
/// Entries that merging may look at.
const MERGED_MAX: usize = 1_000_000;

/// A file that is not read.
#[derive(Clone, Debug)]
struct Missing {
    line: Line,
    what: String,
}

/// Reads the files of one pipeline.
pub(super) struct Loader<'a> {
    sources: &'a dyn Sources,
    /// The files read, for messages.
    pub(super) files: Vec<PathBuf>,
    pub(super) notes: Vec<Note>,
    missing: Vec<Missing>,
    bytes_left: usize,
    filled_left: usize,
    merged_left: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(sources: &'a dyn Sources) -> Self {
        Self {
            sources,
            files: Vec::new(),
            notes: Vec::new(),
            missing: Vec::new(),
            bytes_left: BYTES_MAX,
            filled_left: inputs::TEXT_BYTES_MAX,
            merged_left: MERGED_MAX,
        }
    }

    /// The pipeline file at `path`, with what it includes.
    pub(super) fn load(&mut self, path: PathBuf, text: &str) -> Result<Rc<Node>, Fault> {
        self.file(path, text, &Given::default(), Line::from(1), &mut Vec::new())
    }

    /// Words that go on after "there is no X": where else it may stand.
    pub(super) fn hint(&self) -> String {
        let Some(first) = self.missing.first() else { return String::new() };
        let others = match self.missing.len() - 1 {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        format!("; it may stand in {} (line {}){others}, which exec does not read", first.what, first.line)
    }

    /// One file and what it includes; `chain` holds the files that include it.
    fn file(
        &mut self,
        path: PathBuf,
        text: &str,
        given: &Given<'_>,
        line: Line,
        chain: &mut Vec<String>,
    ) -> Result<Rc<Node>, Fault> {
        self.bytes_left = self
            .bytes_left
            .checked_sub(text.len())
            .ok_or_else(|| Fault::at(line, format!("more than {} MiB of text", BYTES_MAX >> 20)).under("include"))?;
        let index = self.files.len();
        self.files.push(path);
        let document = parse::parse(text, index)?;
        let content = inputs::apply(document, given, self.sources, &mut self.filled_left, &mut self.notes)?;
        let Value::Mapping(entries) = &content.value else { return Ok(content) };
        let Some(include) = entries.iter().find(|e| e.key == "include") else { return Ok(content) };
        let own: Vec<Entry> = entries.iter().filter(|e| e.key != "include").cloned().collect();
        let own = Rc::new(Node::new(content.line, Value::Mapping(own)));
        let included = self.include(include, chain).map_err(|f| match f.line.file == index {
            true if f.key.is_none() => f.under("include"),
            _ => f,
        })?;
        match included {
            Some(included) => self.merge(&included, &own),
            None => Ok(own),
        }
    }

    fn merge(&mut self, base: &Rc<Node>, over: &Rc<Node>) -> Result<Rc<Node>, Fault> {
        let left = &mut self.merged_left;
        deep_merge(base, over, &mut |line| {
            *left = left.checked_sub(1).ok_or_else(|| {
                Fault::at(line, format!("more than {MERGED_MAX} values in all included files together"))
            })?;
            Ok(())
        })
    }

    /// Everything that one `include` names, merged.
    fn include(&mut self, include: &Entry, chain: &mut Vec<String>) -> Result<Option<Rc<Node>>, Fault> {
        let mut items: Vec<&Rc<Node>> = Vec::new();
        match include.value.sequence() {
            // Lists in the list come from anchors.
            Ok(list) => list.iter().for_each(|item| match item.sequence() {
                Ok(inner) => items.extend(inner),
                Err(_) => items.push(item),
            }),
            Err(_) if include.value.is_null() => {}
            Err(_) => items.push(&include.value),
        }
        let mut merged: Option<Rc<Node>> = None;
        for item in items {
            for file in self.item(item, chain)? {
                merged = Some(match merged {
                    Some(merged) => self.merge(&merged, &file)?,
                    None => file,
                });
            }
        }
        Ok(merged)
    }

    /// The files of one item.
    fn item(&mut self, item: &Node, chain: &mut Vec<String>) -> Result<Vec<Rc<Node>>, Fault> {
        if let Value::Scalar { .. } = &item.value {
            let name = item.text()?;
            if name.starts_with("http://") || name.starts_with("https://") {
                self.not_read(item.line, format!("remote `{name}`"), "is not read: exec asks no server");
                return Ok(Vec::new());
            }
            return self.local(name, item.line, &Given::default(), false, chain);
        }
        let entries = item.mapping()?;
        for entry in entries {
            let known = [
                "local",
                "remote",
                "project",
                "file",
                "ref",
                "template",
                "component",
                "artifact",
                "job",
                "inputs",
                "rules",
                "cache",
                "integrity",
            ];
            if !known.contains(&entry.key.as_str()) {
                return Err(Fault::at(entry.line, "is no key of `include`; correct or remove it").under(&entry.key));
            }
        }
        let text = |key: &str| item.get(key).map(|e| e.value.text().map_err(|f| f.under(key))).transpose();
        let rules = item.get("rules");
        if let Some(rules) = rules.filter(|_| item.get("local").is_some()) {
            let what = "are not looked at: the file is read whenever it is there".to_owned();
            self.notes.push(Note { line: rules.line, job: None, key: "include:rules".into(), what });
        }
        if let Some(local) = text("local")? {
            let given = match item.get("inputs") {
                Some(inputs) => Given { entries: inputs.value.mapping().map_err(|f| f.under("inputs"))? },
                None => Given::default(),
            };
            return self.local(local, item.line, &given, rules.is_some(), chain);
        }
        let (what, why) = if let Some(remote) = text("remote")? {
            (format!("remote `{remote}`"), "is not read: exec asks no server")
        } else if let Some(project) = text("project")? {
            (format!("project `{project}`"), "is not read: only GitLab has other projects")
        } else if let Some(template) = text("template")? {
            (format!("template `{template}`"), "is not read: only GitLab has its templates")
        } else if let Some(component) = text("component")? {
            (format!("component `{component}`"), "is not read: only GitLab has components")
        } else if item.get("artifact").is_some() {
            ("an artifact".to_owned(), "is not read: it belongs to a child pipeline")
        } else {
            return Err(Fault::at(item.line, "names no file; it has local, remote, project, template or component"));
        };
        self.not_read(item.line, what, why);
        Ok(Vec::new())
    }

    fn not_read(&mut self, line: Line, what: String, why: &str) {
        let note = format!("{what} {why}; a job that needs something of it is refused");
        self.notes.push(Note { line, job: None, key: "include".into(), what: note });
        self.missing.push(Missing { line, what });
    }

    /// A local file, or all that a wildcard matches. `optional`: it has rules, so it may be missing.
    fn local(
        &mut self,
        name: &str,
        line: Line,
        given: &Given<'_>,
        optional: bool,
        chain: &mut Vec<String>,
    ) -> Result<Vec<Rc<Node>>, Fault> {
        let expanded = inputs::expand(name, self.sources);
        let fault = |what: String| Fault::at(line, format!("`{expanded}` {what}"));
        if expanded.contains('$') {
            self.not_read(line, format!("`{expanded}`"), "is not read: it names a variable that only GitLab knows");
            return Ok(Vec::new());
        }
        let is_yaml = |path: &str| path.ends_with(".yml") || path.ends_with(".yaml");
        if !is_yaml(&expanded) {
            return Err(fault("must end in .yml or .yaml".into()));
        }
        let paths = if expanded.contains('*') {
            self.sources.matching(&expanded).map_err(fault)?
        } else {
            vec![expanded.trim_start_matches('/').to_owned()]
        };
        let mut files = Vec::new();
        for path in paths {
            if chain.contains(&path) {
                return Err(fault(format!("includes itself: {} includes {path}", chain.join(" includes "))));
            }
            if chain.len() >= DEPTH_MAX {
                return Err(fault(format!("is included through more than {DEPTH_MAX} files")));
            }
            // The pipeline file is one of them.
            if self.files.len() > FILES_MAX {
                return Err(fault(format!("is one file more than the {FILES_MAX} that may be included")));
            }
            let text = match self.sources.read(&path).map_err(fault)? {
                Some(text) => text,
                None if optional => {
                    self.not_read(line, format!("`{path}`"), "is not in the repository");
                    continue;
                }
                None => return Err(fault("is not in the repository".into())),
            };
            chain.push(path.clone());
            let file = self.file(PathBuf::from(path), &text, given, line, chain)?;
            chain.pop();
            files.push(file);
        }
        Ok(files)
    }
}
