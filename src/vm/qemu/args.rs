//! QEMU's command line for a [`VmSpec`]: the machine that libvirt makes of [`domain_xml`](crate::vm::domain_xml), device
//! by device, and no others. Pure text, no I/O. Everybody on the host can read it: it holds no secret.

use crate::vm::domain_xml::{CHANNEL_NAME, DOOR_NAME, EGRESS_NAME, NESTING, SHELL_NAME, TB_CACHE_MIB, uuid};
use crate::vm::{Accel, Attachment, Boot, Limits, VmName, VmSpec};
use serde_json::{Value, json};
use std::path::Path;

/// Where QEMU's own I/O ports for a guest that panics begin; libvirt's `<panic model='isa'/>`.
const PANIC_PORT: &str = "pvpanic,ioport=1285";

/// What holds its disk to its limits.
const GROUP: &str = "limits";

/// What a shutdown looks like in QEMU's log, see [`super::log`].
pub(super) const SHUTDOWN_TRACE: &str = "qemu_system_shutdown_request";

/// Something of the spec cannot be told to QEMU.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadSpec {
    #[error("{what} `{text}` is not absolute, or no UTF-8")]
    Path { what: &'static str, text: String },
    #[error("back end `qemu` has no libvirt network to attach to; use network = \"relay\"")]
    Bridge,
}

fn absolute<'a>(what: &'static str, path: &'a Path) -> Result<&'a str, BadSpec> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text),
        _ => Err(BadSpec::Path { what, text: path.to_string_lossy().into_owned() }),
    }
}

/// A value among others that commas separate.
fn value(text: &str) -> String {
    text.replace(',', ",,")
}

/// The arguments. `qmp`: where QEMU listens for us.
pub(super) fn arguments(spec: &VmSpec, qmp: &Path) -> Result<Vec<String>, BadSpec> {
    let name = VmName::from(spec.id.clone());
    let mut all: Vec<String> = ["-no-user-config", "-nodefaults"].map(String::from).into();
    let mut add = |option: &str, text: String| all.extend([option.to_owned(), text]);
    add("-name", format!("guest={name},debug-threads=on"));
    add("-uuid", uuid(&spec.id));
    if spec.frozen.is_some() {
        // What it is restored from is sent to it.
        add("-incoming", "defer".into());
    }
    add("-display", "none".into());
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add("-machine", "q35,usb=off,dump-guest-core=off".into());
    match spec.accel {
        Accel::Kvm => {
            add("-accel", "kvm".into());
            // Less what runs VMs in VMs (field.md U39).
            let less: String = NESTING.iter().filter(|_| !spec.nested).map(|name| format!(",-{name}")).collect();
            add("-cpu", format!("host{less}"));
        }
        Accel::Tcg => add("-accel", format!("tcg,tb-size={TB_CACHE_MIB}")),
    }
    add("-m", format!("size={}M", spec.memory_mib));
    add("-smp", spec.cpus.to_string());
    add("-rtc", "base=utc".into());
    // S3 and S4: a guest that sleeps is waited for in vain (field.md U8).
    add("-global", "ICH9-LPC.disable_s3=1".into());
    add("-global", "ICH9-LPC.disable_s4=1".into());
    add("-boot", "strict=on".into());
    // However its guest ends it, QEMU stays until it was asked how: nobody may have been there to see it.
    add("-action", "reboot=shutdown,shutdown=pause,panic=pause,watchdog=pause".into());
    // Tells a power-off from a reset to who comes later.
    add("-trace", SHUTDOWN_TRACE.into());
    if let Boot::Direct { kernel, initrd, cmdline } = &spec.boot {
        add("-kernel", absolute("kernel", kernel)?.into());
        add("-initrd", absolute("initrd", initrd)?.into());
        add("-append", cmdline.clone());
    }
    let socket = |id: &str, path: &str| format!("socket,id={id},path={},server=on,wait=off", value(path));
    add("-chardev", socket("qmp", absolute("QMP socket", qmp)?));
    add("-mon", "chardev=qmp,mode=control".into());
    let throttled = spec.confine.limits.as_ref().and_then(throttle);
    if let Some(group) = &throttled {
        add("-object", group.clone());
    }
    let frozen = spec.frozen.as_ref().map(|frozen| absolute("frozen disk", &frozen.disk)).transpose()?;
    let mut nodes = disk(absolute("base image", &spec.base)?, frozen, absolute("overlay", &spec.overlay)?);
    if throttled.is_some() {
        nodes.push(json!({ "driver": "throttle", "node-name": "slowed", "throttle-group": GROUP, "file": "disk" }));
    }
    for node in nodes {
        add("-blockdev", node.to_string());
    }
    // Devices on the root bus would offer the old interface, too; behind libvirt's ports they do not.
    let virtio = |device: &str, rest: &str| format!("virtio-{device}-pci,disable-legacy=on{rest}");
    // A failing host disk pauses the guest, which we see, instead of failing its job (V11).
    let drive = if throttled.is_some() { "slowed" } else { "disk" };
    add("-device", virtio("blk", &format!(",drive={drive},bootindex=1,write-cache=on,werror=stop,rerror=stop")));
    for (n, read_only) in spec.read_only.iter().enumerate() {
        let (file, node) = (format!("read-only-{n}-file"), format!("read-only-{n}"));
        let path = absolute("read-only disk", &read_only.path)?;
        add(
            "-blockdev",
            json!({ "driver": "file", "node-name": file, "filename": path, "read-only": true }).to_string(),
        );
        add("-blockdev", json!({ "driver": "raw", "node-name": node, "file": file, "read-only": true }).to_string());
        // Not ours to stop the machine for: its guest does without.
        let serial = value(&read_only.serial);
        add("-device", virtio("blk", &format!(",drive={node},serial={serial},werror=report,rerror=report")));
    }
    match &spec.attachment {
        Attachment::Egress => add("-nic", "none".into()),
        Attachment::User => {
            add("-netdev", "user,id=net".into());
            // No boot from the network, so no ROM for it.
            add("-device", virtio("net", &format!(",netdev=net,mac={},romfile=", spec.id.mac())));
        }
        Attachment::Bridge { .. } => return Err(BadSpec::Bridge),
    }
    add("-chardev", socket("console", absolute("console", &VmSpec::console_socket(&spec.socket_dir, &spec.id))?));
    add("-device", "isa-serial,chardev=console,index=0".into());
    add("-device", virtio("serial", ""));
    add("-chardev", socket("channel", absolute("channel", &VmSpec::channel_socket(&spec.socket_dir, &spec.id))?));
    add("-device", format!("virtserialport,chardev=channel,name={CHANNEL_NAME}"));
    add("-chardev", socket("door", absolute("door's port", &VmSpec::door_socket(&spec.socket_dir, &spec.id))?));
    add("-device", format!("virtserialport,chardev=door,name={DOOR_NAME}"));
    if spec.attachment == Attachment::Egress {
        add("-chardev", socket("egress", absolute("egress port", &VmSpec::egress_socket(&spec.socket_dir, &spec.id))?));
        add("-device", format!("virtserialport,chardev=egress,name={EGRESS_NAME}"));
    }
    add("-chardev", socket("shell", absolute("shell's port", &VmSpec::shell_socket(&spec.socket_dir, &spec.id))?));
    add("-device", format!("virtserialport,chardev=shell,name={SHELL_NAME}"));
    add("-object", "rng-random,id=rng,filename=/dev/urandom".into());
    add("-device", virtio("rng", ",rng=rng"));
    add("-device", PANIC_PORT.into());
    // By this a guest's kernel learns that it is another machine than the one that was frozen.
    add("-device", format!("vmgenid,guid={}", uuid(&spec.id)));
    Ok(all)
}

/// What a VM may do on its disk in a second, if that has bounds.
fn throttle(limits: &Limits) -> Option<String> {
    let rates = [("x-bps-total", limits.disk_bytes_a_second), ("x-iops-total", limits.disk_operations_a_second)];
    let rates: String = rates.iter().filter_map(|(key, rate)| rate.map(|rate| format!(",{key}={rate}"))).collect();
    (!rates.is_empty()).then(|| format!("throttle-group,id={GROUP}{rates}"))
}

/// The disk's nodes. The whole chain is spelt out, with its formats: no image's header decides what the host opens
/// (T16), and base image and frozen disk are opened for reading only (T17).
fn disk(base: &str, frozen: Option<&str>, overlay: &str) -> Vec<Value> {
    // No overlay outlives its VM, so nothing in it need ever reach the platters.
    let unsafe_cache = json!({ "direct": false, "no-flush": true });
    let mut nodes = vec![
        json!({ "driver": "file", "node-name": "base-file", "filename": base, "read-only": true }),
        json!({ "driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": true, "backing": null }),
    ];
    let mut below = "base";
    if let Some(frozen) = frozen {
        below = "frozen";
        nodes.extend([
            json!({ "driver": "file", "node-name": "frozen-file", "filename": frozen, "read-only": true }),
            json!({ "driver": "qcow2", "node-name": "frozen", "file": "frozen-file", "read-only": true,
                "backing": "base" }),
        ]);
    }
    nodes.extend([
        json!({ "driver": "file", "node-name": "disk-file", "filename": overlay, "discard": "unmap",
            "cache": unsafe_cache.clone() }),
        json!({ "driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": below, "discard": "unmap",
            "cache": unsafe_cache }),
    ]);
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{Confinement, Frozen, ReadOnlyDisk};

    fn spec() -> VmSpec {
        VmSpec {
            id: "abcdefghijklmnop".parse().unwrap(),
            installation: "qrstuvwxyz234567".parse().unwrap(),
            bound: Some(("my runner".into(), 4242)),
            cpus: 2,
            memory_mib: 2048,
            accel: Accel::Tcg,
            boot: Boot::Direct {
                kernel: "/var/lib/dayfly/images/d/vmlinuz".into(),
                initrd: "/var/lib/dayfly/images/d/initrd".into(),
                cmdline: "console=ttyS0 root=/dev/vda rw quiet".into(),
            },
            overlay: "/var/lib/dayfly/overlays/df-abcdefghijklmnop.qcow2".into(),
            base: "/var/lib/dayfly/images/d/disk.qcow2".into(),
            frozen: None,
            attachment: Attachment::User,
            read_only: Vec::new(),
            nested: false,
            confine: Confinement::default(),
            socket_dir: "/run/dayfly".into(),
        }
    }

    fn lines(spec: &VmSpec) -> String {
        arguments(spec, Path::new("/run/dayfly/df-abcdefghijklmnop.qmp")).unwrap().join("\n").replace("\n-", "\n\n-")
    }

    #[test]
    fn a_direct_boot_under_tcg() {
        insta::assert_snapshot!(lines(&spec()));
    }

    #[test]
    fn a_machine_without_a_network_card_has_a_third_port() {
        let text = lines(&VmSpec { attachment: Attachment::Egress, ..spec() });
        assert!(text.contains("-nic\nnone") && !text.contains("netdev") && !text.contains("virtio-net"), "{text}");
        insta::assert_snapshot!(text);
    }

    /// A restored machine is the one that was frozen, device by device, but for its names and the disk between its own and
    /// the base image, which it cannot write to.
    #[test]
    fn a_restored_machine_differs_by_what_it_is_sent_and_by_a_disk() {
        let frozen = Frozen { state: "/g/state".into(), sha256: [0; 32], disk: "/g/disk.qcow2".into() };
        let restored = lines(&VmSpec { frozen: Some(frozen), ..spec() });
        let booted = lines(&spec());
        let more: Vec<&str> = restored.lines().filter(|line| !booted.contains(line)).collect();
        assert_eq!(more.len(), 5, "{more:#?}");
        assert!(
            more[..2] == ["-incoming", "defer"] && more[2].contains("/g/disk.qcow2") && !restored.contains("/g/state")
        );
        assert!(more[2..4].iter().all(|line| line.contains("\"read-only\":true")), "{more:#?}");
        assert!(more[3].contains("\"backing\":\"base\"") && more[4].contains("\"backing\":\"frozen\""));
    }

    #[test]
    fn a_disk_boot_under_kvm_names_no_kernel() {
        let text = lines(&VmSpec { accel: Accel::Kvm, boot: Boot::Disk, ..spec() });
        assert!(text.contains("-accel\nkvm\n\n-cpu\nhost,-vmx,-svm\n") && !text.contains("-kernel"), "{text}");
        let text = lines(&VmSpec { accel: Accel::Kvm, nested: true, ..spec() });
        assert!(text.contains("-cpu\nhost\n"), "{text}");
    }

    #[test]
    fn a_disk_with_limits_is_slowed_and_one_without_is_not() {
        assert!(!lines(&spec()).contains("throttle"));
        let of = |limits| lines(&VmSpec { confine: Confinement { user: None, limits: Some(limits) }, ..spec() });
        let text = of(Limits::default());
        assert!(
            text.contains("-object\nthrottle-group,id=limits,x-bps-total=500000000,x-iops-total=20000\n"),
            "{text}"
        );
        assert!(text.contains("drive=slowed,") && !text.contains("drive=disk,"), "{text}");
        let none = Limits { disk_bytes_a_second: None, disk_operations_a_second: None, ..Limits::default() };
        assert!(!of(none).contains("throttle"));
    }

    #[test]
    fn disks_that_are_only_read_come_behind_its_own() {
        let disk = |n: usize, path: &str| ReadOnlyDisk { serial: format!("dayfly-clone-{n}"), path: path.into() };
        let read_only = vec![disk(0, "/var/lib/dayfly/clones/a/0.img"), disk(1, "/var/lib/dayfly/clones/a/1,x.img")];
        let text = lines(&VmSpec { read_only, ..spec() });
        let own = text.find("drive=disk,").unwrap();
        let first = text.find("drive=read-only-0,serial=dayfly-clone-0,werror=report,rerror=report").unwrap();
        assert!(own < first && first < text.find("drive=read-only-1,").unwrap(), "{text}");
        assert!(text.contains(r#"{"driver":"file","node-name":"read-only-1-file","filename":"/var/lib/dayfly/clones/a/1,x.img","read-only":true}"#), "{text}");
    }

    /// T16: no path is read as an option.
    #[test]
    fn a_path_with_a_comma_stays_one_path_and_a_relative_one_is_refused() {
        let text = lines(&VmSpec { socket_dir: "/run/a,server=off".into(), ..spec() });
        assert!(text.contains("path=/run/a,,server=off/df-abcdefghijklmnop.con,server=on"), "{text}");
        let error = arguments(&VmSpec { base: "fd:3".into(), ..spec() }, Path::new("/q")).unwrap_err();
        assert!(error.to_string().contains("base image `fd:3` is not absolute"), "{error}");
        let attachment = Attachment::Bridge { network: "n".into(), tap: "t".into() };
        assert!(matches!(arguments(&VmSpec { attachment, ..spec() }, Path::new("/q")), Err(BadSpec::Bridge)));
    }
}
