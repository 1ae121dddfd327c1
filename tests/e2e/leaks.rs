//! Where a daemon as a process could leave a secret: its files, and arguments and environments of processes.

use crate::canary::Spy;
use std::fs;
use std::path::Path;

/// Larger files are disks; what a guest writes there it was given by the daemon's other ways.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Looks at some bytes.
pub fn in_bytes(place: &str, bytes: &[u8]) -> Vec<String> {
    let spy = Spy::default();
    spy.look(place, bytes);
    spy.found()
}

/// Looks at all files below `dir` but those of these names.
pub fn in_files(dir: &Path, but: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        // What is removed meanwhile needs no look any more.
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            found.extend(in_files(&path, but));
        } else if meta.is_file() && meta.len() <= FILE_BYTES_MAX && !but.iter().any(|name| entry.file_name() == *name) {
            found.extend(in_bytes(&path.display().to_string(), &fs::read(&path).unwrap_or_default()));
        }
    }
    found
}

/// Looks at arguments and environment of the daemon, of its children, and of all whose arguments name `dir`: its VMs.
pub fn in_processes(daemon: Option<u32>, dir: &Path) -> Vec<String> {
    let (mut found, dir) = (Vec::new(), dir.display().to_string());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let (arguments, status) = (read("cmdline"), read("status"));
        let status = String::from_utf8_lossy(&status);
        let number = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u32>().ok());
        let is_daemons = daemon.is_some() && [number("Pid:"), number("PPid:")].contains(&daemon);
        if !is_daemons && !String::from_utf8_lossy(&arguments).contains(&dir) {
            continue;
        }
        let name = status.lines().next().unwrap_or_default().to_owned();
        found.extend(in_bytes(&format!("arguments of {name}"), &arguments));
        found.extend(in_bytes(&format!("environment of {name}"), &read("environ")));
    }
    found
}
