//! `tests/ids.txt`: one row a line, `ID | outcome | issue`, in order; `#` opens a comment.

use crate::Wrongs;
use crate::claim::Id;
use crate::rows::Rows;
use std::collections::BTreeMap;
use std::path::Path;

/// The list, below the root.
pub(crate) const FILE: &str = "tests/ids.txt";

/// A letter, and first and last numbers of its ranges.
type Family = (char, &'static [(u32, u32)]);

/// Whole families of rows, by the issue that owns them: taking a row out of list and test alike
/// must not go unnoticed.
const OWNED: &[(&str, &[Family])] = &[
    ("5", &[('G', &[(1, 22)]), ('P', &[(1, 10)]), ('R', &[(1, 19)]), ('T', &[(1, 13), (21, 21), (23, 31)])]),
    (
        "6",
        &[
            ('E', &[(1, 15)]),
            ('H', &[(1, 17)]),
            ('K', &[(0, 19)]),
            ('T', &[(17, 17), (19, 19), (33, 33)]),
            ('V', &[(1, 18)]),
        ],
    ),
];

/// Who may own a row; `-` is for facts and bars that no issue lists.
const OWNERS: &[&str] = &["4", "5", "6", "-"];

/// A row of the list.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) outcome: String,
    pub(crate) line: usize,
}

fn owner(id: Id) -> Option<&'static str> {
    let has = |families: &[Family]| {
        families
            .iter()
            .filter(|(letter, _)| *letter == id.0)
            .flat_map(|(_, ranges)| ranges.iter())
            .any(|(first, last)| (*first..=*last).contains(&id.1))
    };
    OWNED.iter().find(|(_, families)| has(families)).map(|(issue, _)| *issue)
}

/// The rows, and what is wrong with the list itself.
pub(crate) fn read(root: &Path) -> (BTreeMap<Id, Row>, Wrongs) {
    let (mut rows, text) = Rows::of(root, FILE);
    let Some(text) = text else { return rows.done() };
    for (line, text) in text.lines().enumerate().map(|(at, text)| (at + 1, text)) {
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let parts: Vec<&str> = text.split(" | ").collect();
        let [id, outcome, issue] = parts[..] else {
            rows.complain(line, format!("not of the form `ID | outcome | issue`: {text:?}"));
            continue;
        };
        let Some(id) = Id::parse(id) else {
            rows.complain(line, format!("{id:?} is no id"));
            continue;
        };
        if outcome.split_whitespace().count() < 2 {
            rows.complain(line, format!("{id} has no outcome"));
        }
        if !OWNERS.contains(&issue) || owner(id).is_some_and(|owner| owner != issue) {
            rows.complain(line, format!("{id} is not of issue {issue:?}"));
        }
        rows.put(id, line, Row { outcome: outcome.to_owned(), line }, "is listed");
    }
    for (issue, families) in OWNED {
        for (letter, ranges) in *families {
            for number in ranges.iter().flat_map(|(first, last)| *first..=*last) {
                let id = Id(*letter, number);
                if !rows.has(id) {
                    rows.complain(1, format!("{id} of issue {issue} is not listed"));
                }
            }
        }
    }
    rows.done()
}
