//! `check-ids [DIRECTORY]`: holds `tests/ids.txt` and the doc lines of the tests to each other.
//!
//! A test names the rows of the threat and fault tables that it shows in its doc line, `/// G12: …`
//! or `/// R2, R3: …`. Every id of the list must be in the doc line of a test that a ring of
//! `scripts/test` runs, and every id in a doc line must be in the list. What is wrong is printed with
//! file and line; the last lines are the figures. Exit code 1 if anything is wrong.
//!
//! [`list`] reads the list, [`rings`] says which crates the rings run, [`walk`] walks their modules
//! as the compiler does and finds the tests, [`claim`] reads a doc line.
#![expect(clippy::print_stdout, reason = "it is what this program is for")]

mod cfg;
mod claim;
mod list;
mod rings;
#[cfg(test)]
mod trees;
mod walk;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What is wrong, by file and line.
type Wrongs = BTreeSet<(String, usize, String)>;

/// What was found.
#[derive(Debug, Default)]
struct Found {
    wrong: Wrongs,
    listed: usize,
    shown: usize,
}

/// Compares the list and the tests of the tree at `root`.
fn check(root: &Path) -> Found {
    let (list, mut wrong) = list::read(root);
    let tests = walk::of_rings(root, &mut wrong);
    let mut shown = BTreeSet::new();
    for claim in &tests {
        if list.contains_key(&claim.id) {
            shown.insert(claim.id);
        } else {
            wrong.insert((claim.file.clone(), claim.line, format!("{} is not in tests/ids.txt", claim.id)));
        }
    }
    for (id, row) in list.iter().filter(|(id, _)| !shown.contains(id)) {
        wrong.insert((list::FILE.into(), row.line, format!("{id} is in no test's doc line: {}", row.outcome)));
    }
    Found { wrong, listed: list.len(), shown: shown.len() }
}

fn main() -> ExitCode {
    let root = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    let found = check(&root);
    for (file, line, what) in &found.wrong {
        println!("{file}:{line}: {what}");
    }
    println!("figure ids.listed {}", found.listed);
    println!("figure ids.shown {}", found.shown);
    if found.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
