//! What else is known of a guest that proves nothing: QEMU's own words, and which KVM this host has.

use crate::telemetry::printable;
use crate::vm::{Hypervisor, VmSpec};
use std::fmt;
use std::path::Path;

/// Names of the modules by which a kernel offers KVM. Where only `kvm_pvm` is loaded, or none beside `kvm`, there is no
/// virtualisation in the hardware.
const MODULES: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];

/// Where the kernel lists its modules, loaded and built in.
pub(super) const MODULE_DIRECTORY: &str = "/sys/module";

/// Facts for the sentence that says what failed; shows as `; fact; fact`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Why the hypervisor has stopped the VM, in its words.
    stopped: Option<String>,
    /// The first lines that QEMU wrote itself.
    log: Option<String>,
    /// Loaded modules of [`MODULES`]; none if `/sys/module` cannot be looked at.
    modules: Option<Vec<&'static str>>,
}

impl Evidence {
    /// What is known of this VM, which still exists.
    pub(super) async fn of(hypervisor: &dyn Hypervisor, spec: &VmSpec, stopped: Option<&str>) -> Self {
        Self {
            stopped: stopped.map(str::to_owned),
            log: hypervisor.last_words(&spec.id.clone().into()).await.map(|text| printable(&text)),
            modules: modules(Path::new(MODULE_DIRECTORY)),
        }
    }
}

/// Which of [`MODULES`] are loaded.
pub(super) fn modules(directory: &Path) -> Option<Vec<&'static str>> {
    directory.is_dir().then(|| MODULES.into_iter().filter(|name| directory.join(name).exists()).collect())
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(stopped) = &self.stopped {
            write!(f, "; the VM is {stopped}")?;
        }
        if let Some(log) = &self.log {
            write!(f, "; QEMU's log says: {log}")?;
        }
        match self.modules.as_deref() {
            None => Ok(()),
            Some([]) => f.write_str("; neither kvm_intel nor kvm_amd is loaded"),
            Some(["kvm_pvm"]) => {
                f.write_str("; this host's KVM is para-virtual (module kvm_pvm), without the hardware's help")
            }
            Some(names) => write!(f, "; KVM is {}", names.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_evidence_names_qemus_words_and_the_module() {
        let evidence = Evidence {
            stopped: Some("paused".into()),
            log: Some("KVM internal error. Suberror: 1".into()),
            modules: Some(vec!["kvm_pvm"]),
        };
        assert_eq!(
            evidence.to_string(),
            "; the VM is paused; QEMU's log says: KVM internal error. Suberror: 1; this host's KVM is para-virtual (module kvm_pvm), without the hardware's help"
        );
        assert_eq!(Evidence::default().to_string(), "");
    }

    #[test]
    fn modules_are_looked_up_by_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(modules(dir.path()), Some(vec![]));
        std::fs::create_dir(dir.path().join("kvm_amd")).unwrap();
        assert_eq!(modules(dir.path()), Some(vec!["kvm_amd"]));
        assert_eq!(modules(&dir.path().join("none")), None);
    }
}
