//! `docs/field.md`: the table of faults that use has found, `| U1 | happened | right | owner |`.
//!
//! A row with two halves has two owners and one id. Rows of a settled owner must each be in a test's
//! doc line; those of others may be open.

use crate::Wrongs;
use crate::claim::Id;
use crate::rows::Rows;
use std::collections::BTreeMap;
use std::path::Path;

/// The page, below the root.
pub(crate) const FILE: &str = "docs/field.md";

/// Parts of the work whose rows are all shown, and stay so. An owner is added here when its last row is.
pub(crate) const SETTLED: &[&str] = &["faults", "house", "operator", "images"];

const OWNERS: &[&str] = &["faults", "house", "operator", "isolation", "images"];

/// Rows that must be there, first and last of each range: taking one out of table and test alike must not
/// go unnoticed. The number 32 was given to nothing.
const RANGES: &[(u32, u32)] = &[(1, 31), (33, 53)];

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) right: String,
    pub(crate) owners: Vec<String>,
    pub(crate) line: usize,
}

impl Row {
    /// Whether one of its owners is among these.
    pub(crate) fn is_of(&self, owners: &[&str]) -> bool {
        self.owners.iter().any(|owner| owners.contains(&owner.as_str()))
    }
}

/// Whether the page owns this id, in its table or not.
pub(crate) fn owns(id: Id) -> bool {
    id.0 == 'U'
}

/// The rows, and what is wrong with the table itself.
pub(crate) fn read(root: &Path) -> (BTreeMap<Id, Row>, Wrongs) {
    let (mut rows, text) = Rows::of(root, FILE);
    let Some(text) = text else { return rows.done() };
    for (line, text) in text.lines().enumerate().map(|(at, text)| (at + 1, text)) {
        let Some(cells) = text.strip_prefix("| U") else { continue };
        // A bar of a cell's own is written `\|`.
        let cells: Vec<&str> = cells.strip_suffix(" |").unwrap_or(cells).split(" | ").collect();
        let [number, happened, right, owners] = cells[..] else {
            rows.complain(line, "not of the form `| U1 | what happened | what is right | owner |`".to_owned());
            continue;
        };
        let Some(id) = Id::parse(&format!("U{number}")) else {
            rows.complain(line, format!("\"U{number}\" is no id"));
            continue;
        };
        if [happened, right].iter().any(|cell| cell.trim().is_empty()) {
            rows.complain(line, format!("{id} has an empty cell"));
        }
        let owners: Vec<String> = owners.split(", ").map(str::to_owned).collect();
        if let Some(owner) = owners.iter().find(|owner| !OWNERS.contains(&owner.as_str())) {
            rows.complain(line, format!("{id} is of nobody known: {owner:?}"));
        }
        rows.put(id, line, Row { right: right.trim().to_owned(), owners, line }, "is there");
    }
    for id in RANGES.iter().flat_map(|(first, last)| *first..=*last).map(|number| Id('U', number)) {
        if !rows.has(id) {
            rows.complain(1, format!("{id} is not in the table"));
        }
    }
    rows.done()
}
