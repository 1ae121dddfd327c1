//! Searches files and folders for the runner tokens of the test rigs, in every encoding (threats.md T1).
//!
//!     canary [--secret TEXT]... [--skip NAME]... PATH...
//!
//! Without `--secret` it looks for the part that the tokens of all rigs have in common. Files named
//! `--skip` are where a token may be: its own file. Each hit is a line; the last lines are figures.
//! Exit code 1 if there is a hit, 2 if something cannot be read.
#![allow(clippy::print_stdout, reason = "a tool's output is its result")]

#[path = "../../../support/canary.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "shared with the test rigs, which use other parts")]
mod canary;

use canary::Search;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Bytes that are looked at in one go.
const PIECE_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Tally {
    files: u64,
    bytes: u64,
    hits: u64,
    unread: u64,
}

fn main() -> ExitCode {
    let (mut secrets, mut skip, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--secret" => secrets.extend(arguments.next()),
            "--skip" => skip.extend(arguments.next()),
            _ => paths.push(PathBuf::from(argument)),
        }
    }
    if secrets.is_empty() {
        secrets.push(canary::RUNNER_CANARY.to_owned());
    }
    if paths.is_empty() || secrets.iter().any(|secret| secret.len() < 4 || !secret.is_ascii()) {
        println!("usage: canary [--secret TEXT]... [--skip NAME]... PATH..., a secret of at least 4 ASCII characters");
        return ExitCode::from(2);
    }
    let searches: Vec<_> = secrets.iter().map(|secret| Search::new(secret)).collect();
    let mut tally = Tally::default();
    for path in &paths {
        walk(path, &searches, &skip, &mut tally);
    }
    println!("figure canary.files {}", tally.files);
    println!("figure canary.bytes {}", tally.bytes);
    println!("figure canary.hits {}", tally.hits);
    ExitCode::from(if tally.hits > 0 { 1 } else { u8::from(tally.unread > 0) * 2 })
}

fn walk(path: &Path, searches: &[Search], skip: &[String], tally: &mut Tally) {
    let is_skipped = path.file_name().is_some_and(|name| skip.iter().any(|skipped| name == skipped.as_str()));
    let looked = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => entries(path).map(|entries| {
            for entry in entries {
                walk(&entry, searches, skip, tally);
            }
        }),
        // A link's target is looked at where it is; sockets and pipes hold nothing.
        Ok(meta) if meta.is_file() && !is_skipped => look(path, searches, tally),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = looked {
        println!("{}: {error}", path.display());
        tally.unread += 1;
    }
}

fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries =
        std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

fn look(path: &Path, searches: &[Search], tally: &mut Tally) -> io::Result<()> {
    tally.files += 1;
    let overlap = searches.iter().map(Search::longest).max().unwrap_or(0);
    let (mut file, mut held) = (File::open(path)?, Vec::new());
    let mut found = std::collections::BTreeSet::new();
    loop {
        let read = file.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut held)?;
        if read == 0 {
            break;
        }
        tally.bytes += read as u64;
        found.extend(searches.iter().flat_map(|search| search.find(&held)));
        held.drain(..held.len().saturating_sub(overlap));
    }
    for encoding in found {
        println!("{}: holds a secret, {encoding}", path.display());
        tally.hits += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(bytes: &[u8]) -> u64 {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("below")).unwrap();
        std::fs::write(directory.path().join("below/log"), bytes).unwrap();
        std::fs::write(directory.path().join("token"), canary::runner_token(1)).unwrap();
        let mut tally = Tally::default();
        walk(directory.path(), &[Search::new(canary::RUNNER_CANARY)], &["token".to_owned()], &mut tally);
        assert_eq!((tally.files, tally.unread), (1, 0));
        tally.hits
    }

    /// T1: a secret is found wherever it lies in a file, also across two pieces of it.
    #[test]
    fn a_secret_is_found_at_any_place_of_a_large_file() {
        let token = canary::runner_token(3);
        for at in [0, 100, PIECE_BYTES - 40, PIECE_BYTES - 20, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 9] {
            let mut bytes = vec![b'.'; at];
            assert_eq!(hits(&bytes), 0);
            bytes.extend_from_slice(token.as_bytes());
            bytes.resize(at + 5000, 0xfe);
            assert_eq!(hits(&bytes), 1, "at {at}");
        }
    }
}
