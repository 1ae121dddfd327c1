//! `check-ids [--open] [DIRECTORY]`: holds `tests/ids.txt`, the tables of `docs/threats.md` and `docs/field.md`, and
//! the doc lines of the tests to each other; and what comments and pages name, and the map of
//! `docs/architecture.md`, to what there is.
//!
//! A test names the rows of the threat and fault tables that it shows in its doc line, `/// G12: …`
//! or `/// R2, R3: …`. Every id of the list must be in the doc line of a test that a ring of
//! `scripts/test` runs, and every id in a doc line must be in the list. Every row of the tables must be in the
//! list or say that it is open. Ids `U1` are those of `docs/field.md`; there, rows of a settled owner must be
//! shown, and `--open` lists those that are not. What is wrong is printed with file and line; the last lines are
//! the figures. Exit code 1 if anything is wrong.
//!
//! [`list`] reads the list, [`threats`] and [`field`] the tables, [`rings`] says which crates the rings run,
//! [`walk`] walks their modules as the compiler does and finds the tests, [`claim`] reads a doc line;
//! [`comments`] finds comments, [`citations`] what they name;
//! [`map`] compares the pages on the source with it.
#![expect(clippy::print_stdout, reason = "it is what this program is for")]

mod cfg;
mod citations;
mod claim;
mod comments;
mod field;
mod list;
mod map;
mod rings;
mod rows;
mod threats;
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
    /// Rows of the list, and how many of them a test names.
    ids: (usize, usize),
    /// The same of `docs/field.md`.
    field: (usize, usize),
    /// Its rows that no test names, with their owners and what is right.
    open: Vec<String>,
    /// What comments and pages name, and how much of it the repository does not have.
    citations: (usize, usize),
}

/// Compares list, table and tests of the tree at `root`; rows of `settled` owners may not be open.
fn check(root: &Path, settled: &[&str]) -> Found {
    let (list, mut wrong) = list::read(root);
    let (field, mut more) = field::read(root);
    wrong.append(&mut more);
    let (threats, mut more) = threats::read(root, &list.keys().copied().collect());
    wrong.append(&mut more);
    let ids = threats.rows.keys().chain(field.keys()).copied().chain(citations::decisions(root)).collect();
    let known = citations::Known { ids, invariants: threats.invariants };
    wrong.append(&mut map::check(root));
    let citations = citations::check(root, &known, &mut wrong);
    let tests = walk::of_rings(root, &mut wrong);
    let (mut shown, mut met) = (BTreeSet::new(), BTreeSet::new());
    for claim in &tests {
        let (is_there, set, place) = if field::owns(claim.id) {
            (field.contains_key(&claim.id), &mut met, field::FILE)
        } else {
            (list.contains_key(&claim.id), &mut shown, list::FILE)
        };
        if is_there {
            set.insert(claim.id);
        } else {
            wrong.insert((claim.file.clone(), claim.line, format!("{} is not in {place}", claim.id)));
        }
    }
    for (id, row) in list.iter().filter(|(id, _)| !shown.contains(id)) {
        wrong.insert((list::FILE.into(), row.line, format!("{id} is in no test's doc line: {}", row.outcome)));
    }
    let mut open = Vec::new();
    for (id, row) in field.iter().filter(|(id, _)| !met.contains(id)) {
        open.push(format!("{id} ({}): {}", row.owners.join(", "), row.right));
        if row.is_of(settled) {
            wrong.insert((field::FILE.into(), row.line, format!("{id} is in no test's doc line: {}", row.right)));
        }
    }
    Found { wrong, ids: (list.len(), shown.len()), field: (field.len(), met.len()), open, citations }
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    let lists_open = args.next_if(|arg| arg == "--open").is_some();
    let root = args.next().map_or_else(|| PathBuf::from("."), PathBuf::from);
    let found = check(&root, field::SETTLED);
    for (file, line, what) in &found.wrong {
        println!("{file}:{line}: {what}");
    }
    for row in found.open.iter().filter(|_| lists_open) {
        println!("open {row}");
    }
    println!("figure ids.listed {}", found.ids.0);
    println!("figure ids.shown {}", found.ids.1);
    println!("figure field.rows {}", found.field.0);
    println!("figure field.shown {}", found.field.1);
    println!("figure citations.seen {}", found.citations.0);
    println!("figure citations.dead {}", found.citations.1);
    if found.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
