//! What comments and pages name: rows of the tables, decisions, invariants, pages and their sections. Does the
//! repository have it?

use crate::Wrongs;
use crate::claim::Id;
use crate::comments::{self, Comment};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One page for each decision, `D09-….md`.
pub(crate) const DECISIONS: &str = "docs/decisions";

/// Letters of ids. Others are other things: sleep states (S3), caches (L2).
const LETTERS: &[char] = &['A', 'B', 'D', 'E', 'F', 'G', 'H', 'K', 'P', 'R', 'T', 'U', 'V'];

/// Folders without anything that people wrote: builds, and what programs read in tests.
const NOT_OURS: &[&str] = &["target", "corpus", "golden", "data", "snapshots"];

/// What the repository has.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) ids: BTreeSet<Id>,
    pub(crate) invariants: BTreeSet<u32>,
}

/// The decisions that have a page.
pub(crate) fn decisions(root: &Path) -> BTreeSet<Id> {
    let names = std::fs::read_dir(root.join(DECISIONS)).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let number = |name: String| name.strip_prefix('D')?.split_once('-')?.0.parse().ok();
    names.filter_map(number).map(|number| Id('D', number)).collect()
}

/// How many citations there are, and how many of them are of what is not there; those go to `wrong`.
pub(crate) fn check(root: &Path, known: &Known, wrong: &mut Wrongs) -> (usize, usize) {
    let (mut seen, mut dead) = (0, 0);
    let mut files = Vec::new();
    collect(root, Path::new(""), &mut files);
    for file in files {
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
        for (line, text) in written(&file, &text) {
            let found = citations(&text);
            seen += found.len();
            for what in found.iter().filter_map(|citation| missing(root, &file, known, citation)) {
                dead += 1;
                wrong.insert((file.display().to_string(), line, what));
            }
        }
    }
    (seen, dead)
}

/// Files below `folder`, in order.
fn collect(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
    let mut entries: Vec<_> = entries.map(|entry| (entry.file_name(), entry.file_type())).collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, kind) in entries {
        let Some(text) = name.to_str() else { continue };
        let hidden = text.starts_with('.') && !matches!(text, ".ci" | ".cargo");
        match kind {
            Ok(kind) if kind.is_dir() && !hidden && !NOT_OURS.contains(&text) => {
                collect(root, &folder.join(&name), files);
            }
            Ok(kind) if kind.is_file() => files.push(folder.join(&name)),
            _ => {}
        }
    }
}

/// What people wrote into a file for people, line by line.
fn written(file: &Path, text: &str) -> Vec<Comment> {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => comments::of_rust(text),
        Some("md") => text.lines().enumerate().map(|(at, line)| (at + 1, line.to_owned())).collect(),
        Some("sh" | "toml" | "service" | "target" | "conf" | "sysusers" | "tmpfiles" | "yml") => {
            comments::of_hash(text)
        }
        None if text.starts_with("#!") => comments::of_hash(text),
        _ => Vec::new(),
    }
}

/// One citation.
#[derive(Debug, PartialEq, Eq)]
enum Citation<'a> {
    Id(Id),
    Invariant(u32),
    Page(&'a str),
    /// A section of a page; of the page that says it, if it names none.
    Section(Option<&'a str>, &'a str),
}

/// All of a line's.
fn citations(text: &str) -> Vec<Citation<'_>> {
    let mut found = Vec::new();
    let in_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut before = "";
    for word in text.split(|c: char| !in_word(c)) {
        // Not the end of something longer: `x.E5`, `U+E000`.
        let at = word.as_ptr() as usize - text.as_ptr() as usize;
        let opens = !text[..at].ends_with(['.', '+', '/', '\\']);
        if let Some(id) = Id::parse(word).filter(|id| opens && LETTERS.contains(&id.0)) {
            found.push(Citation::Id(id));
        }
        // "invariants 2, 3 and 5" goes on while numbers do.
        if matches!(before, "invariant" | "invariants" | "Invariant" | "Invariants") {
            match word.parse() {
                Ok(number) => found.push(Citation::Invariant(number)),
                Err(_) if word.is_empty() || word == "and" => {}
                Err(_) => before = word,
            }
        } else {
            before = word;
        }
    }
    let mut page = None;
    let mut last = "";
    for word in text.split(|c: char| c.is_whitespace() || "`()[]<>\"',;|".contains(c)).filter(|word| !word.is_empty()) {
        let name = word.split('#').next().unwrap_or_default().trim_end_matches(['.', ':']);
        if let Some(section) = word.strip_prefix('§') {
            let section = section.trim_end_matches(|c: char| !c.is_ascii_digit());
            // A number before it is an RFC's.
            if !last.bytes().all(|b| b.is_ascii_digit()) || last.is_empty() {
                found.push(Citation::Section(page, section));
            }
        } else if name.len() > 3 && name.ends_with(".md") && !name.contains("://") && !name.contains(['*', '…']) {
            found.push(Citation::Page(name));
            page = Some(name);
        } else if !matches!(word, "and" | "to") {
            page = None;
        }
        last = word;
    }
    found
}

/// Where a page is, as `file` names it: from the root, from the file's own folder, or among the pages.
fn page(root: &Path, file: &Path, name: &str) -> Option<PathBuf> {
    let beside = file.parent().unwrap_or(Path::new(""));
    let places = [root.join(name), root.join(beside).join(name), root.join("docs").join(name)];
    places.into_iter().find(|place| place.is_file())
}

/// What is wrong with a citation, if the repository does not have what it names.
fn missing(root: &Path, file: &Path, known: &Known, citation: &Citation<'_>) -> Option<String> {
    match citation {
        Citation::Id(id) => (!known.ids.contains(id)).then(|| format!("{id} is in no table, and no decision")),
        Citation::Invariant(number) => {
            (!known.invariants.contains(number)).then(|| format!("there is no invariant {number}"))
        }
        Citation::Page(name) => page(root, file, name).is_none().then(|| format!("there is no page {name}")),
        Citation::Section(name, section) => {
            let place = name.map_or_else(|| Some(root.join(file)), |name| page(root, file, name))?;
            let text = std::fs::read_to_string(place).unwrap_or_default();
            let is_it = |line: &str| {
                let title = line.strip_prefix('#').map(|line| line.trim_start_matches('#').trim_start());
                title
                    .and_then(|title| title.split(' ').next())
                    .is_some_and(|number| number.trim_end_matches('.') == *section)
            };
            (!text.lines().any(is_it)).then(|| format!("there is no §{section} in {}", name.unwrap_or("this file")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_pages_and_sections_are_found_as_they_are_used() {
        use Citation::{Id as Row, Invariant, Page, Section};
        for (text, expected) in [
            (
                " G12: ten minutes; K0…K18, and (R2)",
                vec![Row(Id('G', 12)), Row(Id('K', 0)), Row(Id('K', 18)), Row(Id('R', 2))],
            ),
            (" decision D9 (`K8:3`)", vec![Row(Id('D', 9)), Row(Id('K', 8))]),
            (
                " threats.md T5, invariants 2, 3 and 5.",
                vec![Row(Id('T', 5)), Invariant(2), Invariant(3), Invariant(5), Page("threats.md")],
            ),
            (
                " (docs/threats.md §6.1, §6.2; [a](b.md#c).",
                vec![
                    Page("docs/threats.md"),
                    Section(Some("docs/threats.md"), "6.1"),
                    Section(Some("docs/threats.md"), "6.2"),
                    Page("b.md"),
                ],
            ),
            (" as §3 says", vec![Section(None, "3")]),
        ] {
            assert_eq!(citations(text), expected, "{text}");
        }
        for text in [
            " U+FEFF and U+E5, E0283, f32, F32x, 0xE5, T, S3, L2, G012, x.E5, glrt-t1_",
            " RFC 9112 §7.1 and https://example.org/page.md, *.md, .md",
            " an invariant of 3 parts",
        ] {
            assert_eq!(citations(text), [], "{text}");
        }
    }
}
