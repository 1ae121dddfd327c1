//! Section `[hypervisor]`: which back end runs machines, and how.

use super::Host;
use super::libvirt::Libvirt;
use super::paths::RealPaths;
use super::qemu::Qemu;
use super::{VmUser, VmUsers};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// In place of libvirt's address in a command's `--libvirt`.
const NO_LIBVIRT: &str = "none";

/// The host's list of users.
pub(crate) const PASSWD: &str = "/etc/passwd";

/// Bytes of it that are read.
pub(crate) const PASSWD_BYTES_MAX: u64 = 16 << 20;

/// Section `[hypervisor]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What starts QEMU.
    pub backend: Backend,
    /// libvirt's address: `qemu:///system`, `qemu:///session`, or another QEMU URI.
    pub uri: String,
    /// Which virtualisation runs guests.
    pub accel: AccelChoice,
    /// Users of the host's, one for each machine's QEMU, at `qemu:///system`; none: the package's, if they are there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_users: Option<VmUsers>,
}

/// As whom QEMUs run, as a host has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsersFound {
    /// Those for machines of jobs; empty: all run as one user.
    pub of_jobs: Vec<VmUser>,
    /// The one for machines without a job: image tests, `doctor`.
    pub of_others: Option<VmUser>,
}

/// A host has not the users that its configuration names, or fewer than there are jobs.
#[derive(Debug, thiserror::Error)]
pub enum UsersMissing {
    /// There is no such user.
    #[error("`hypervisor.vm_users` names `{0}`, a user that is not there (systemd-sysusers makes the package's)")]
    NoSuchUser(VmUser),
    /// Jobs at once would share them.
    #[error("`hypervisor.vm_users` names {have} users; {jobs} jobs at once and machines without a job need {}", jobs + 1)]
    TooFew {
        /// So many there are.
        have: usize,
        /// Jobs at once.
        jobs: u32,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self { backend: Backend::Libvirt, uri: "qemu:///session".into(), accel: AccelChoice::Auto, vm_users: None }
    }
}

/// What starts QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// libvirt, at `hypervisor.uri`.
    Libvirt,
    /// We do, without libvirt.
    Qemu,
}

/// Wish for [`Accel`](super::Accel).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where a boot proves it, else refuse (decision D16).
    Auto,
    /// KVM, unproven.
    Kvm,
    /// QEMU's translator: slow, no isolation.
    Tcg,
}

impl FromStr for AccelChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err("one of auto, kvm, tcg".to_owned()),
        }
    }
}

impl Config {
    /// Does what `--libvirt` says: libvirt at this address, or `none`: QEMU without it.
    pub fn choose(&mut self, libvirt: &str) {
        if libvirt == NO_LIBVIRT {
            self.backend = Backend::Qemu;
        } else {
            (self.backend, self.uri) = (Backend::Libvirt, libvirt.to_owned());
        }
    }

    /// Whether its machines are the system's, and not the daemon's user's own.
    #[must_use]
    pub fn is_system(&self) -> bool {
        self.backend == Backend::Libvirt && self.uri.starts_with("qemu:///system")
    }

    /// As whom QEMUs run here: by the host's list of users, for so many jobs at once. Where nobody has named them and
    /// there are too few, all run as one, as before there were any.
    ///
    /// # Errors
    /// [`UsersMissing`]: of those that are named.
    pub fn users(&self, passwd: &str, jobs: u32) -> Result<UsersFound, UsersMissing> {
        if !self.is_system() || self.vm_users == Some(VmUsers::None) {
            return Ok(UsersFound::default());
        }
        let known: BTreeSet<&str> = passwd.lines().filter_map(|line| line.split(':').next()).collect();
        let is_there = |user: &VmUser| known.contains(user.as_str());
        let users = self.vm_users.clone().unwrap_or_else(VmUsers::of_package).all();
        let mut users = match &self.vm_users {
            Some(_) => match users.iter().find(|user| !is_there(user)) {
                Some(missing) => return Err(UsersMissing::NoSuchUser(missing.clone())),
                None => users,
            },
            None => users.into_iter().take_while(is_there).collect(),
        };
        let have = users.len();
        if u32::try_from(have).unwrap_or(u32::MAX) <= jobs {
            return match self.vm_users {
                Some(_) => Err(UsersMissing::TooFew { have, jobs }),
                None => Ok(UsersFound::default()),
            };
        }
        let of_others = users.pop();
        Ok(UsersFound { of_jobs: users, of_others })
    }

    /// What tells this hypervisor from others: its VMs are there and nowhere else.
    #[must_use]
    pub fn name(&self) -> &str {
        match self.backend {
            Backend::Libvirt => &self.uri,
            Backend::Qemu => "qemu",
        }
    }

    /// The same hypervisor as `host`, for machines whose sockets are in this directory.
    #[must_use]
    pub fn host_of(&self, host: &Host, sockets: &Path) -> Host {
        match self.backend {
            Backend::Libvirt => host.clone(),
            Backend::Qemu => self.host(sockets),
        }
    }

    /// The host that this section names. `directory`: where a back end of our own keeps its machines' files, best
    /// where their sockets are. Nothing is connected to yet.
    #[must_use]
    pub fn host(&self, directory: &Path) -> Host {
        match self.backend {
            Backend::Libvirt => Libvirt::new(self).host(),
            Backend::Qemu => Host::new(Arc::new(Qemu::new(directory)), Arc::new(RealPaths::default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passwd(last: u32) -> String {
        (0..=last).map(|number| format!("dayfly-vm-{number}:x:{}:{0}::/:/x\n", 900 + number)).collect()
    }

    /// U40: the package's users are used where they are and suffice; those that are named must.
    #[test]
    fn users_are_used_where_there_are_enough() {
        let of = |uri: &str, named: Option<&str>| Config {
            uri: uri.into(),
            vm_users: named.map(|users| users.parse().unwrap()),
            ..Config::default()
        };
        let system = of("qemu:///system", None);
        let found = system.users(&passwd(64), 64).unwrap();
        assert_eq!((found.of_jobs.len(), found.of_others.unwrap().as_str()), (64, "dayfly-vm-64"));
        assert_eq!(system.users(&passwd(64), 65).unwrap(), UsersFound::default(), "too few, and nobody's wish");
        assert_eq!(system.users("root:x:0:0::/:/x\n", 1).unwrap(), UsersFound::default());
        assert_eq!(of("qemu:///session", None).users(&passwd(64), 1).unwrap(), UsersFound::default());
        let named = of("qemu:///system", Some("dayfly-vm-2..4"));
        let found = named.users(&passwd(64), 2).unwrap();
        let names: Vec<&str> = found.of_jobs.iter().map(VmUser::as_str).collect();
        assert_eq!((names, found.of_others.unwrap().as_str()), (vec!["dayfly-vm-2", "dayfly-vm-3"], "dayfly-vm-4"));
        assert_eq!(of("qemu:///system", Some("none")).users(&passwd(64), 1).unwrap(), UsersFound::default());
        let missing = named.users(&passwd(3), 2).unwrap_err();
        assert!(missing.to_string().contains("`dayfly-vm-4`, a user that is not there"), "{missing}");
        let few = named.users(&passwd(64), 3).unwrap_err();
        assert!(few.to_string().ends_with("names 3 users; 3 jobs at once and machines without a job need 4"), "{few}");
    }
}
