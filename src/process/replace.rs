//! A program in our place: what a command is that has a program of its own.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

/// Replaces this process by `program`, with our environment and terminal; returns only why that could not be.
///
/// For a process that has one thread and nothing to clean up: no destructor runs.
pub(crate) fn replace_by(program: &Path, arguments: Vec<OsString>) -> io::Error {
    #[expect(clippy::disallowed_methods, reason = "no helper with a deadline: the caller becomes it")]
    std::process::Command::new(program).args(arguments).exec()
}
