//! What one VM's QEMU really is to this host, by what the kernel says of its process. Read only; whoever asks may see
//! less of a process of another user's, and that is told apart from nothing being there.

use crate::vm::VmName;
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of a file of the kernel's that are looked at.
const BYTES_MAX: usize = 64 * 1024;

/// The process of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Its user.
    pub uid: u32,
    /// Its groups, the one that it runs as first.
    pub gids: Vec<u32>,
    /// Capabilities in force, as bits.
    pub capabilities: u64,
    /// Whether a filter of system calls is in force (mode 2).
    pub seccomp: bool,
    /// Whether a program that it started could not gain rights.
    pub no_new_privileges: bool,
    /// Profile of AppArmor or context of SELinux; `None`: unconfined, or there is neither.
    pub profile: Option<String>,
    /// Its place among the cgroups.
    pub cgroup: String,
    /// Bytes of memory that it may have.
    pub memory_max: Option<u64>,
    /// Threads and processes that it may have.
    pub processes_max: Option<u64>,
    /// Hundredths of a CPU that it may use.
    pub cpu_percent_max: Option<u64>,
    /// Files that it has open, by path; `None`: not for us to see.
    pub files: Option<Vec<PathBuf>>,
}

/// A host's `/proc` and cgroups, below a root, so that tests can bring their own.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Default for Place {
    fn default() -> Self {
        Self("/".into())
    }
}

impl Place {
    /// The one below this directory.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self(root.to_owned())
    }

    fn read(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.0.join(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes[..bytes.len().min(BYTES_MAX)]).into_owned())
    }

    /// The process of a VM, by the name that it was started with; blocking.
    #[must_use]
    pub fn measure(&self, name: &VmName) -> Option<Measured> {
        let pid = self.find(name)?;
        let status = self.read(&format!("proc/{pid}/status"))?;
        let field = |key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
        };
        // Real, effective, saved, of the file system.
        let effective = |key: &str| field(key).split_whitespace().nth(1)?.parse().ok();
        let gid: u32 = effective("Gid")?;
        let others =
            field("Groups").split_whitespace().filter_map(|gid| gid.parse().ok()).filter(|other| *other != gid);
        let cgroup = self.read(&format!("proc/{pid}/cgroup")).unwrap_or_default();
        let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned();
        let profile = self.read(&format!("proc/{pid}/attr/current")).unwrap_or_default();
        let profile = profile.trim_matches(['\0', '\n', ' ']).to_owned();
        Some(Measured {
            uid: effective("Uid")?,
            gids: std::iter::once(gid).chain(others).collect(),
            capabilities: u64::from_str_radix(field("CapEff"), 16).ok()?,
            seccomp: field("Seccomp") == "2",
            no_new_privileges: field("NoNewPrivs") == "1",
            profile: Some(profile).filter(|profile| !profile.is_empty() && !profile.starts_with("unconfined")),
            memory_max: self.least(&cgroup, "memory.max", |text| text.parse().ok()),
            processes_max: self.least(&cgroup, "pids.max", |text| text.parse().ok()),
            cpu_percent_max: self.least(&cgroup, "cpu.max", |text| {
                let (quota, period) = text.split_once(' ')?;
                let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
                quota.saturating_mul(100).checked_div(period)
            }),
            cgroup,
            files: self.files(&pid),
        })
    }

    /// The least bound of a cgroup and those above it.
    fn least(&self, cgroup: &str, file: &str, read: impl Fn(&str) -> Option<u64>) -> Option<u64> {
        let cgroup = Path::new(cgroup.trim_start_matches('/'));
        let bounds = cgroup.ancestors().filter_map(|place| {
            let text = self.read(&format!("sys/fs/cgroup/{}/{file}", place.display()))?;
            read(text.trim())
        });
        bounds.min()
    }

    fn find(&self, name: &VmName) -> Option<String> {
        let wanted = format!("guest={name}");
        let is_its = |pid: &String| {
            let arguments = self.read(&format!("proc/{pid}/cmdline")).unwrap_or_default();
            let arguments: Vec<&str> = arguments.split('\0').collect();
            arguments
                .windows(2)
                .any(|two| two[0] == "-name" && two[1].split(',').next().is_some_and(|first| first == wanted))
        };
        let processes = fs::read_dir(self.0.join("proc")).ok()?;
        let mut pids = processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        pids.find(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && is_its(pid))
    }

    fn files(&self, pid: &str) -> Option<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = fs::read_dir(self.0.join(format!("proc/{pid}/fd")))
            .ok()?
            // What has gone meanwhile is not open.
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| path.is_absolute() && !path.to_string_lossy().starts_with("/memfd:"))
            .collect();
        files.sort();
        files.dedup();
        Some(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const NAME: &str = "df-abcdefghijklmnop";

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A host with two machines and a process that only speaks of one.
    fn host() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "proc/7/cmdline", &format!("grep\0-e\0guest={NAME},debug-threads=on\0"));
        write(root, "proc/8/cmdline", "qemu\0-name\0guest=df-ponmlkjihgfedcba,debug-threads=on\0");
        write(root, "proc/9/cmdline", &format!("qemu\0-name\0guest={NAME},debug-threads=on\0-S\0"));
        write(
            root,
            "proc/9/status",
            "Name:\tqemu\nUid:\t990\t991\t990\t990\nGid:\t992\t992\t992\t992\nGroups:\t107 992 64055 \n\
             CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n",
        );
        write(root, "proc/9/cgroup", "0::/machine.slice/a.scope/libvirt/emulator\n");
        let cgroup = "sys/fs/cgroup/machine.slice/a.scope";
        write(root, &format!("{cgroup}/libvirt/memory.max"), "max\n");
        write(root, &format!("{cgroup}/memory.max"), "1048576\n");
        write(root, "sys/fs/cgroup/machine.slice/memory.max", "2097152\n");
        write(root, &format!("{cgroup}/libvirt/cpu.max"), "300000 100000\n");
        write(root, &format!("{cgroup}/pids.max"), "16384\n");
        fs::create_dir_all(root.join("proc/9/fd")).unwrap();
        for (number, target) in ["/dev/kvm", "socket:[1]", "/memfd:x (deleted)", "/disk", "/disk"].iter().enumerate() {
            symlink(target, root.join(format!("proc/9/fd/{number}"))).unwrap();
        }
        dir
    }

    #[test]
    fn a_machines_process_is_found_and_all_of_it_is_read() {
        let dir = host();
        let place = Place::below(dir.path());
        let measured = place.measure(&VmName::parse(NAME).unwrap()).unwrap();
        assert_eq!(
            measured,
            Measured {
                uid: 991,
                gids: vec![992, 107, 64055],
                capabilities: 0,
                seccomp: true,
                no_new_privileges: true,
                profile: None,
                cgroup: "/machine.slice/a.scope/libvirt/emulator".into(),
                memory_max: Some(1_048_576),
                processes_max: Some(16384),
                cpu_percent_max: Some(300),
                files: Some(vec!["/dev/kvm".into(), "/disk".into()]),
            }
        );
        assert_eq!(place.measure(&VmName::parse("df-aaaaaaaaaaaaaaaa").unwrap()), None);
    }

    #[test]
    fn what_is_weaker_is_read_as_such() {
        let dir = host();
        let root = dir.path();
        write(
            root,
            "proc/9/status",
            "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n",
        );
        write(root, "proc/9/attr/current", "libvirt-1234 (enforce)\n");
        write(root, "proc/9/cgroup", "0::/\n");
        fs::remove_dir_all(root.join("proc/9/fd")).unwrap();
        let measured = Place::below(root).measure(&VmName::parse(NAME).unwrap()).unwrap();
        assert_eq!((measured.uid, measured.seccomp, measured.no_new_privileges), (0, false, false));
        assert_eq!((measured.capabilities, measured.memory_max), (0x1ff_ffff_ffff, None));
        assert_eq!((measured.profile.as_deref(), measured.files), (Some("libvirt-1234 (enforce)"), None));
        write(root, "proc/9/attr/current", "unconfined\n");
        let measured = Place::below(root).measure(&VmName::parse(NAME).unwrap()).unwrap();
        assert_eq!(measured.profile, None);
    }
}
