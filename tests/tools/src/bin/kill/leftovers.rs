//! What jobs leave behind in one state directory: files, sockets, doors, machines. A clean host has none of them.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Where one daemon and its machines have their things.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) state: PathBuf,
    pub(crate) runtime: PathBuf,
    /// Descriptions of machines.
    pub(crate) machines: PathBuf,
    pub(crate) ports: RangeInclusive<u16>,
}

/// What may always be there, below each of the directories.
const STATE: [&str; 8] = ["installation.json", "jobs", "overlays", "lock", "ended", "consoles", "shells", "cache"];
const RUNTIME: [&str; 4] = ["control.sock", "jobs", "status.sock", "vm"];
const MACHINES: [&str; 2] = ["guest", "guest.log"];

/// All that is there and should not be.
pub(crate) fn left(places: &Places) -> Vec<String> {
    let Places { state, runtime, machines, ports } = places;
    let mut left = Vec::new();
    for (directory, known) in [(state, &STATE[..]), (runtime, &RUNTIME), (machines, &MACHINES)] {
        others(directory, known, &mut left);
    }
    for directory in
        [state.join("jobs"), state.join("overlays"), state.join("cache/pins"), runtime.join("jobs"), runtime.join("vm")]
    {
        others(&directory, &[], &mut left);
    }
    left.extend(listeners(ports).into_iter().map(|port| format!("a listener at port {port}")));
    // The dearest look comes last, once all else is gone.
    if left.is_empty() {
        left.extend(processes(&runtime.join("vm")));
    }
    left
}

fn others(directory: &Path, known: &[&str], left: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(|name| known.contains(&name)) {
            left.push(entry.path().display().to_string());
        }
    }
}

/// Ports of this range at which somebody listens, by the kernel's own table.
fn listeners(ports: &RangeInclusive<u16>) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let port = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        let port = u16::from_str_radix(local.split_once(':')?.1, 16).ok()?;
        (state == LISTEN && ports.contains(&port)).then_some(port)
    };
    table.lines().filter_map(port).collect()
}

/// Processes that were started with a socket in this directory: machines, whatever their descriptions say.
fn processes(sockets: &Path) -> Vec<String> {
    let marker = format!("{}/", sockets.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).split('\0').skip(1).any(|word| word.starts_with(&marker)) {
            found.push(format!("process {pid}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_clean_until_something_of_a_job_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut places = Places {
            state: dir.path().join("state"),
            runtime: dir.path().join("run"),
            machines: dir.path().join("vms"),
            ports: 1..=1,
        };
        for below in ["state/jobs", "state/overlays", "run/jobs", "run/vm", "vms"] {
            fs::create_dir_all(dir.path().join(below)).unwrap();
        }
        fs::write(places.state.join("installation.json"), "").unwrap();
        fs::write(places.machines.join("guest.log"), "").unwrap();
        assert_eq!(left(&places), [""; 0]);
        for file in ["state/jobs/x", "state/overlays/x", "run/jobs/x", "run/vm/x", "vms/df-x.vm", "state/set-aside"] {
            let path = dir.path().join(file);
            fs::write(&path, "").unwrap();
            assert_eq!(left(&places), [path.display().to_string()]);
            fs::remove_file(path).unwrap();
        }
        places.ports = port..=port;
        assert_eq!(left(&places), [format!("a listener at port {port}")]);
    }
}
