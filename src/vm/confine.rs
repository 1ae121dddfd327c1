//! What one VM's QEMU may be and use of the host: a user of its own, and limits.
//!
//! Whom it runs as is chosen with the VM's lease, and stands in its owner's record; how much it may use is its class's.
//! A back end does what it can of both: libvirt's system mode all, plain QEMU the limits that a scope of systemd's and
//! QEMU itself have. What it did can be [measured](measure) on the process.

pub mod measure;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Users at most: each is a line of the host's list of users.
const USERS_MAX: u32 = 4096;

/// Characters of a user's name, as `useradd` has it.
const NAME_BYTES_MAX: usize = 32;

/// Beside the guest's memory, MiB: QEMU's own, TCG's translation cache, page tables. What a hypervisor takes at rest is a
/// third of it (decision D3); a limit that a healthy QEMU meets would end jobs.
const MEMORY_BESIDE_MIB: u64 = 1024;

/// A user of the host's, with a group of the same name, as whom one VM's QEMU runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmUser(String);

impl VmUser {
    /// Its name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text names no user.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no name of a user like dayfly-vm-0")]
pub struct BadVmUser(String);

impl TryFrom<String> for VmUser {
    type Error = BadVmUser;
    fn try_from(name: String) -> Result<Self, BadVmUser> {
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
        let rest = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'));
        if first && rest && name.len() <= NAME_BYTES_MAX { Ok(Self(name)) } else { Err(BadVmUser(name)) }
    }
}

impl From<VmUser> for String {
    fn from(user: VmUser) -> Self {
        user.0
    }
}

impl fmt::Display for VmUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Users of consecutive numbers, written `dayfly-vm-0..64`: both ends are of it. Or `none`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VmUsers {
    /// All VMs run as one user, that of the hypervisor.
    None,
    /// One for each VM.
    Range {
        /// What all their names begin with.
        prefix: String,
        /// The first number.
        first: u32,
        /// The last.
        last: u32,
    },
}

/// In place of a range.
const NONE: &str = "none";

/// The text is no range of users.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither a range of at most {USERS_MAX} users like dayfly-vm-0..64, nor `none`")]
pub struct BadVmUsers(String);

impl VmUsers {
    /// Those that the package makes (packaging/dayfly.sysusers): 64 for jobs, and one for VMs without a job.
    #[must_use]
    pub fn of_package() -> Self {
        Self::Range { prefix: "dayfly-vm-".into(), first: 0, last: 64 }
    }

    /// All of them, in order.
    #[must_use]
    pub fn all(&self) -> Vec<VmUser> {
        match self {
            Self::None => Vec::new(),
            Self::Range { prefix, first, last } => {
                (*first..=*last).map(|number| VmUser(format!("{prefix}{number}"))).collect()
            }
        }
    }
}

impl FromStr for VmUsers {
    type Err = BadVmUsers;
    fn from_str(text: &str) -> Result<Self, BadVmUsers> {
        if text == NONE {
            return Ok(Self::None);
        }
        let bad = || BadVmUsers(text.to_owned());
        let (name, last) = text.split_once("..").ok_or_else(bad)?;
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = |digits: &str| {
            let plain = !digits.is_empty() && (digits == "0" || !digits.starts_with('0'));
            digits.parse().ok().filter(|_| plain && digits.bytes().all(|b| b.is_ascii_digit())).ok_or_else(bad)
        };
        let (first, last): (u32, u32) = (number(&name[prefix.len()..])?, number(last)?);
        if last < first || last - first >= USERS_MAX {
            return Err(bad());
        }
        VmUser::try_from(format!("{prefix}{last}")).map_err(|_| bad())?;
        Ok(Self::Range { prefix: prefix.to_owned(), first, last })
    }
}

impl TryFrom<String> for VmUsers {
    type Error = BadVmUsers;
    fn try_from(text: String) -> Result<Self, BadVmUsers> {
        text.parse()
    }
}

impl From<VmUsers> for String {
    fn from(users: VmUsers) -> Self {
        users.to_string()
    }
}

impl fmt::Display for VmUsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str(NONE),
            Self::Range { prefix, first, last } => write!(f, "{prefix}{first}..{last}"),
        }
    }
}

/// How much one VM may use of the host at most. Plain data: it stands in records. What is not set has no bound, but for
/// memory and CPUs, whose bounds follow from the machine's size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Its share of the CPUs where they are scarce, 1 to 10,000; 100 is the kernel's own for everybody.
    pub cpu_weight: u32,
    /// Threads and processes of its QEMU.
    pub processes: u32,
    /// Bytes of its disk a second, both ways.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes_a_second: Option<u64>,
    /// Operations on its disk a second, both ways.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_operations_a_second: Option<u64>,
    /// Bytes of its network card a second, each way, in the network `bridge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_bytes_a_second: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_weight: 100,
            processes: 1024,
            disk_bytes_a_second: Some(500_000_000),
            disk_operations_a_second: Some(20_000),
            network_bytes_a_second: None,
        }
    }
}

impl Limits {
    /// What the QEMU of a guest with so much memory may have at most, MiB: then the kernel ends it.
    #[must_use]
    pub fn memory_mib(guest_mib: u64) -> u64 {
        guest_mib.saturating_add(MEMORY_BESIDE_MIB)
    }

    /// What it may use of CPUs, in hundredths of one: its guest's, and one for what QEMU does itself.
    #[must_use]
    pub fn cpu_percent(cpus: u32) -> u64 {
        (u64::from(cpus) + 1) * 100
    }

    /// What of it makes no sense: key, words, remedy.
    #[must_use]
    pub fn flaws(&self) -> Vec<(&'static str, String, &'static str)> {
        let mut flaws = Vec::new();
        if !(1..=10_000).contains(&self.cpu_weight) {
            flaws.push(("cpu_weight", format!("is {}", self.cpu_weight), "choose 1 to 10000; 100 is everybody's"));
        }
        if self.processes < PROCESSES_MIN {
            let what = format!("is {}, too few for a QEMU's own threads", self.processes);
            flaws.push(("processes", what, "choose 64 or more; 1024 is the default"));
        }
        for (key, value, least, remedy) in [
            ("disk_bytes_a_second", self.disk_bytes_a_second, 1_000_000, "choose 1000000 or more"),
            ("disk_operations_a_second", self.disk_operations_a_second, 100, "choose 100 or more"),
            ("network_bytes_a_second", self.network_bytes_a_second, 10_000, "choose 10000 or more"),
        ] {
            if let Some(value) = value.filter(|value| !(least..=RATE_MAX).contains(value)) {
                flaws.push((key, format!("is {value}: no machine boots with that"), remedy));
            }
        }
        flaws
    }
}

/// A thread for each virtual CPU, those of disk I/O (64 at most), and QEMU's own.
const PROCESSES_MIN: u32 = 64;

/// QEMU's own bound on throttles.
const RATE_MAX: u64 = 1_000_000_000_000_000;

/// What one VM is held to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// As whom its QEMU runs; `None`: as all others do there.
    pub user: Option<VmUser>,
    /// How much it may use; `None`: whatever there is.
    pub limits: Option<Limits>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_users_is_read_as_it_is_written() {
        let users: VmUsers = "dayfly-vm-8..11".parse().unwrap();
        let names: Vec<String> = users.all().into_iter().map(String::from).collect();
        assert_eq!(names, ["dayfly-vm-8", "dayfly-vm-9", "dayfly-vm-10", "dayfly-vm-11"]);
        assert_eq!(users.to_string(), "dayfly-vm-8..11");
        assert_eq!(VmUsers::of_package().to_string().parse::<VmUsers>().unwrap(), VmUsers::of_package());
        assert_eq!(("none".parse::<VmUsers>().unwrap().all(), VmUsers::None.to_string()), (Vec::new(), "none".into()));
        for bad in [
            "",
            "dayfly-vm-",
            "dayfly-vm-1",
            "dayfly-vm-2..1",
            "dayfly-vm-0..4096",
            "vm-00..3",
            "vm-0..03",
            "vm-0..+3",
            "0..3",
            "Root-0..3",
            "a b-0..3",
            "../x-0..3",
            "vm-0..99999999999",
            &format!("{}0..1", "v".repeat(32)),
        ] {
            assert!(bad.parse::<VmUsers>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_limit_with_which_no_machine_boots_is_named() {
        assert_eq!(Limits::default().flaws(), []);
        let none = Limits { disk_bytes_a_second: None, disk_operations_a_second: None, ..Limits::default() };
        assert_eq!(none.flaws(), []);
        let bad = Limits {
            cpu_weight: 0,
            processes: 8,
            disk_bytes_a_second: Some(0),
            disk_operations_a_second: Some(u64::MAX),
            network_bytes_a_second: Some(1),
        };
        let keys: Vec<_> = bad.flaws().into_iter().map(|(key, ..)| key).collect();
        assert_eq!(
            keys,
            ["cpu_weight", "processes", "disk_bytes_a_second", "disk_operations_a_second", "network_bytes_a_second"]
        );
    }
}
