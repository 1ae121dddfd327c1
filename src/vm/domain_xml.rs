//! libvirt's domain XML: written for a [`VmSpec`], and our metadata in it read back.
//!
//! Pure text, no I/O. The devices are exactly those that were proven to work, and no others: no
//! balloon, USB, graphics, sound or shared folder (threats.md T15). Every text goes through the XML
//! writer's escaping, and what XML cannot carry is refused or spelt out, never dropped.
//! Called by [`super::libvirt`], which hands the text to libvirt.

mod read;

pub use read::{Metadata, offers_kvm, read_metadata, read_qemu_uid};

use super::{Accel, Attachment, Boot, Confinement, Limits, VmId, VmName, VmSpec};
use crate::hex::hex;
use quick_xml::Writer;
use quick_xml::events::BytesText;
use sha2::{Digest as _, Sha256};
use std::io;
use std::path::Path;

/// Namespace of our element in a domain's metadata. Never dereferenced; the 1 is its version.
pub const METADATA_NAMESPACE: &str = "urn:dayfly:vm:1";

/// Name of the virtio-serial port that carries guest config and reports.
pub const CHANNEL_NAME: &str = "org.dayfly.guest.0";

/// Name of the one that carries what its guest says to its door.
pub const DOOR_NAME: &str = "org.dayfly.door.0";

/// Name of the one that carries what its guest sends out, where it has no network card.
pub const EGRESS_NAME: &str = "org.dayfly.egress.0";

/// Name of the one by which its guest is asked for a shell.
pub const SHELL_NAME: &str = "org.dayfly.shell.0";

/// Features of a CPU by which it runs VMs: Intel's and AMD's.
pub(super) const NESTING: [&str; 2] = ["vmx", "svm"];

/// What the guest calls its disk, and libvirt too.
pub(super) const DISK: &str = "vda";

/// TCG's translation cache. QEMU's own default grows without bound; 256 MiB cost no visible speed
/// and are what decision D3 reserves.
pub(super) const TB_CACHE_MIB: &str = "256";

/// Characters of a runner's name kept in the metadata: it is for people.
const RUNNER_CHARS_MAX: usize = 200;

/// A path or text of the spec cannot stand in XML.
#[derive(Debug, thiserror::Error)]
#[error("{what} {text:?} is not absolute, or has characters that domain XML cannot carry")]
pub struct BadSpec {
    what: &'static str,
    text: String,
}

/// How libvirt hands files to QEMU's user. Only a privileged libvirtd has such labels; `None`
/// where libvirtd runs as ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// User that QEMU runs as.
    pub qemu_uid: u32,
    /// Group that may connect to the sockets of channel, door, console, shell and egress: the daemon's own.
    pub socket_gid: u32,
    /// Whether it can hold a VM's memory and CPUs to limits: its host has the cgroup controllers for that.
    pub limits: bool,
}

impl Ownership {
    /// Whose the sockets of a VM are, as a label has it.
    fn socket_label(self, confine: &Confinement) -> String {
        match &confine.user {
            Some(user) => format!("{user}:+{}", self.socket_gid),
            None => format!("+{}:+{}", self.qemu_uid, self.socket_gid),
        }
    }
}

/// The UUID that follows from a VM's id: version 8 (RFC 9562), so that two VMs never share one and
/// a second start of the same VM is refused by libvirt rather than doubled.
#[must_use]
pub fn uuid(id: &VmId) -> String {
    let digest = Sha256::new().chain_update(b"dayfly vm uuid\0").chain_update(id.as_str()).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// `text` with control characters, non-characters and backslashes spelt `\u{..}`, so that XML and
/// terminals carry it, cut at 200 characters.
#[must_use]
pub fn legible(text: &str) -> String {
    let plain = |c: char| c != '\\' && !c.is_control() && carried_by_xml(c);
    text.chars()
        .take(RUNNER_CHARS_MAX)
        .map(|c| if plain(c) { c.to_string() } else { c.escape_unicode().to_string() })
        .collect()
}

/// XML 1.0's `Char`, less the control characters that are checked apart.
fn carried_by_xml(c: char) -> bool {
    !matches!(c, '\u{fffe}' | '\u{ffff}')
}

fn carried(what: &'static str, text: &str) -> Result<String, BadSpec> {
    if text.chars().all(|c| !c.is_control() && carried_by_xml(c)) {
        Ok(text.to_owned())
    } else {
        Err(BadSpec { what, text: text.to_owned() })
    }
}

fn absolute(what: &'static str, path: &Path) -> Result<String, BadSpec> {
    match path.to_str() {
        Some(text) if path.is_absolute() => carried(what, text),
        _ => Err(BadSpec { what, text: path.to_string_lossy().into_owned() }),
    }
}

/// The texts of a spec, checked, so that the writer below cannot fail on them.
struct Texts {
    overlay: String,
    base: String,
    read_only: Vec<(String, String)>,
    channel: String,
    door: String,
    shell: String,
    console: String,
    direct: Option<[String; 3]>,
    network: Network,
}

/// The network, its texts checked.
enum Network {
    Egress { socket: String },
    User,
    Bridge { network: String, tap: String },
}

impl Texts {
    fn check(spec: &VmSpec) -> Result<Self, BadSpec> {
        Ok(Self {
            overlay: absolute("overlay", &spec.overlay)?,
            base: absolute("base image", &spec.base)?,
            read_only: spec
                .read_only
                .iter()
                .map(|disk| Ok((carried("serial number", &disk.serial)?, absolute("read-only disk", &disk.path)?)))
                .collect::<Result<_, BadSpec>>()?,
            channel: absolute("channel socket", &VmSpec::channel_socket(&spec.socket_dir, &spec.id))?,
            door: absolute("door's socket", &VmSpec::door_socket(&spec.socket_dir, &spec.id))?,
            shell: absolute("shell's socket", &VmSpec::shell_socket(&spec.socket_dir, &spec.id))?,
            console: absolute("console socket", &VmSpec::console_socket(&spec.socket_dir, &spec.id))?,
            direct: match &spec.boot {
                Boot::Direct { kernel, initrd, cmdline } => Some([
                    absolute("kernel", kernel)?,
                    absolute("initrd", initrd)?,
                    carried("kernel command line", cmdline)?,
                ]),
                Boot::Disk => None,
            },
            network: match &spec.attachment {
                Attachment::Egress => Network::Egress {
                    socket: absolute("egress socket", &VmSpec::egress_socket(&spec.socket_dir, &spec.id))?,
                },
                Attachment::User => Network::User,
                Attachment::Bridge { network, tap } => {
                    Network::Bridge { network: carried("network", network)?, tap: carried("tap", tap)? }
                }
            },
        })
    }
}

/// The domain XML of a VM. `ownership` is given when libvirtd is privileged.
///
/// # Errors
/// [`BadSpec`]: a path is relative or no UTF-8, or a text has control characters.
pub fn write(spec: &VmSpec, ownership: Option<Ownership>) -> Result<String, BadSpec> {
    write_as(spec, ownership, if spec.accel == Accel::Kvm { "kvm" } else { "qemu" })
}

/// [`write()`] with another type of domain: libvirt's test driver knows its own only.
pub(super) fn write_as(spec: &VmSpec, ownership: Option<Ownership>, domain_type: &str) -> Result<String, BadSpec> {
    let texts = Texts::check(spec)?;
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    xml.create_element("domain")
        .with_attribute(("type", domain_type))
        .write_inner_content(|w| domain(w, spec, &texts, ownership))
        .expect("writing to memory does not fail");
    Ok(String::from_utf8(xml.into_inner()).expect("made of strings"))
}

type Xml = Writer<Vec<u8>>;

fn text(w: &mut Xml, element: &str, content: &str) -> io::Result<()> {
    w.create_element(element).write_text_content(BytesText::new(content)).map(drop)
}

fn empty(w: &mut Xml, element: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    w.create_element(element).with_attributes(attributes.iter().copied()).write_empty().map(drop)
}

fn domain(w: &mut Xml, spec: &VmSpec, texts: &Texts, ownership: Option<Ownership>) -> io::Result<()> {
    text(w, "name", &VmName::from(spec.id.clone()).to_string())?;
    text(w, "uuid", &uuid(&spec.id))?;
    w.create_element("metadata").write_inner_content(|w| metadata(w, spec))?;
    w.create_element("memory")
        .with_attribute(("unit", "MiB"))
        .write_text_content(BytesText::new(&spec.memory_mib.to_string()))?;
    let limits = spec.confine.limits.as_ref();
    if let (Some(limits), Some(Ownership { limits: true, .. })) = (limits, ownership) {
        bounds(w, spec, limits)?;
    } else {
        text(w, "vcpu", &spec.cpus.to_string())?;
    }
    w.create_element("os").write_inner_content(|w| {
        let os = w.create_element("type").with_attributes([("arch", "x86_64"), ("machine", "q35")]);
        os.write_text_content(BytesText::new("hvm"))?;
        match &texts.direct {
            Some([kernel, initrd, cmdline]) => {
                text(w, "kernel", kernel)?;
                text(w, "initrd", initrd)?;
                text(w, "cmdline", cmdline)
            }
            None => empty(w, "boot", &[("dev", "hd")]),
        }
    })?;
    w.create_element("features").write_inner_content(|w| {
        empty(w, "acpi", &[])?;
        if spec.accel == Accel::Tcg {
            w.create_element("tcg").write_inner_content(|w| {
                w.create_element("tb-cache")
                    .with_attribute(("unit", "MiB"))
                    .write_text_content(BytesText::new(TB_CACHE_MIB))
                    .map(drop)
            })?;
        }
        Ok(())
    })?;
    if spec.accel == Accel::Kvm {
        cpu(w, spec.nested)?;
    }
    empty(w, "clock", &[("offset", "utc")])?;
    // A reboot ends the machine: the job that it ran is over either way (V5, V6). A guest whose kernel panics
    // is kept until we have seen it: libvirt forgets how a transient domain ended (field.md U47).
    for (event, action) in [("on_poweroff", "destroy"), ("on_reboot", "destroy"), ("on_crash", "preserve")] {
        text(w, event, action)?;
    }
    // S3 and S4: a guest that sleeps is waited for in vain (field.md U8).
    w.create_element("pm").write_inner_content(|w| {
        ["suspend-to-mem", "suspend-to-disk"].iter().try_for_each(|state| empty(w, state, &[("enabled", "no")]))
    })?;
    w.create_element("devices").write_inner_content(|w| devices(w, spec, texts, ownership))?;
    if let (Some(user), Some(_)) = (&spec.confine.user, ownership) {
        // QEMU runs as this user and the group of its name, and is given the files of its VM alone.
        let label =
            w.create_element("seclabel").with_attributes([("type", "static"), ("model", "dac"), ("relabel", "yes")]);
        label.write_inner_content(|w| text(w, "label", &format!("{user}:{user}")))?;
    }
    Ok(())
}

/// What a VM may use of memory and CPUs, in the order of libvirt's schema. A guest's own CPUs, and one for what QEMU does
/// itself.
fn bounds(w: &mut Xml, spec: &VmSpec, limits: &Limits) -> io::Result<()> {
    const PERIOD_US: u64 = 100_000;
    w.create_element("memtune").write_inner_content(|w| {
        let hard = w.create_element("hard_limit").with_attribute(("unit", "MiB"));
        hard.write_text_content(BytesText::new(&Limits::memory_mib(spec.memory_mib).to_string())).map(drop)
    })?;
    text(w, "vcpu", &spec.cpus.to_string())?;
    w.create_element("cputune").write_inner_content(|w| {
        text(w, "shares", &limits.cpu_weight.to_string())?;
        text(w, "global_period", &PERIOD_US.to_string())?;
        text(w, "global_quota", &(Limits::cpu_percent(spec.cpus) * PERIOD_US / 100).to_string())
    })?;
    Ok(())
}

/// What a VM may do on its disk in a second.
fn throttle(w: &mut Xml, limits: &Limits) -> io::Result<()> {
    let rates = [("total_bytes_sec", limits.disk_bytes_a_second), ("total_iops_sec", limits.disk_operations_a_second)];
    let rates = rates.map(|(element, rate)| rate.map(|rate| (element, rate)));
    if rates.iter().all(Option::is_none) {
        return Ok(());
    }
    w.create_element("iotune").write_inner_content(|w| {
        rates.iter().flatten().try_for_each(|(element, rate)| text(w, element, &rate.to_string()))
    })?;
    Ok(())
}

/// The host's own CPU, less what runs VMs in VMs: nested virtualisation is a part of the kernel that nobody needs to reach
/// who has not asked for it (field.md U39). Each host has one of the two at most; the other is taken off all the same.
fn cpu(w: &mut Xml, nested: bool) -> io::Result<()> {
    let cpu = w.create_element("cpu").with_attribute(("mode", "host-passthrough"));
    if nested {
        return cpu.write_empty().map(drop);
    }
    let off = |w: &mut Xml, name: &str| empty(w, "feature", &[("policy", "disable"), ("name", name)]);
    cpu.write_inner_content(|w| NESTING.iter().try_for_each(|name| off(w, name))).map(drop)
}

fn metadata(w: &mut Xml, spec: &VmSpec) -> io::Result<()> {
    let mut ours = w.create_element("d:vm").with_attributes([
        ("xmlns:d", METADATA_NAMESPACE),
        ("installation", spec.installation.as_str()),
        ("vm", spec.id.as_str()),
    ]);
    if let Some((runner, job)) = &spec.bound {
        ours = ours.with_attributes([("runner", legible(runner).as_str()), ("job", job.to_string().as_str())]);
    }
    ours.write_empty().map(drop)
}

fn devices(w: &mut Xml, spec: &VmSpec, texts: &Texts, ownership: Option<Ownership>) -> io::Result<()> {
    empty(w, "controller", &[("type", "usb"), ("model", "none")])?;
    w.create_element("disk")
        .with_attributes([("type", "file"), ("device", "disk")])
        .write_inner_content(|w| disk(w, spec, texts, ownership))?;
    for (n, (serial, path)) in texts.read_only.iter().enumerate() {
        w.create_element("disk")
            .with_attributes([("type", "file"), ("device", "disk")])
            .write_inner_content(|w| read_only_disk(w, n, (serial, path), ownership))?;
    }
    interface(w, spec, &texts.network)?;
    for (element, target) in [("serial", [("port", "0")].as_slice()), ("console", &[("type", "serial"), ("port", "0")])]
    {
        w.create_element(element).with_attribute(("type", "unix")).write_inner_content(|w| {
            socket(w, &texts.console, &spec.confine, ownership)?;
            empty(w, "target", target)
        })?;
    }
    let egress = match &texts.network {
        Network::Egress { socket } => Some((socket, EGRESS_NAME)),
        Network::User | Network::Bridge { .. } => None,
    };
    let ports = [(&texts.channel, CHANNEL_NAME), (&texts.door, DOOR_NAME)].into_iter().chain(egress);
    for (path, name) in ports.chain([(&texts.shell, SHELL_NAME)]) {
        w.create_element("channel").with_attribute(("type", "unix")).write_inner_content(|w| {
            socket(w, path, &spec.confine, ownership)?;
            empty(w, "target", &[("type", "virtio"), ("name", name)])
        })?;
    }
    w.create_element("rng").with_attribute(("model", "virtio")).write_inner_content(|w| {
        let backend = w.create_element("backend").with_attribute(("model", "random"));
        backend.write_text_content(BytesText::new("/dev/urandom")).map(drop)
    })?;
    // Tells a panic from a restart. The guest's driver for it is `pvpanic-mmio`, which the initrd loads.
    empty(w, "panic", &[("model", "isa")])?;
    empty(w, "memballoon", &[("model", "none")])
}

/// Its network card, if it has one: libvirt adds none by itself.
fn interface(w: &mut Xml, spec: &VmSpec, network: &Network) -> io::Result<()> {
    let (kind, bridge) = match network {
        Network::Egress { .. } => return Ok(()),
        Network::User => ("user", None),
        Network::Bridge { network, tap } => ("network", Some((network, tap))),
    };
    w.create_element("interface").with_attribute(("type", kind)).write_inner_content(|w| {
        if let Some((network, _)) = bridge {
            empty(w, "source", &[("network", network)])?;
        }
        empty(w, "mac", &[("address", &spec.id.mac())])?;
        if let Some((_, tap)) = bridge {
            empty(w, "target", &[("dev", tap)])?;
        }
        empty(w, "model", &[("type", "virtio")])?;
        if bridge.is_none() {
            return Ok(());
        }
        if let Some(rate) = spec.confine.limits.as_ref().and_then(|limits| limits.network_bytes_a_second) {
            // libvirt counts in KiB.
            let rate = (rate / 1024).max(1).to_string();
            w.create_element("bandwidth").write_inner_content(|w| {
                ["inbound", "outbound"].iter().try_for_each(|way| empty(w, way, &[("average", &rate)]))
            })?;
        }
        // Isolated bridge ports: guests do not see each other's frames.
        empty(w, "port", &[("isolated", "yes")])
    })?;
    Ok(())
}

fn disk(w: &mut Xml, spec: &VmSpec, texts: &Texts, ownership: Option<Ownership>) -> io::Result<()> {
    empty(
        w,
        "driver",
        &[
            ("name", "qemu"),
            ("type", "qcow2"),
            // No overlay outlives its VM, so nothing in it need ever reach the platters.
            ("cache", "unsafe"),
            // A failing host disk pauses the guest, which we see, instead of failing its job (V11).
            ("error_policy", "stop"),
            ("discard", "unmap"),
        ],
    )?;
    empty(w, "source", &[("file", &texts.overlay)])?;
    // The whole chain is spelt out: no image's header decides what the host opens (T16).
    w.create_element("backingStore").with_attribute(("type", "file")).write_inner_content(|w| {
        empty(w, "format", &[("type", "qcow2")])?;
        w.create_element("source").with_attribute(("file", texts.base.as_str())).write_inner_content(|w| {
            // Else libvirt gives the base image to QEMU's user, and never takes it back: a QEMU
            // that a guest has broken out into could then rewrite all later VMs' disk (T17).
            if ownership.is_some() { empty(w, "seclabel", &[("model", "dac"), ("relabel", "no")]) } else { Ok(()) }
        })?;
        empty(w, "backingStore", &[])
    })?;
    empty(w, "target", &[("dev", DISK), ("bus", "virtio")])?;
    spec.confine.limits.as_ref().map_or(Ok(()), |limits| throttle(w, limits))
}

/// A disk that others read, too: it is nobody's to write, and its file stays whose it is.
fn read_only_disk(w: &mut Xml, n: usize, (serial, path): (&str, &str), ownership: Option<Ownership>) -> io::Result<()> {
    empty(w, "driver", &[("name", "qemu"), ("type", "raw"), ("error_policy", "report")])?;
    w.create_element("source").with_attribute(("file", path)).write_inner_content(|w| {
        if ownership.is_some() { empty(w, "seclabel", &[("model", "dac"), ("relabel", "no")]) } else { Ok(()) }
    })?;
    empty(w, "backingStore", &[])?;
    empty(w, "target", &[("dev", &disk_name(n)), ("bus", "virtio")])?;
    empty(w, "readonly", &[])?;
    empty(w, "shareable", &[])?;
    text(w, "serial", serial)
}

/// What libvirt calls the `n`th of them: `vdb`, and so on.
fn disk_name(n: usize) -> String {
    let last = b'b'.saturating_add(u8::try_from(n).unwrap_or(u8::MAX));
    format!("vd{}", char::from(last.min(b'z')))
}

fn socket(w: &mut Xml, path: &str, confine: &Confinement, ownership: Option<Ownership>) -> io::Result<()> {
    let source = w.create_element("source").with_attributes([("mode", "bind"), ("path", path)]);
    match ownership {
        None => source.write_empty().map(drop),
        Some(ownership) => source
            .write_inner_content(|w| {
                w.create_element("seclabel")
                    .with_attributes([("model", "dac"), ("relabel", "yes")])
                    .write_inner_content(|w| text(w, "label", &ownership.socket_label(confine)))
                    .map(drop)
            })
            .map(drop),
    }
}

#[cfg(test)]
mod tests;
