//! What libvirt tells of domains and of its host, in XML: read for the little that is ours in it.

use crate::vm::{InstallationId, VmId};
use quick_xml::Reader;
use quick_xml::events::Event;

/// Bytes of metadata that are looked at. Ours have about 300 (a name of 200 characters that all
/// need spelling out: 2 KiB); another's may be of any size.
pub(super) const METADATA_BYTES_MAX: usize = 16 * 1024;

/// Whose a domain is, from its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The installation that started it.
    pub installation: InstallationId,
    /// Its VM.
    pub vm: VmId,
    /// Runner entry (spelt as [`legible`](super::legible) does) and job, once bound.
    pub bound: Option<(String, u64)>,
}

/// Reads our element as libvirt hands it out (alone, its namespace prefix dropped or not).
/// `None`: it is not ours, or not well-formed. Entities other than XML's five are an error there,
/// so nothing expands.
#[must_use]
pub fn read_metadata(xml: &str) -> Option<Metadata> {
    if xml.len() > METADATA_BYTES_MAX {
        return None;
    }
    let mut reader = Reader::from_str(xml);
    let element = loop {
        match reader.read_event().ok()? {
            Event::Start(element) | Event::Empty(element) => break element,
            Event::Text(text) if text.trim().is_empty() => {}
            _ => return None,
        }
    };
    if element.local_name().as_ref() != "vm" {
        return None;
    }
    let attribute = |name: &str| {
        let attribute = element.try_get_attribute(name).ok()??;
        attribute.normalized_value(quick_xml::XmlVersion::Implicit1_0).ok().map(|value| value.into_owned())
    };
    let bound = attribute("runner").zip(attribute("job").and_then(|job| job.parse().ok()));
    Some(Metadata { installation: attribute("installation")?.parse().ok()?, vm: attribute("vm")?.parse().ok()?, bound })
}

/// QEMU's user as a privileged libvirtd's capabilities tell it: the base label of security model
/// `dac`, `+uid:+gid`. `None`: libvirtd has no such model, so it runs QEMU as its own user.
#[must_use]
pub fn read_qemu_uid(capabilities: &str) -> Option<u32> {
    let mut reader = Reader::from_str(capabilities);
    let (mut path, mut dac) = (Vec::new(), false);
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) => path.push(element.local_name().as_ref().to_owned()),
            Event::End(_) => drop(path.pop()),
            Event::Text(text) => match path.join("/").as_str() {
                "capabilities/host/secmodel/model" => dac = text.trim() == "dac",
                "capabilities/host/secmodel/baselabel" if dac => {
                    return text.trim().split(':').next()?.trim_start_matches('+').parse().ok();
                }
                _ => {}
            },
            Event::Eof => return None,
            _ => {}
        }
    }
}

/// Whether capabilities offer KVM for guests of this architecture.
#[must_use]
pub fn offers_kvm(capabilities: &str) -> bool {
    let mut reader = Reader::from_str(capabilities);
    let mut x86_64 = false;
    loop {
        match reader.read_event() {
            Ok(Event::Start(element) | Event::Empty(element)) => {
                let is = |name: &str, value: &str| {
                    element
                        .try_get_attribute(name)
                        .ok()
                        .flatten()
                        .is_some_and(|attribute| attribute.value.as_ref() == value)
                };
                match element.local_name().as_ref() {
                    "arch" => x86_64 = is("name", "x86_64"),
                    "domain" if x86_64 && is("type", "kvm") => return true,
                    _ => {}
                }
            }
            Ok(Event::Eof) | Err(_) => return false,
            Ok(_) => {}
        }
    }
}
