//! Section `[hypervisor]`: which back end runs machines, and how.

use super::Host;
use super::libvirt::Libvirt;
use super::paths::RealPaths;
use super::qemu::Qemu;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// In place of libvirt's address in a command's `--libvirt`.
const NO_LIBVIRT: &str = "none";

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
}

impl Default for Config {
    fn default() -> Self {
        Self { backend: Backend::Libvirt, uri: "qemu:///session".into(), accel: AccelChoice::Auto }
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
