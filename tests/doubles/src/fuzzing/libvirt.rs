//! XML to and from libvirt: any text in a spec changes no tree, any answer is read or is not ours.

use dayfly::vm::domain_xml::{self, Ownership};
use dayfly::vm::{Accel, Attachment, Boot, Confinement, InstallationId, VmId, VmName, VmSpec};
use quick_xml::Reader;
use quick_xml::events::Event;
use std::path::PathBuf;

const VM: &str = "abcdefghijklmnop";
const INSTALLATION: &str = "qrstuvwxyz234567";

/// Texts, apart by NULs: runner, overlay, base image, kernel, initrd, kernel command line, network, tap, socket
/// directory; then any text more makes it a VM of another kind.
fn spec(texts: &[&str]) -> VmSpec {
    let text = |at: usize| texts.get(at).copied().unwrap_or("x");
    let path = |at: usize| texts.get(at).map_or_else(|| PathBuf::from("/x"), PathBuf::from);
    let direct = texts.len().is_multiple_of(2);
    VmSpec {
        id: VM.parse::<VmId>().unwrap(),
        installation: INSTALLATION.parse::<InstallationId>().unwrap(),
        bound: Some((text(0).to_owned(), 42)),
        cpus: 2,
        memory_mib: 2048,
        accel: if direct { Accel::Tcg } else { Accel::Kvm },
        boot: if direct {
            Boot::Direct { kernel: path(3), initrd: path(4), cmdline: text(5).to_owned() }
        } else {
            Boot::Disk
        },
        overlay: path(1),
        base: path(2),
        frozen: None,
        attachment: match texts.len() % 3 {
            0 => Attachment::Bridge { network: text(6).to_owned(), tap: text(7).to_owned() },
            1 => Attachment::Egress,
            _ => Attachment::User,
        },
        read_only: Vec::new(),
        nested: texts.len() % 2 == 1,
        confine: Confinement::default(),
        socket_dir: path(8),
    }
}

/// Elements and their attributes' names, in order, and all values.
fn tree(xml: &str) -> (Vec<String>, Vec<String>) {
    let (mut shape, mut values) = (Vec::new(), Vec::new());
    let mut reader = Reader::from_str(xml);
    loop {
        match reader.read_event().expect("what we write is well-formed") {
            Event::Start(element) | Event::Empty(element) => {
                shape.push(element.name().as_ref().to_owned());
                for attribute in element.attributes() {
                    let attribute = attribute.expect("what we write is well-formed");
                    shape.push(format!("@{}", attribute.key.as_ref()));
                    let value = attribute.normalized_value(quick_xml::XmlVersion::Implicit1_0).unwrap();
                    values.push(value.into_owned());
                }
            }
            Event::End(_) => shape.push("/".to_owned()),
            Event::Eof => return (shape, values),
            Event::Text(_) | Event::GeneralRef(_) => {}
            other => panic!("{other:?} in what we write"),
        }
    }
}

/// Whatever the texts of a spec are, its XML is the tree that plain texts give, with the texts in their places, or
/// there is none; and whose it is reads back.
pub fn domain_xml(input: &[u8]) {
    let Ok(input) = std::str::from_utf8(input) else { return };
    let texts: Vec<&str> = input.split('\0').collect();
    let given = spec(&texts);
    let ownership = (input.len() % 2 == 0).then_some(Ownership { qemu_uid: 64055, socket_gid: 64055, limits: true });
    let Ok(xml) = domain_xml::write(&given, ownership) else {
        let plain = |text: &&str| text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
        assert!(!texts.iter().skip(1).all(plain), "plain texts are refused");
        return;
    };
    let plain = vec!["/x"; texts.len()];
    let (shape, values) = tree(&xml);
    let expected = domain_xml::write(&spec(&plain), ownership).unwrap();
    assert_eq!(shape, tree(&expected).0, "{xml}");
    for path in [&given.overlay, &given.base] {
        assert!(values.iter().any(|value| value == path.to_str().unwrap()), "{} is not in\n{xml}", path.display());
    }
    assert!(values.contains(&domain_xml::legible(&given.bound.as_ref().unwrap().0)), "{xml}");

    let from = xml.find("<d:vm").unwrap();
    let element = &xml[from..from + xml[from..].find("/>").unwrap() + 2];
    let read = domain_xml::read_metadata(element).expect("ours reads back");
    assert_eq!((read.installation, read.vm), (given.installation, given.id));
    assert_eq!(read.bound, given.bound.map(|(runner, job)| (domain_xml::legible(&runner), job)));
}

/// Metadata, capabilities, names: any text is read within bounds, and what is read as ours has ids of our form.
pub fn libvirt_answers(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Some(read) = domain_xml::read_metadata(text) {
        assert!(text.len() <= 16 * 1024);
        let ids = [read.vm.as_str(), read.installation.as_str()];
        assert!(ids.iter().all(|id| id.len() == 16 && id.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))));
        assert_eq!(
            VmName::parse(&VmName::from(read.vm.clone()).to_string()).map(|name| name.id().clone()),
            Some(read.vm)
        );
        if let Some((runner, _)) = &read.bound {
            // References count as what they stand for: nothing grows.
            assert!(runner.len() <= text.len());
        }
    }
    let _ = (domain_xml::read_qemu_uid(text), domain_xml::offers_kvm(text));
    if let Some(name) = VmName::parse(text) {
        assert_eq!(name.to_string(), text);
    }
}
