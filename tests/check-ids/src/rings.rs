//! Which crates the rings run: a test elsewhere shows nothing to anybody.

use crate::Wrongs;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A crate root (`*` is any one name), and the words by which a ring runs it.
const ROOTS: &[(&str, &str)] = &[
    ("src/lib.rs", "tests --lib --bins"),
    ("src/main.rs", "tests --lib --bins"),
    ("tests/check/main.rs", "--test check"),
    ("tests/lifecycle/main.rs", "--test lifecycle"),
    ("tests/wire/main.rs", "--test wire"),
    ("tests/backend/main.rs", "test_binary backend"),
    ("tests/e2e/main.rs", "test_binary e2e"),
    ("tests/isolation/main.rs", "test_binary isolation"),
    ("exec/src/lib.rs", "tests --lib --bins"),
    ("exec/src/main.rs", "tests --lib --bins"),
    ("tests/doubles/src/lib.rs", "tests --lib --bins"),
    ("tests/doubles/tests/doctor.rs", "--test doctor"),
    ("tests/doubles/tests/journal/main.rs", "--test journal"),
    ("tests/doubles/tests/keeper.rs", "--test keeper"),
    ("tests/doubles/tests/proof.rs", "--test proof"),
    ("vm-images/guest-config/src/lib.rs", "tests --lib --bins"),
    ("vm-images/guest/src/lib.rs", "tests --lib --bins"),
    ("vm-images/wire/src/lib.rs", "tests --lib --bins"),
    ("vm-images/guest/src/main.rs", "tests --lib --bins"),
    ("vm-images/wire/src/lib.rs", "tests --lib --bins"),
    ("egress/src/lib.rs", "tests --lib --bins"),
    ("egress/src/main.rs", "tests --lib --bins"),
    ("egress/tests/egress/main.rs", "--test egress"),
    ("tests/runner/src/main.rs", "tests --lib --bins"),
    ("tests/runner/tests/protocol/main.rs", "--test protocol"),
    ("tests/tools/src/lib.rs", "tests --lib --bins"),
    ("tests/tools/src/bin/*.rs", "tests --lib --bins"),
    ("tests/tools/src/bin/*/main.rs", "tests --lib --bins"),
    ("tests/check-ids/src/main.rs", "tests --lib --bins"),
    ("tests/guest/src/lib.rs", "tests --lib --bins"),
];

/// Scripts that run rings.
const SCRIPTS: &[&str] = &["scripts/test", "scripts/check"];

/// The crate roots of the tree at `root`, below it; and which of them no ring runs.
pub(crate) fn roots(root: &Path, wrong: &mut Wrongs) -> BTreeSet<PathBuf> {
    let scripts: String =
        SCRIPTS.iter().map(|script| std::fs::read_to_string(root.join(script)).unwrap_or_default()).collect();
    // What is commented out is not run.
    let scripts: Vec<&str> = scripts.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let mut found = BTreeSet::new();
    for (pattern, words) in ROOTS {
        let files = matching(root, pattern);
        if scripts.iter().any(|line| mentions(line, words)) {
            found.extend(files);
        } else if !files.is_empty() {
            wrong.insert(("scripts/test".into(), 1, format!("`{words}` is in no ring, so nothing runs {pattern}")));
        }
    }
    found
}

/// Whether `words` stand in the line, and not as the beginning of longer ones.
fn mentions(line: &str, words: &str) -> bool {
    line.match_indices(words)
        .any(|(at, _)| !line[at + words.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '-' || c == '_'))
}

fn matching(root: &Path, pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return Some(PathBuf::from(pattern)).filter(|file| root.join(file).is_file()).into_iter().collect();
    };
    let names = std::fs::read_dir(root.join(before)).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let files = names.filter_map(|name| {
        // `*.rs` meets whole names, `*/main.rs` folders.
        let file = if after.starts_with('/') { format!("{before}{name}{after}") } else { format!("{before}{name}") };
        file.ends_with(after).then(|| PathBuf::from(file))
    });
    let mut files: Vec<PathBuf> = files.filter(|file| root.join(file).is_file()).collect();
    files.sort();
    files
}
