//! Where is a program of ours? Beside the one that runs, or where programs are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The program of this name in `beside`, else the first in `path`. A relative entry of that would mean whatever directory
/// somebody happens to be in.
pub(crate) fn find(program: &str, beside: &Path, path: Option<&OsStr>) -> Option<PathBuf> {
    let directories = path.map(|path| std::env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
    let mut places = std::iter::once(beside.to_owned()).chain(directories).filter(|directory| directory.is_absolute());
    places.find_map(|directory| Some(directory.join(program)).filter(|program| program.is_file()))
}

/// The program of this name beside ours, else in the directories where the daemon looks for programs.
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    // Without a path of our own (no /proc) there are those.
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_owned)).unwrap_or_default();
    find(program, &beside, Some(OsStr::new(super::PATH)))
}
