//! A proof holds as long as nothing that it rests on has changed: image, hypervisor and QEMU, kernel, processor.
//!
//! One small text file, a fact a line; any difference, and the proof is made again.

use super::Subject;
use std::path::Path;

/// All that a proof rests on, as the text that is kept.
#[must_use]
pub fn ground(subject: Subject<'_>, hypervisor_version: &str) -> String {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    of(subject, hypervisor_version, &release, &processor(Path::new("/proc/cpuinfo")))
}

fn of(subject: Subject<'_>, hypervisor_version: &str, kernel: &str, processor: &str) -> String {
    let image = match subject {
        Subject::Sector => "none",
        Subject::Image(_, digest) => digest,
    };
    format!("image {image}\nhypervisor {hypervisor_version}\nkernel {kernel}\n{processor}")
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
        let boot = Boot::Disk;
        let base = of(Subject::Image(&boot, "d1"), "QEMU 7.2", "6.1.0", &one);
        for other in [
            of(Subject::Sector, "QEMU 7.2", "6.1.0", &one),
            of(Subject::Image(&boot, "d2"), "QEMU 7.2", "6.1.0", &one),
            of(Subject::Image(&boot, "d1"), "QEMU 7.3", "6.1.0", &one),
            of(Subject::Image(&boot, "d1"), "QEMU 7.2", "6.1.1", &one),
            of(Subject::Image(&boot, "d1"), "QEMU 7.2", "6.1.0", &without),
        ] {
            assert_ne!(base, other);
        }
    }
}
