//! The real hypervisor: libvirt. The only file that says `virt::`.

use super::Accel;
use serde::{Deserialize, Serialize};

/// Section `[hypervisor]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `qemu:///system`, `qemu:///session`, or another QEMU URI.
    pub uri: String,
    /// Which virtualisation runs guests.
    pub accel: AccelChoice,
}

impl Default for Config {
    fn default() -> Self {
        Self { uri: "qemu:///session".into(), accel: AccelChoice::Auto }
    }
}

/// Wish for [`Accel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where a boot proves it, else refuse (design D16).
    Auto,
    /// KVM, unproven.
    Kvm,
    /// QEMU's translator: slow, no isolation.
    Tcg,
}

impl AccelChoice {
    /// What it comes to, once `kvm_proven` is known.
    #[must_use]
    pub fn resolve(self, kvm_proven: bool) -> Option<Accel> {
        match self {
            Self::Kvm => Some(Accel::Kvm),
            Self::Tcg => Some(Accel::Tcg),
            Self::Auto if kvm_proven => Some(Accel::Kvm),
            Self::Auto => None,
        }
    }
}
