//! The one boot of a cloud image: QEMU as it is, without libvirt, for nobody but this command has to do with it.

use super::CloudRequest;
use super::said::{Facts, Said};
use crate::image::build::{BuildError, Progress};
use crate::process::{ProcessError, Program};
use serde_json::json;
use std::path::Path;

/// Starts it, and hears what it says until it has powered off.
pub(super) async fn run(
    request: &CloudRequest,
    base: &Path,
    overlay: &Path,
    seed: &Path,
    progress: &mut Progress<'_>,
) -> Result<Facts, BuildError> {
    progress(&format!("its first boot{}", if request.is_kvm { "" } else { ", under TCG" }));
    let mut said = Said::default();
    let ended = qemu(request, base, overlay, seed).run_lines(&mut |line| said.hear(line, progress)).await;
    match ended {
        Ok(_) => Ok(said.end()?),
        Err(ProcessError::Deadline { .. }) => Err(said.late(request.within).into()),
        Err(error) => Err(error.into()),
    }
}

fn qemu(request: &CloudRequest, base: &Path, overlay: &Path, seed: &Path) -> Program {
    // All is thrown away if the host fails meanwhile.
    let cache = json!({ "direct": false, "no-flush": true });
    let nodes = [
        json!({ "driver": request.format.word(), "node-name": "base", "read-only": true,
            "file": { "driver": "file", "filename": base, "read-only": true } }),
        json!({ "driver": "qcow2", "node-name": "disk", "backing": "base", "discard": "unmap",
            "file": { "driver": "file", "filename": overlay, "discard": "unmap", "cache": cache } }),
        json!({ "driver": "raw", "node-name": "seed", "read-only": true,
            "file": { "driver": "file", "filename": seed, "read-only": true } }),
    ];
    // Without a way out it still gets an address, as a machine of a cloud does, and waits for none.
    let restrict = if request.packages.is_empty() { "on" } else { "off" };
    Program::new("qemu-system-x86_64", request.within)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35"])
        .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
        .args(if request.is_kvm { ["-accel", "kvm", "-cpu", "host"] } else { ["-accel", "tcg", "-cpu", "qemu64"] })
        .args(["-m", "2048M", "-smp", "2", "-rtc", "base=utc", "-chardev", "stdio,id=console,signal=off"])
        .args(["-serial", "chardev:console", "-object", "rng-random,id=rng,filename=/dev/urandom"])
        .args(["-device", "virtio-rng-pci,rng=rng"])
        .args(nodes.iter().flat_map(|node| ["-blockdev".to_owned(), node.to_string()]))
        .args(["-device", "virtio-blk-pci,drive=disk,bootindex=1", "-device", "virtio-blk-pci,drive=seed"])
        .args(["-netdev", &format!("user,id=net,restrict={restrict}")])
        .args(["-device", "virtio-net-pci,netdev=net,romfile="])
}
