//! The runner tokens of all runs, and the files that they are read from: made once in a process.

use crate::check::RUNNER_CANARY;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Runners of one run at most.
pub(crate) const RUNNERS_MAX: usize = 4;

static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();

/// The token of a run's n-th runner, and its file.
pub(crate) fn of_runner(number: usize) -> (String, PathBuf) {
    let directory = DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        for number in 0..RUNNERS_MAX {
            let path = directory.path().join(number.to_string());
            std::fs::write(&path, token(number)).expect("a file can be written there");
            let mode = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&path, mode).expect("its mode can be set");
        }
        directory
    });
    (token(number), directory.path().join(number.to_string()))
}

/// Prefix and nine public characters, then the canary: of that part nothing may reach a VM.
fn token(number: usize) -> String {
    format!("glrt-public{number:03}{RUNNER_CANARY}{number}")
}

/// Removes the files.
pub(crate) fn clear() {
    if let Some(directory) = DIRECTORY.get() {
        // The system cleans up what is left.
        let _ = std::fs::remove_dir_all(directory.path());
    }
}
