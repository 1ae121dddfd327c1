//! What a machine's QEMU is held to, as the kernel says of the one that `doctor` has just booted.

use super::Finding;
use crate::config::Config;
use crate::process::Program;
use crate::vm::confine::measure::Measured;
use crate::vm::{Backend, VmUser};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a look at the host's rules may take.
const LOOK: Duration = Duration::from_secs(10);

/// Whether all users of VMs are inside the fence of the network `user`. Only root sees the rules themselves; others take
/// the unit's word.
pub(super) async fn is_fenced(config: &Config, passwd: &str) -> bool {
    let Ok(found) = config.hypervisor.users(passwd, config.concurrent) else { return false };
    if found.of_jobs.is_empty() {
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        let active = Program::new("systemctl", LOOK).args(["is-active", "--quiet", "dayfly-fence.service"]);
        return active.run().await.is_ok();
    }
    let rules = Program::new("nft", LOOK).args(["list", "set", "inet", "dayfly", "users"]).run().await;
    rules.is_ok_and(|rules| has_all(&rules.text(), &found.of_jobs, passwd))
}

/// Whether a set's listing has each of these users, by number.
fn has_all(listing: &str, users: &[VmUser], passwd: &str) -> bool {
    let elements = listing.split_once("elements = {").and_then(|(_, rest)| Some(rest.split_once('}')?.0));
    let inside: BTreeSet<&str> = elements.unwrap_or_default().split(',').map(str::trim).collect();
    let uids: BTreeMap<&str, &str> = passwd
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            Some((fields.next()?, fields.nth(1)?))
        })
        .collect();
    users.iter().all(|user| uids.get(user.as_str()).is_some_and(|uid| inside.contains(uid)))
}

/// What QEMU has open besides the machine's own: devices, and what tells it of the host's CPUs.
const USUAL: [&str; 3] = ["/dev", "/sys/devices/system", "/proc"];

/// The findings of one machine. `own_uid`: that of the daemon; `own`: where all of the machine's files are.
pub(super) fn judge(measured: &Measured, config: &Config, own_uid: u32, passwd: &str, own: &Path) -> Vec<Finding> {
    let mut findings = vec![user(measured, config, own_uid, passwd)];
    findings.push(if measured.seccomp && measured.capabilities == 0 && measured.no_new_privileges {
        Finding::ok("its QEMU has a filter of system calls (seccomp), no capability, and can gain no rights")
    } else {
        let mut weak = Vec::new();
        if !measured.seccomp {
            weak.push("no filter of system calls (seccomp)".to_owned());
        }
        if measured.capabilities != 0 {
            weak.push(format!("{} capabilities", measured.capabilities.count_ones()));
        }
        if !measured.no_new_privileges {
            weak.push("a way to gain rights by starting a program".to_owned());
        }
        let remedy = match config.hypervisor.backend {
            Backend::Libvirt => {
                "set `seccomp_sandbox = 1` in libvirt's qemu.conf, and run machines as no user of rights"
            }
            Backend::Qemu => "run dayfly as a user without rights",
        };
        Finding::warn(format!("its QEMU has {}", weak.join(", ")), remedy)
    });
    findings.push(limits(measured));
    if let Some(profile) = &measured.profile {
        findings.push(Finding::ok(format!("its QEMU is confined by the profile {profile}")));
    }
    findings.extend(files(measured, own));
    findings
}

/// As whom it runs.
fn user(measured: &Measured, config: &Config, own_uid: u32, passwd: &str) -> Finding {
    let uid = measured.uid.to_string();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    let name = name.unwrap_or(uid);
    let is_own = config
        .hypervisor
        .users(passwd, config.concurrent)
        .is_ok_and(|found| found.of_others.is_some_and(|user| user.as_str() == name));
    if is_own {
        return Finding::ok(format!("a machine's QEMU runs as a user of its own (this one as {name})"));
    }
    if measured.uid == 0 {
        let remedy = "run dayfly as a user of its own; the package does";
        return Finding::warn("a machine's QEMU runs as root: one that was taken over is the host", remedy);
    }
    if config.hypervisor.is_system() {
        return Finding::warn(
            format!("all machines' QEMUs run as one user, {name}: one that was taken over is all of them"),
            "systemd-sysusers dayfly.conf makes users for them; then restart dayfly",
        );
    }
    let whose = if measured.uid == own_uid { "this one, and the daemon's" } else { "one user" };
    Finding::warn(
        format!("a machine's QEMU runs as {name} ({whose}): one that was taken over reads what that user reads"),
        "for jobs of strangers: `uri = \"qemu:///system\"`, and the package's users",
    )
}

/// What it may use.
fn limits(measured: &Measured) -> Finding {
    let mib = measured.memory_max.map(|bytes| format!("{} MiB of memory", bytes >> 20));
    let cpu = measured.cpu_percent_max.map(|percent| format!("{percent} % of a CPU"));
    let processes = measured.processes_max.map(|processes| format!("{processes} threads"));
    let is_bound = mib.is_some() && cpu.is_some();
    let has: Vec<String> = [mib, cpu, processes].into_iter().flatten().collect();
    let place = &measured.cgroup;
    if is_bound {
        return Finding::ok(format!("its QEMU may have {} (cgroup {place})", has.join(", ")));
    }
    Finding::warn(
        format!("its QEMU has no bound of memory or CPU (cgroup {place})"),
        "libvirt's system mode bounds both where the host has cgroups, and so does a systemd that gives it a scope",
    )
}

/// Files that a machine has no business with.
fn files(measured: &Measured, own: &Path) -> Option<Finding> {
    let Some(files) = &measured.files else {
        return Some(Finding::warn("what its QEMU has open cannot be seen by this user", "run doctor as root"));
    };
    let of_machine = |path: &&PathBuf| path.starts_with(own);
    let count = files.iter().filter(of_machine).count();
    let strange: Vec<String> = files
        .iter()
        .filter(|path| !path.starts_with(own) && !USUAL.iter().any(|usual| path.starts_with(usual)))
        .map(|path| path.display().to_string())
        .collect();
    Some(if strange.is_empty() {
        Finding::ok(format!("its QEMU has {count} files of its machine open, and none of anybody else's"))
    } else {
        Finding::warn(
            format!("its QEMU has open, besides {count} files of its machine: {}", strange.join(", ")),
            "look who opens them: a QEMU that was taken over could read, and perhaps write, them",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::config::EXAMPLE;

    fn config(uri: &str) -> Config {
        let mut config = Config::assemble(Some(("/etc/dayfly/config.toml".into(), EXAMPLE.into())), []).unwrap().config;
        config.hypervisor.uri = uri.into();
        config
    }

    fn measured() -> Measured {
        Measured {
            uid: 964,
            gids: vec![964],
            capabilities: 0,
            seccomp: true,
            no_new_privileges: true,
            profile: None,
            cgroup: "/machine.slice/a".into(),
            memory_max: Some(3 << 30),
            processes_max: None,
            cpu_percent_max: Some(300),
            files: Some(vec!["/d/df-a.qcow2".into(), "/d/proof-a.qcow2".into(), "/dev/kvm".into()]),
        }
    }

    /// The users of the package, from 900 on, and libvirt's own.
    fn passwd() -> String {
        let ours: String = (0..=64).map(|n| format!("dayfly-vm-{n}:x:{}:1::/:/x\n", 900 + n)).collect();
        format!("root:x:0:0::/:/x\nlibvirt-qemu:x:64055:107::/:/x\n{ours}")
    }

    fn of(measured: &Measured, uri: &str, passwd: &str) -> Vec<Finding> {
        judge(measured, &config(uri), 990, passwd, Path::new("/d"))
    }

    #[test]
    fn a_machine_that_is_confined_is_green_and_says_how() {
        let findings = of(&measured(), "qemu:///system", &passwd());
        let texts: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{texts:?}");
        for part in
            ["as dayfly-vm-64", "seccomp", "3072 MiB of memory, 300 % of a CPU (cgroup /machine.slice/a)", "2 files"]
        {
            assert!(texts.iter().any(|text| text.contains(part)), "{part}: {texts:?}");
        }
        let profiled = Measured { profile: Some("libvirt-1 (enforce)".into()), ..measured() };
        assert!(of(&profiled, "qemu:///system", &passwd()).iter().any(|f| f.what.ends_with("libvirt-1 (enforce)")));
    }

    #[test]
    fn a_fence_is_one_only_around_every_user() {
        let passwd = "dayfly-vm-0:x:971:1::/:/x\ndayfly-vm-1:x:970:1::/:/x\n";
        let users: Vec<VmUser> = "dayfly-vm-0..1".parse::<crate::vm::VmUsers>().unwrap().all();
        let listing = |elements: &str| {
            format!(
                "table inet dayfly {{\n\tset users {{\n\t\ttypeof meta skuid\n\t\telements = {{ {elements} }}\n\t}}\n}}\n"
            )
        };
        assert!(has_all(&listing("970,\n\t\t\t     971"), &users, passwd));
        for few in ["970", "9710, 970", ""] {
            assert!(!has_all(&listing(few), &users, passwd), "{few}");
        }
        assert!(!has_all("", &users, passwd));
    }

    /// U40: whoever shares a user is told so, and each other weakness has its line.
    #[test]
    fn each_weakness_has_a_line_of_its_own() {
        let warned = |measured: &Measured, uri: &str, part: &str| {
            let findings = of(measured, uri, &passwd());
            let found: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Warn).collect();
            assert_eq!(found.len(), 1, "{part}: {findings:?}");
            assert!(found[0].what.contains(part) && !found[0].remedy.is_empty(), "{}", found[0]);
        };
        let system = "qemu:///system";
        warned(&Measured { uid: 64055, ..measured() }, system, "as one user, libvirt-qemu");
        warned(&Measured { uid: 900, ..measured() }, system, "as one user, dayfly-vm-0");
        warned(&Measured { uid: 0, ..measured() }, system, "as root");
        warned(&Measured { uid: 990, ..measured() }, "qemu:///session", "as 990 (this one, and the daemon's)");
        warned(&Measured { seccomp: false, ..measured() }, system, "no filter of system calls");
        warned(&Measured { capabilities: 0x20, ..measured() }, system, "has 1 capabilities");
        warned(&Measured { memory_max: None, ..measured() }, system, "no bound of memory or CPU");
        warned(&Measured { files: None, ..measured() }, system, "cannot be seen");
        let strange = vec!["/d/df-a.qcow2".into(), "/etc/shadow".into()];
        warned(&Measured { files: Some(strange), ..measured() }, system, "/etc/shadow");
    }
}
