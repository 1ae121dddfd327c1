//! Which processes hold a file? Found by what they have open, for a number is soon another's.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Kills the processes of this program that have this file open, as far as we may look and may do that: whoever else reads
/// it is left alone.
///
/// # Errors
/// The system's. No such file is held by nobody.
pub(super) fn kill_holders(program: &str, path: &Path) -> io::Result<()> {
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let is_its = || runs(pid, program) && holds(pid, &file);
        if !is_its() {
            continue;
        }
        // The number may have become another's meanwhile; what is held now is looked at again, and stays itself.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if is_its() {
            // It may end by itself in this very moment.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
    Ok(())
}

fn runs(pid: Pid, program: &str) -> bool {
    fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).is_ok_and(|name| name.trim_end() == program)
}

fn holds(pid: Pid, file: &fs::Metadata) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())) else { return false };
    descriptors.flatten().any(|descriptor| {
        fs::metadata(descriptor.path()).is_ok_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    })
}
