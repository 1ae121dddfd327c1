//! `docs/threats.md`: the tables of threats, faults, facts and bars, `| G1 | what | … |`, and the numbered invariants.
//!
//! A row of a threat or a fault is in `tests/ids.txt`, and so in a test's doc line, or says `***open***`, and why.

use crate::Wrongs;
use crate::claim::Id;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The page, below the root.
pub(crate) const FILE: &str = "docs/threats.md";

/// Rows that must be there, first and last of each table: taking one out of page, list and test alike must not go
/// unnoticed.
pub(crate) const TABLES: &[(char, u32, u32)] = &[
    ('A', 1, 9),
    ('B', 1, 25),
    ('E', 1, 15),
    ('F', 1, 8),
    ('G', 1, 22),
    ('H', 1, 17),
    ('K', 0, 19),
    ('P', 1, 10),
    ('R', 1, 19),
    ('T', 1, 38),
    ('V', 1, 18),
];

/// Tables of what a test must show; the others are facts, bars and what is worth protecting.
const SHOWN: &[char] = &['E', 'G', 'H', 'K', 'P', 'R', 'T', 'V'];

/// What a row says that no test names.
const OPEN: &str = "***open***";

/// What the page has.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// Its rows, and where they stand.
    pub(crate) rows: BTreeMap<Id, usize>,
    /// The numbers of its invariants.
    pub(crate) invariants: BTreeSet<u32>,
}

/// The page, held to its form and to the ids that the list has.
pub(crate) fn read(root: &Path, listed: &BTreeSet<Id>) -> (Page, Wrongs) {
    let (mut page, mut wrong) = (Page::default(), Wrongs::new());
    let mut complain = |line: usize, what: String| {
        wrong.insert((FILE.to_owned(), line, what));
    };
    let text = std::fs::read_to_string(root.join(FILE)).unwrap_or_else(|error| {
        complain(1, error.to_string());
        String::new()
    });
    let (mut last, mut in_invariants) = (None, false);
    for (line, text) in text.lines().enumerate().map(|(at, text)| (at + 1, text)) {
        if let Some(title) = text.strip_prefix("## ") {
            in_invariants = title.ends_with("Invariants");
        }
        if let Some((number, _)) = text.split_once(". ").filter(|_| in_invariants) {
            page.invariants.extend(number.parse::<u32>());
        }
        let Some(id) = text.strip_prefix("| ").and_then(|row| Id::parse(row.split(" | ").next()?)) else { continue };
        if text.split(" | ").count() < 3 || !text.ends_with(" |") || text.contains("|  |") {
            complain(
                line,
                format!("{id} has an empty cell, or is not of the form `| G1 | what | what must come of it |`"),
            );
        }
        if page.rows.insert(id, line).is_some() {
            complain(line, format!("{id} is there twice"));
        } else if last.is_some_and(|last: Id| last.0 == id.0 && last > id) {
            complain(line, format!("{id} is out of order"));
        }
        last = Some(id);
        match (listed.contains(&id), text.contains(OPEN)) {
            (true, true) => complain(line, format!("{id} says {OPEN}, and a test shows it")),
            (false, false) if SHOWN.contains(&id.0) => {
                complain(line, format!("{id} is not in tests/ids.txt, and does not say {OPEN}"));
            }
            _ => {}
        }
    }
    for id in TABLES.iter().flat_map(|(letter, first, last)| (*first..=*last).map(|number| Id(*letter, number))) {
        if !page.rows.contains_key(&id) {
            complain(1, format!("{id} is in no table"));
        }
    }
    for id in listed.iter().filter(|id| !page.rows.contains_key(id)) {
        complain(1, format!("{id} is in tests/ids.txt and in no table"));
    }
    (page, wrong)
}
