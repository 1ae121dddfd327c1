//! What jobs leave behind in one state directory: files, sockets, doors, machines. A clean host has none of them.

use serde_json::Value;
use sha2::{Digest as _, Sha256};
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
const STATE: [&str; 9] =
    ["installation.json", "jobs", "overlays", "lock", "ended", "consoles", "shells", "cache", "clones"];
const RUNTIME: [&str; 4] = ["control.sock", "jobs", "status.sock", "vm"];
const MACHINES: [&str; 2] = ["guest", "guest.log"];

/// All that is there and should not be.
pub(crate) fn left(places: &Places) -> Vec<String> {
    let Places { state, runtime, machines, ports } = places;
    let mut left = Vec::new();
    for (directory, known) in [(state, &STATE[..]), (runtime, &RUNTIME), (machines, &MACHINES)] {
        others(directory, known, &mut left);
    }
    let of_jobs = ["jobs", "overlays", "cache/pins", "clones/slots"].map(|name| state.join(name));
    for directory in of_jobs.into_iter().chain([runtime.join("jobs"), runtime.join("vm")]) {
        others(&directory, &[], &mut left);
    }
    left.extend(listeners(ports).into_iter().map(|port| format!("a listener at port {port}")));
    // The dearest look comes last, once all else is gone.
    if left.is_empty() {
        for entry in fs::read_dir(state.join("clones")).into_iter().flatten().flatten() {
            if entry.file_name() != "slots" {
                mirror(&entry.path(), &mut left);
            }
        }
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

/// What a mirror's directory has besides that which its `mirror.json` names, and what of that is not whole. A mirror may
/// be changed meanwhile: then it is looked at again.
fn mirror(directory: &Path, left: &mut Vec<String>) {
    const JSON: &str = "mirror.json";
    let text = fs::read(directory.join(JSON)).unwrap_or_default();
    let meta: Value = serde_json::from_slice(&text).unwrap_or_default();
    let mut named = vec![JSON];
    named.extend(meta["mirror"].as_str());
    for disk in meta["disks"].as_array().into_iter().flatten() {
        let Some(file) = disk["file"].as_str() else { continue };
        named.push(file);
        let digest = fs::read(directory.join(file))
            .map(|bytes| Sha256::digest(bytes).iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}")));
        if digest.ok().as_deref() != disk["sha256"].as_str() {
            left.push(format!("{} is not whole", directory.join(file).display()));
        }
    }
    others(directory, &named, left);
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
        // A mirror, a disk of it, and what it does not name.
        let project = places.state.join("clones/0-1");
        fs::create_dir_all(project.join("aa.git")).unwrap();
        fs::write(project.join("bb.img"), "disk").unwrap();
        let sha256 = "00";
        let json = |sha256: &str| format!(r#"{{"mirror":"aa.git","disks":[{{"file":"bb.img","sha256":"{sha256}"}}]}}"#);
        fs::write(project.join("mirror.json"), json(sha256)).unwrap();
        assert_eq!(left(&places), [format!("{} is not whole", project.join("bb.img").display())]);
        let digest = Sha256::digest("disk").iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        fs::write(project.join("mirror.json"), json(&digest)).unwrap();
        assert_eq!(left(&places), [""; 0]);
        fs::write(project.join("cc.img"), "").unwrap();
        assert_eq!(left(&places), [project.join("cc.img").display().to_string()]);
        fs::remove_dir_all(project).unwrap();
        places.ports = port..=port;
        assert_eq!(left(&places), [format!("a listener at port {port}")]);
    }
}
