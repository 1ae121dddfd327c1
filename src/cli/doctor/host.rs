//! What the host's own files say, read below a root directory, so that tests can bring a host of
//! their own. Nothing here changes anything or starts a program.

use super::Finding;
use crate::vm::AccelChoice;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Where programs are, as `process` looks for them.
const BIN_DIRECTORIES: [&str; 6] = ["usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin"];

/// Programs, what for, and their Debian packages.
const NEEDED: [(&str, &str); 2] = [("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")];
const NEEDED_TO_BUILD: [(&str, &str); 3] =
    [("mmdebstrap", "mmdebstrap"), ("newuidmap", "uidmap"), ("mke2fs", "e2fsprogs")];

/// A host, as its files show it.
pub(super) struct Host {
    root: PathBuf,
    uid: u32,
}

impl Host {
    /// The one below `root`, as seen by user `uid`.
    pub(super) fn new(root: &Path, uid: u32) -> Self {
        Self { root: root.to_owned(), uid }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A small file, trimmed; `None` if it is not there or not for us.
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    /// Its list of users.
    pub(super) fn users(&self) -> String {
        self.read("etc/passwd").unwrap_or_default()
    }

    /// Programs that VMs, and the building of images, need.
    pub(super) fn programs(&self) -> Vec<Finding> {
        let missing =
            |(program, _): &&(&str, &str)| !BIN_DIRECTORIES.iter().any(|dir| self.path(dir).join(program).exists());
        let mut findings: Vec<Finding> = NEEDED
            .iter()
            .filter(missing)
            .map(|(program, package)| {
                Finding::bad(format!("{program} is missing: no VM can be made"), format!("apt install {package}"))
            })
            .collect();
        findings.extend(NEEDED_TO_BUILD.iter().filter(missing).map(|(program, package)| {
            Finding::warn(
                format!("{program} is missing: `dayfly image build` needs it"),
                format!("apt install {package}"),
            )
        }));
        if findings.is_empty() {
            findings.push(Finding::ok("all programs that are needed are here"));
        }
        findings
    }

    /// Sub-ids, by which an image is built without root.
    pub(super) fn sub_ids(&self) -> Finding {
        if self.uid == 0 {
            return Finding::ok("root needs no sub-ids to build images");
        }
        let uid = self.uid.to_string();
        let name = self.read("etc/passwd").and_then(|users| {
            let mut fields = users.lines().map(|line| line.split(':'));
            fields.find_map(|mut fields| {
                Some((fields.next()?.to_owned(), fields.nth(1)?.to_owned())).filter(|(_, id)| *id == uid)
            })
        });
        let name = name.map_or_else(|| uid.clone(), |(name, _)| name);
        let has = |file: &str| {
            let text = self.read(file).unwrap_or_default();
            text.lines().filter_map(|line| line.split(':').next()).any(|owner| owner == name || owner == uid)
        };
        if has("etc/subuid") && has("etc/subgid") {
            return Finding::ok(format!("user {name} has sub-ids to build images with"));
        }
        let remedy = format!("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}");
        Finding::warn(format!("user {name} has no sub-ids: it cannot build images"), remedy)
    }

    /// The device itself; only a boot proves that it works.
    pub(super) fn kvm_device(&self, accel: AccelChoice) -> Vec<Finding> {
        if accel == AccelChoice::Tcg {
            return Vec::new();
        }
        match fs::metadata(self.path("dev/kvm")) {
            Err(_) => vec![Finding::bad(
                "there is no /dev/kvm: this host offers no hardware virtualisation",
                "switch it on in the firmware, load kvm_intel or kvm_amd; a cloud host must offer nested virtualisation",
            )],
            Ok(metadata) if metadata.permissions().mode() & 0o060 != 0o060 => vec![Finding::warn(
                "/dev/kvm is for root only: libvirt then looks QEMU over at every start, which takes 20 s instead of half a second",
                "chgrp kvm /dev/kvm; chmod 0660 /dev/kvm; systemctl restart libvirtd",
            )],
            Ok(_) => Vec::new(),
        }
    }

    /// libvirt gives the VMs' output to virtlogd, and starts none where that is away.
    pub(super) fn log_daemon(&self, uri: &str) -> Finding {
        // Root's session is the system's libvirt.
        let system = uri.starts_with("qemu:///system") || self.uid == 0;
        let to_file = |text: String| {
            let mut lines = text.lines().map(|line| line.split_whitespace().collect::<String>());
            lines.any(|line| line.starts_with("stdio_handler=\"file\""))
        };
        if system && self.read("etc/libvirt/qemu.conf").is_some_and(to_file) {
            return Finding::ok("libvirt writes the VMs' output to files itself");
        }
        let there = if system {
            self.path("run/libvirt/virtlogd-sock").exists()
        } else {
            self.path("usr/sbin/virtlogd").exists()
        };
        if there {
            return Finding::ok("virtlogd takes the VMs' output");
        }
        Finding::warn(
            "virtlogd does not run: libvirt may refuse to start VMs",
            "systemctl enable --now virtlogd.socket, or set stdio_handler = \"file\" in libvirt's qemu.conf",
        )
    }

    /// What keeps a QEMU that was taken over away from the rest of the host.
    pub(super) fn confinement(&self, uri: &str) -> Option<Finding> {
        if !uri.starts_with("qemu:///system") {
            return None;
        }
        let apparmor = self.read("sys/module/apparmor/parameters/enabled").is_some_and(|text| text == "Y");
        let selinux = self.read("sys/fs/selinux/enforce").is_some_and(|text| text == "1");
        Some(if apparmor || selinux {
            Finding::ok("libvirt can confine each VM (AppArmor or SELinux)")
        } else {
            Finding::warn(
                "neither AppArmor nor SELinux is on: a QEMU that a job took over meets no second wall",
                "switch AppArmor on (apt install apparmor)",
            )
        })
    }

    /// Settings by which VMs may learn from each other, or memory gets to disk (threats.md T20).
    pub(super) fn shared_hardware(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let only_own_jobs = "leave it if all jobs are of people who trust each other";
        if self.read("sys/devices/system/cpu/smt/active").is_some_and(|text| text == "1") {
            let remedy =
                format!("boot with `nosmt`, or: echo off > /sys/devices/system/cpu/smt/control; {only_own_jobs}");
            findings.push(Finding::warn("SMT is on: two VMs may share one core's caches", remedy));
        }
        if self.read("sys/kernel/mm/ksm/run").is_some_and(|text| text != "0") {
            findings.push(Finding::warn(
                "KSM merges equal memory of VMs: one can learn what another holds",
                "echo 2 > /sys/kernel/mm/ksm/run",
            ));
        }
        if self.read("proc/swaps").is_some_and(|text| text.lines().count() > 1) {
            findings.push(Finding::warn(
                "swap is on: guests' memory, secrets too, may get to disk",
                "swapoff -a, or encrypt the swap",
            ));
        }
        let mut open: Vec<String> = fs::read_dir(self.path("sys/devices/system/cpu/vulnerabilities"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                let state = self.read(&format!("sys/devices/system/cpu/vulnerabilities/{name}"));
                state.is_some_and(|state| state.starts_with("Vulnerable"))
            })
            .collect();
        open.sort();
        if !open.is_empty() {
            let what = format!("the CPU is open to {}", open.join(", "));
            findings.push(Finding::warn(
                what,
                format!("update microcode and kernel, and leave its mitigations on; {only_own_jobs}"),
            ));
        }
        if findings.is_empty() {
            findings.push(Finding::ok("no setting of CPU or memory helps VMs to learn from each other"));
        }
        findings
    }

    /// Payloads and passes are kept there: it must not be a disk.
    pub(super) fn runtime_directory(&self, directory: &Path) -> Finding {
        let mounts = self.read("proc/mounts").unwrap_or_default();
        let kind = mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                Some((fields.nth(1)?, fields.next()?))
            })
            .filter(|(mount, _)| directory.starts_with(mount))
            // The last mount of equal depth covers those before.
            .max_by_key(|(mount, _)| Path::new(mount).components().count())
            .map(|(_, kind)| kind);
        match kind {
            Some("tmpfs" | "ramfs") | None => {
                Finding::ok(format!("runtime directory {} is in memory", directory.display()))
            }
            Some(kind) => Finding::warn(
                format!(
                    "runtime directory {} is on a disk ({kind}): jobs' secrets are written to it",
                    directory.display()
                ),
                "set `runtime_directory` to a place below /run",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    /// A host of these files, seen by user 1000.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::new(dir.path(), 1000);
        (dir, host)
    }

    fn texts(findings: &[Finding]) -> Vec<(Level, &str)> {
        findings.iter().map(|finding| (finding.level, finding.what.as_str())).collect()
    }

    /// T20: each bad setting is named, and the good ones are not.
    #[test]
    fn each_bad_setting_of_cpu_and_memory_is_named() {
        let cpu = "sys/devices/system/cpu";
        for (file, text, part) in [
            (format!("{cpu}/smt/active"), "1\n", "SMT"),
            ("sys/kernel/mm/ksm/run".into(), "1\n", "KSM"),
            ("proc/swaps".into(), "Filename Type\n/dev/sda2 partition\n", "swap"),
            (format!("{cpu}/vulnerabilities/l1tf"), "Vulnerable; SMT vulnerable\n", "open to l1tf"),
        ] {
            let (_dir, host) = host(&[(&file, text)]);
            let findings = host.shared_hardware();
            assert_eq!(findings.len(), 1, "{file}");
            assert_eq!(findings[0].level, Level::Warn);
            assert!(findings[0].what.contains(part), "{}", findings[0].what);
        }
        let good = [
            (&*format!("{cpu}/smt/active"), "0"),
            ("sys/kernel/mm/ksm/run", "0"),
            ("proc/swaps", "Filename Type\n"),
            (&*format!("{cpu}/vulnerabilities/l1tf"), "Mitigation: PTE Inversion"),
            (&*format!("{cpu}/vulnerabilities/mds"), "Not affected"),
        ];
        let (_dir, good) = host(&good);
        assert!(matches!(texts(&good.shared_hardware())[..], [(Level::Ok, _)]));
    }

    #[test]
    fn the_kvm_device_is_missing_root_only_or_fine() {
        let (_dir, none) = host(&[]);
        assert_eq!(none.kvm_device(AccelChoice::Auto)[0].level, Level::Bad);
        assert!(none.kvm_device(AccelChoice::Tcg).is_empty());
        let (dir, device) = host(&[("dev/kvm", "")]);
        fs::set_permissions(dir.path().join("dev/kvm"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(device.kvm_device(AccelChoice::Kvm)[0].what.contains("20 s"));
        fs::set_permissions(dir.path().join("dev/kvm"), fs::Permissions::from_mode(0o660)).unwrap();
        assert!(device.kvm_device(AccelChoice::Auto).is_empty());
    }

    #[test]
    fn the_vms_output_needs_a_taker() {
        let system = "qemu:///system";
        assert_eq!(host(&[]).1.log_daemon(system).level, Level::Warn);
        let (_dir, with) = host(&[("run/libvirt/virtlogd-sock", "")]);
        assert_eq!(with.log_daemon(system).level, Level::Ok);
        let (_dir, file) = host(&[("etc/libvirt/qemu.conf", "# stdio_handler = \"logd\"\nstdio_handler = \"file\"\n")]);
        assert_eq!(file.log_daemon(system).level, Level::Ok);
        let (_dir, comment) = host(&[("etc/libvirt/qemu.conf", "#stdio_handler = \"file\"\n")]);
        assert_eq!(comment.log_daemon(system).level, Level::Warn);
        // A user's libvirt starts virtlogd itself, if it is installed.
        let (_dir, installed) = host(&[("usr/sbin/virtlogd", "")]);
        assert_eq!(
            (installed.log_daemon("qemu:///session").level, installed.log_daemon(system).level),
            (Level::Ok, Level::Warn)
        );
    }

    #[test]
    fn missing_programs_come_with_their_package() {
        let (_dir, host) = host(&[("usr/bin/qemu-img", ""), ("usr/sbin/mke2fs", ""), ("usr/bin/newuidmap", "")]);
        let findings = host.programs();
        let lines: Vec<_> = findings.iter().map(|f| (f.level, f.remedy.as_str())).collect();
        assert_eq!(lines, [(Level::Bad, "apt install qemu-system-x86"), (Level::Warn, "apt install mmdebstrap")]);
    }

    #[test]
    fn sub_ids_are_looked_up_by_name_and_number() {
        let passwd = ("etc/passwd", "root:x:0:0::/:\nci:x:1000:1000::/home/ci:/bin/sh\n");
        let (_dir, without) = host(&[passwd, ("etc/subuid", "other:1:2\n")]);
        assert!(without.sub_ids().remedy.ends_with(" ci"));
        let (_dir, by_name) = host(&[passwd, ("etc/subuid", "ci:1:2\n"), ("etc/subgid", "1000:1:2\n")]);
        assert_eq!(by_name.sub_ids().level, Level::Ok);
    }

    #[test]
    fn a_runtime_directory_on_disk_is_warned_about() {
        let mounts =
            ("proc/mounts", "/dev/sda1 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/sdb1 /run/disk xfs rw 0 0\n");
        let (_dir, host) = host(&[mounts]);
        let level = |path: &str| host.runtime_directory(Path::new(path)).level;
        assert_eq!(
            (level("/run/dayfly"), level("/runs/dayfly"), level("/run/disk/dayfly")),
            (Level::Ok, Level::Warn, Level::Warn)
        );
    }

    #[test]
    fn a_system_libvirt_wants_confinement() {
        let (_dir, bare) = host(&[]);
        assert_eq!(bare.confinement("qemu:///system").unwrap().level, Level::Warn);
        assert!(bare.confinement("qemu:///session").is_none());
        let (_dir, with) = host(&[("sys/module/apparmor/parameters/enabled", "Y\n")]);
        assert_eq!(with.confinement("qemu:///system").unwrap().level, Level::Ok);
    }
}
