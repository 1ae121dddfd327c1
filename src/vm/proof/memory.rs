//! A proof holds as long as nothing that it rests on has changed: image, hypervisor and QEMU, whether they offer KVM,
//! kernel and its KVM modules, processor.
//!
//! One small text file, a fact a line; any difference, and the proof is made again.

use super::{Subject, evidence};
use crate::vm::HostInfo;
use std::path::Path;

/// All that a proof rests on, as the text that is kept.
#[must_use]
pub fn ground(subject: &Subject, host: &HostInfo) -> String {
    let mut kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    for module in evidence::modules(Path::new(evidence::MODULE_DIRECTORY)).unwrap_or_default() {
        kernel.push(' ');
        kernel.push_str(module);
    }
    of(subject, host, &kernel, &processor(Path::new("/proc/cpuinfo")))
}

fn of(subject: &Subject, host: &HostInfo, kernel: &str, processor: &str) -> String {
    let image = match subject {
        Subject::Sector => "none",
        Subject::Image { digest, .. } => digest,
    };
    let HostInfo { version, kvm_offered, .. } = host;
    format!("image {image}\nhypervisor {version}\noffers KVM {kvm_offered}\nkernel {kernel}\n{processor}")
}

/// What tells one kind of processor from another, and whether it has the hardware's help for VMs.
fn processor(cpuinfo: &Path) -> String {
    let text = std::fs::read_to_string(cpuinfo).unwrap_or_default();
    let mut ground = String::new();
    for line in text.lines().take_while(|line| !line.is_empty()) {
        let Some((key, value)) = line.split_once(':') else { continue };
        match key.trim() {
            "vendor_id" | "cpu family" | "model" | "model name" | "stepping" | "microcode" => {
                ground.push_str(&format!("{}{value}\n", key.trim()));
            }
            "flags" => {
                let help = value.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")).unwrap_or("none");
                ground.push_str(&format!("virtualisation {help}\n"));
            }
            _ => {}
        }
    }
    ground
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Boot;

    /// U1: another image, QEMU, kernel or processor needs another proof.
    #[test]
    fn whatever_a_proof_rests_on_is_in_its_ground() {
        let dir = tempfile::tempdir().unwrap();
        let cpuinfo = dir.path().join("cpuinfo");
        let processor = |text: &str| {
            std::fs::write(&cpuinfo, text).unwrap();
            processor(&cpuinfo)
        };
        let one = processor(
            "processor\t: 0\nvendor_id\t: A\nmodel name\t: M 1\ncpu MHz\t: 1000.5\nflags\t: fpu vmx\n\nprocessor\t: 1\n",
        );
        let same = processor(
            "processor\t: 0\nvendor_id\t: A\nmodel name\t: M 1\ncpu MHz\t: 2000.1\nflags\t: fpu vmx\n\nprocessor\t: 1\n",
        );
        assert_eq!(one, same, "its speed is no other processor");
        let without = processor("vendor_id\t: A\nmodel name\t: M 1\nflags\t: fpu\n");
        let image = |digest: &str| Subject::Image { boot: Boot::Disk, digest: digest.into() };
        let host =
            |version: &str, kvm_offered| HostInfo { version: version.into(), cpus: 1, memory_mib: 1, kvm_offered };
        let qemu = host("QEMU 7.2", true);
        let base = of(&image("d1"), &qemu, "6.1.0 kvm_intel", &one);
        for other in [
            of(&Subject::Sector, &qemu, "6.1.0 kvm_intel", &one),
            of(&image("d2"), &qemu, "6.1.0 kvm_intel", &one),
            of(&image("d1"), &host("QEMU 7.3", true), "6.1.0 kvm_intel", &one),
            of(&image("d1"), &host("QEMU 7.2", false), "6.1.0 kvm_intel", &one),
            of(&image("d1"), &qemu, "6.1.1 kvm_intel", &one),
            of(&image("d1"), &qemu, "6.1.0 kvm_pvm", &one),
            of(&image("d1"), &qemu, "6.1.0 kvm_intel", &without),
        ] {
            assert_ne!(base, other);
        }
    }
}
