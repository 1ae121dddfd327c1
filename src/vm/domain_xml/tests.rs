//! Snapshots, an exact allow-list, and any text in every place.

use super::read::METADATA_BYTES_MAX;
use super::*;
use crate::vm::ReadOnlyDisk;
use proptest::prelude::*;
use quick_xml::Reader;
use quick_xml::events::Event;
use std::collections::{BTreeMap, BTreeSet};

fn spec() -> VmSpec {
    let directory = std::path::PathBuf::from("/var/lib/dayfly");
    VmSpec {
        id: "abcdefghijklmnop".parse().unwrap(),
        installation: "qrstuvwxyz234567".parse().unwrap(),
        bound: Some(("my <runner> \"1\" & co".into(), 4242)),
        cpus: 2,
        memory_mib: 2048,
        accel: Accel::Tcg,
        boot: Boot::Direct {
            kernel: directory.join("images/d/vmlinuz"),
            initrd: directory.join("images/d/initrd"),
            cmdline: "console=ttyS0 root=/dev/vda rw quiet".into(),
        },
        overlay: directory.join("overlays/df-abcdefghijklmnop.qcow2"),
        base: directory.join("images/d/disk.qcow2"),
        frozen: None,
        attachment: Attachment::User,
        read_only: Vec::new(),
        nested: false,
        confine: Confinement::default(),
        socket_dir: "/run/dayfly".into(),
    }
}

/// Elements (by path), their attributes and texts, without white space between elements.
#[derive(Debug, PartialEq, Eq)]
struct Tree(Vec<(String, BTreeMap<String, String>, String)>);

fn parse(xml: &str) -> Tree {
    let mut reader = Reader::from_str(xml);
    let (mut tree, mut open) = (Vec::new(), Vec::<usize>::new());
    let push = |tree: &mut Vec<(String, BTreeMap<String, String>, String)>,
                open: &[usize],
                e: quick_xml::events::BytesStart| {
        let parent = open.last().map_or(String::new(), |i| format!("{}/", tree[*i].0));
        let attributes = e.attributes().map(|a| a.unwrap());
        let attributes = attributes
            .map(|a| {
                (
                    a.key.as_ref().to_owned(),
                    a.normalized_value(quick_xml::XmlVersion::Implicit1_0).unwrap().into_owned(),
                )
            })
            .collect();
        tree.push((parent + e.local_name().as_ref(), attributes, String::new()));
    };
    loop {
        match reader.read_event().unwrap() {
            Event::Start(e) => {
                push(&mut tree, &open, e);
                open.push(tree.len() - 1);
            }
            Event::Empty(e) => push(&mut tree, &open, e),
            Event::End(_) => drop(open.pop()),
            Event::Text(t) => {
                let leaf = open.last().is_some_and(|i| *i == tree.len() - 1);
                if leaf || !t.trim().is_empty() {
                    let i = *open.last().unwrap();
                    tree[i].2 += &t.xml10_content();
                }
            }
            Event::GeneralRef(r) => {
                let text = quick_xml::escape::unescape(&format!("&{};", r.xml10_content())).unwrap().into_owned();
                let i = *open.last().unwrap();
                tree[i].2 += &text;
            }
            Event::Eof => break,
            other => panic!("unexpected {other:?}"),
        }
    }
    for entry in &mut tree {
        if entry.2.trim().is_empty() {
            entry.2.clear();
        }
    }
    Tree(tree)
}

impl Tree {
    fn attribute(&self, path: &str, name: &str) -> &str {
        &self
            .0
            .iter()
            .find(|e| e.0 == path && e.1.contains_key(name))
            .unwrap_or_else(|| panic!("no {path} with {name}"))
            .1[name]
    }

    fn text(&self, path: &str) -> &str {
        &self.0.iter().find(|e| e.0 == path).unwrap_or_else(|| panic!("no {path}")).2
    }
}

#[test]
fn a_direct_boot_under_tcg_with_user_network() {
    insta::assert_snapshot!(write(&spec(), None).unwrap());
}

#[test]
fn a_disk_boot_under_kvm_with_a_bridge_at_a_privileged_libvirtd() {
    let spec = VmSpec {
        bound: None,
        accel: Accel::Kvm,
        boot: Boot::Disk,
        frozen: None,
        attachment: Attachment::Bridge { network: "dayfly".into(), tap: "dfabcdefghijkl".into() },
        ..spec()
    };
    insta::assert_snapshot!(write(&spec, Some(Ownership { qemu_uid: 64055, socket_gid: 990, limits: true })).unwrap());
}

/// Files that many machines read, behind its own disk: libvirt gives none of them to QEMU's user, and none is written.
#[test]
fn disks_that_are_only_read_stay_whose_they_are() {
    let disk = |n: usize| ReadOnlyDisk { serial: format!("disk-{n}"), path: format!("/var/{n}.img").into() };
    let spec = VmSpec { read_only: vec![disk(0), disk(1)], ..spec() };
    for ownership in [None, Some(Ownership { qemu_uid: 64055, socket_gid: 990, limits: false })] {
        let Tree(tree) = parse(&write(&spec, ownership).unwrap());
        let all = |path: &str| tree.iter().filter(|e| e.0 == format!("domain/devices/disk/{path}")).collect::<Vec<_>>();
        let targets: Vec<_> = all("target").iter().map(|e| e.1["dev"].as_str()).collect();
        assert_eq!(targets, ["vda", "vdb", "vdc"]);
        let sources: Vec<_> = all("source").iter().map(|e| e.1["file"].as_str()).collect();
        assert_eq!(sources[1..], ["/var/0.img", "/var/1.img"]);
        assert_eq!(all("serial").iter().map(|e| e.2.as_str()).collect::<Vec<_>>(), ["disk-0", "disk-1"]);
        assert_eq!((all("readonly").len(), all("shareable").len()), (2, 2));
        let labels = all("source/seclabel");
        assert_eq!(labels.len(), if ownership.is_some() { 2 } else { 0 });
        assert!(labels.iter().all(|e| e.1["relabel"] == "no" && e.1["model"] == "dac"));
    }
}

#[test]
fn a_machine_without_a_network_card_has_a_third_port() {
    let spec = VmSpec { attachment: Attachment::Egress, ..spec() };
    let xml = write(&spec, Some(Ownership { qemu_uid: 64055, socket_gid: 990, limits: true })).unwrap();
    assert!(!xml.contains("<interface"), "{xml}");
    insta::assert_snapshot!(xml);
}

/// T15: no device that was not proven.
#[test]
fn t15_only_the_devices_of_the_allow_list_appear() {
    const ALLOWED: &[&str] = &[
        "domain",
        "domain/name",
        "domain/uuid",
        "domain/metadata",
        "domain/metadata/vm",
        "domain/memory",
        "domain/memtune",
        "domain/memtune/hard_limit",
        "domain/vcpu",
        "domain/cputune",
        "domain/cputune/shares",
        "domain/cputune/global_period",
        "domain/cputune/global_quota",
        "domain/os",
        "domain/os/type",
        "domain/os/kernel",
        "domain/os/initrd",
        "domain/os/cmdline",
        "domain/os/boot",
        "domain/features",
        "domain/features/acpi",
        "domain/features/tcg",
        "domain/features/tcg/tb-cache",
        "domain/cpu",
        "domain/cpu/feature",
        "domain/clock",
        "domain/on_poweroff",
        "domain/on_reboot",
        "domain/on_crash",
        "domain/pm",
        "domain/pm/suspend-to-mem",
        "domain/pm/suspend-to-disk",
        "domain/devices",
        "domain/devices/controller",
        "domain/devices/disk",
        "domain/devices/disk/driver",
        "domain/devices/disk/source",
        "domain/devices/disk/source/seclabel",
        "domain/devices/disk/readonly",
        "domain/devices/disk/shareable",
        "domain/devices/disk/serial",
        "domain/devices/disk/backingStore",
        "domain/devices/disk/backingStore/format",
        "domain/devices/disk/backingStore/source",
        "domain/devices/disk/backingStore/source/seclabel",
        "domain/devices/disk/backingStore/backingStore",
        "domain/devices/disk/target",
        "domain/devices/disk/iotune",
        "domain/devices/disk/iotune/total_bytes_sec",
        "domain/devices/disk/iotune/total_iops_sec",
        "domain/devices/interface",
        "domain/devices/interface/mac",
        "domain/devices/interface/source",
        "domain/devices/interface/target",
        "domain/devices/interface/model",
        "domain/devices/interface/bandwidth",
        "domain/devices/interface/bandwidth/inbound",
        "domain/devices/interface/bandwidth/outbound",
        "domain/devices/interface/port",
        "domain/devices/serial",
        "domain/devices/serial/source",
        "domain/devices/serial/source/seclabel",
        "domain/devices/serial/source/seclabel/label",
        "domain/devices/serial/target",
        "domain/devices/console",
        "domain/devices/console/source",
        "domain/devices/console/source/seclabel",
        "domain/devices/console/source/seclabel/label",
        "domain/devices/console/target",
        "domain/devices/channel",
        "domain/devices/channel/source",
        "domain/devices/channel/source/seclabel",
        "domain/devices/channel/source/seclabel/label",
        "domain/devices/channel/target",
        "domain/devices/rng",
        "domain/devices/rng/backend",
        "domain/devices/panic",
        "domain/devices/memballoon",
        "domain/seclabel",
        "domain/seclabel/label",
    ];
    let limits = Limits { network_bytes_a_second: Some(1 << 20), ..Limits::default() };
    let confine = Confinement { user: Some("dayfly-vm-0".to_owned().try_into().unwrap()), limits: Some(limits) };
    let mut seen = BTreeSet::new();
    for accel in [Accel::Kvm, Accel::Tcg] {
        for boot in [spec().boot, Boot::Disk] {
            let bridge = || Attachment::Bridge { network: "n".into(), tap: "t".into() };
            for attachment in [Attachment::Egress, Attachment::User, bridge()] {
                for ownership in [None, Some(Ownership { qemu_uid: 1, socket_gid: 2, limits: true })] {
                    let confine = if boot == Boot::Disk { Confinement::default() } else { confine.clone() };
                    let read_only = vec![ReadOnlyDisk { serial: "a-disk-1".into(), path: "/var/a&1.img".into() }];
                    let (boot, attachment) = (boot.clone(), attachment.clone());
                    let spec = VmSpec { accel, boot, attachment, read_only, confine, ..spec() };
                    let tree = parse(&write(&spec, ownership).unwrap());
                    assert!(tree.0.iter().all(|e| ALLOWED.contains(&e.0.as_str())), "{tree:?}");
                    assert_eq!(tree.attribute("domain/devices/controller", "model"), "none");
                    let cards = tree.0.iter().filter(|e| e.0 == "domain/devices/interface").count();
                    let ports = tree.0.iter().filter(|e| e.0 == "domain/devices/channel").count();
                    if spec.attachment == Attachment::Egress {
                        assert_eq!((cards, ports), (0, 4));
                    } else {
                        assert_eq!((cards, ports), (1, 3));
                        let user = tree.attribute("domain/devices/interface", "type") == "user";
                        assert_eq!(user, spec.attachment == Attachment::User);
                    }
                    assert_eq!(tree.attribute("domain", "type") == "kvm", accel == Accel::Kvm);
                    seen.extend(tree.0.into_iter().map(|e| e.0));
                }
            }
        }
    }
    assert_eq!(seen, ALLOWED.iter().map(|s| (*s).to_owned()).collect(), "the allow-list is exact");
}

proptest! {
    /// T28: whatever a runner is called.
    #[test]
    fn t28_any_text_parses_back_to_the_same_tree(runner in ".*", file in "[^/\\pC\u{fffe}\u{ffff}]{1,40}", cmdline in "[^\\pC]{0,80}", job: u64) {
        let plain = parse(&write(&spec(), None).unwrap());
        let spec = VmSpec {
            bound: Some((runner.clone(), job)),
            overlay: Path::new("/o").join(&file),
            base: Path::new("/b").join(&file),
            boot: Boot::Direct { kernel: Path::new("/k").join(&file), initrd: Path::new("/i").join(&file), cmdline: cmdline.clone() },
            ..spec()
        };
        let tree = parse(&write(&spec, None).unwrap());
        let shape = |t: &Tree| t.0.iter().map(|e| (e.0.clone(), e.1.keys().cloned().collect::<Vec<_>>())).collect::<Vec<_>>();
        prop_assert_eq!(shape(&tree), shape(&plain));
        prop_assert_eq!(tree.attribute("domain/metadata/vm", "runner"), legible(&runner));
        prop_assert_eq!(tree.attribute("domain/metadata/vm", "job"), job.to_string());
        prop_assert_eq!(tree.attribute("domain/devices/disk/source", "file"), format!("/o/{file}"));
        prop_assert_eq!(tree.attribute("domain/devices/disk/backingStore/source", "file"), format!("/b/{file}"));
        prop_assert_eq!(tree.text("domain/os/kernel"), format!("/k/{file}"));
        if !cmdline.trim().is_empty() {
            prop_assert_eq!(tree.text("domain/os/cmdline"), cmdline);
        }
    }

    #[test]
    fn metadata_of_any_runner_reads_back(runner in ".*", job: u64) {
        let spec = VmSpec { bound: Some((runner.clone(), job)), ..spec() };
        let xml = write(&spec, None).unwrap();
        let start = xml.find("<d:vm").unwrap();
        let element = &xml[start..start + xml[start..].find("/>").unwrap() + 2];
        let ours = Metadata { installation: spec.installation, vm: spec.id, bound: Some((legible(&runner), job)) };
        prop_assert_eq!(read_metadata(element), Some(ours));
    }

    #[test]
    fn hostile_metadata_is_nobodys_and_never_a_panic(text in ".*", inner in "[<>&a-z'\"=/ !\\[\\]-]*") {
        prop_assert_eq!(read_metadata(&text), None);
        let element = format!("<vm {inner} installation='abcdefghijklmnop'/>");
        prop_assert_eq!(read_metadata(&element).filter(|m| m.vm.as_str() != "abcdefghijklmnop"), None);
    }
}

#[test]
fn foreign_or_broken_metadata_is_not_ours() {
    let ids = "installation='abcdefghijklmnop' vm='qrstuvwxyz234567'";
    let ours = Metadata {
        installation: "abcdefghijklmnop".parse().unwrap(),
        vm: "qrstuvwxyz234567".parse().unwrap(),
        bound: None,
    };
    let check = |xml: &str, expected: Option<&Metadata>| assert_eq!(read_metadata(xml).as_ref(), expected, "{xml}");
    check(&format!("<vm {ids}/>"), Some(&ours));
    check(&format!("<vm {ids}></vm>"), Some(&ours));
    check(&format!("<vm {ids} runner='r' job='x'/>"), Some(&ours));
    check(&format!("<other {ids}/>"), None);
    check("<vm installation='abcdefghijklmnop'/>", None);
    check("<vm installation='../../etc/passwd' vm='qrstuvwxyz234567'/>", None);
    check(&format!("<!DOCTYPE vm [<!ENTITY a 'b'>]><vm {ids}/>"), None);
    check("<vm installation='&a;' vm='qrstuvwxyz234567'/>", None);
    check("", None);
    check(&format!("{}<vm {ids}/>", " ".repeat(METADATA_BYTES_MAX)), None);
}

#[test]
fn what_xml_cannot_carry_is_refused_by_name() {
    let check = |spec: VmSpec, says: &str| {
        let error = write(&spec, None).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    check(VmSpec { overlay: "relative.qcow2".into(), ..spec() }, "overlay \"relative.qcow2\"");
    check(VmSpec { base: "/a\nb".into(), ..spec() }, "base image \"/a\\nb\"");
    check(VmSpec { socket_dir: "/a\u{1}".into(), ..spec() }, "channel socket");
    let boot = Boot::Direct { kernel: "/k".into(), initrd: "/i".into(), cmdline: "quiet\0".into() };
    check(VmSpec { boot, ..spec() }, "kernel command line");
}

#[test]
fn uuids_differ_and_stay() {
    assert_eq!(uuid(&spec().id), uuid(&spec().id));
    assert_ne!(uuid(&spec().id), uuid(&spec().installation));
    assert_eq!(uuid(&spec().id).len(), 36);
    assert_eq!(&uuid(&spec().id)[14..15], "8");
}

#[test]
fn capabilities_tell_qemus_user_and_kvm() {
    let capabilities = "<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
        <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+107</baselabel><baselabel type='qemu'>+64055:+107</baselabel>\
        </secmodel></host><guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/><domain type='kvm'/></arch></guest></capabilities>";
    assert_eq!(read_qemu_uid(capabilities), Some(64055));
    assert!(offers_kvm(capabilities));
    let session = "<capabilities><host/><guest><arch name='i686'><domain type='kvm'/></arch></guest>\
        <guest><arch name='x86_64'><domain type='qemu'/></arch></guest></capabilities>";
    assert_eq!(read_qemu_uid(session), None);
    assert!(!offers_kvm(session));
}

/// U39: a guest sees neither vmx nor svm, with either back end, unless its class says so.
#[test]
fn nested_virtualisation_is_off_unless_somebody_asks_for_it() {
    let of = |nested| write(&VmSpec { accel: Accel::Kvm, nested, ..spec() }, None).unwrap();
    for feature in ["vmx", "svm"] {
        assert!(of(false).contains(&format!("<feature policy=\"disable\" name=\"{feature}\"/>")), "{}", of(false));
    }
    assert!(of(true).contains("<cpu mode=\"host-passthrough\"/>"), "{}", of(true));
    // QEMU's translator has neither.
    assert!(!write(&spec(), None).unwrap().contains("<cpu"));
}

/// V15: the machine's hardware clock is the host's, in UTC, however its guest's own clock may go.
#[test]
fn a_machine_has_the_hosts_time_in_its_hardware_clock() {
    for accel in [Accel::Tcg, Accel::Kvm] {
        let xml = write(&VmSpec { accel, ..spec() }, None).unwrap();
        assert_eq!(xml.matches("<clock ").count(), 1);
        assert!(xml.contains("<clock offset=\"utc\"/>"), "{xml}");
    }
}

/// V17: what a machine shouts into its network ends at its own card: a network of QEMU's for it alone, or an isolated
/// port of the bridge.
#[test]
fn no_machine_shares_a_network_segment_with_another() {
    let user = write(&VmSpec { attachment: Attachment::User, ..spec() }, None).unwrap();
    assert!(user.contains("<interface type=\"user\">") && !user.contains("<source network"), "{user}");
    assert_eq!(user.matches("<interface ").count(), 1, "it has no other card");
    let bridge = Attachment::Bridge { network: "dayfly".into(), tap: "dfabcdefghijkl".into() };
    let bridge = write(&VmSpec { attachment: bridge, ..spec() }, None).unwrap();
    assert!(bridge.contains("<port isolated=\"yes\"/>"), "{bridge}");
    assert_eq!(bridge.matches("<interface ").count(), 1);
    let relay = write(&VmSpec { attachment: Attachment::Egress, ..spec() }, None).unwrap();
    assert!(!relay.contains("<interface"), "it has no card at all: {relay}");
}

/// U40: with a user of its own QEMU runs as that user, the overlay is given to it, the sockets are its and the daemon's
/// group's, and the base image is nobody's; where libvirtd has no labels there is none.
#[test]
fn a_machine_with_a_user_of_its_own_has_a_label() {
    let user = "dayfly-vm-3".to_owned().try_into().unwrap();
    let spec = VmSpec { confine: Confinement { user: Some(user), limits: None }, ..spec() };
    let privileged = Ownership { qemu_uid: 64055, socket_gid: 990, limits: true };
    let tree = parse(&write(&spec, Some(privileged)).unwrap());
    assert_eq!(tree.text("domain/seclabel/label"), "dayfly-vm-3:dayfly-vm-3");
    assert_eq!(tree.attribute("domain/seclabel", "relabel"), "yes");
    assert_eq!(tree.attribute("domain/seclabel", "type"), "static");
    assert_eq!(tree.attribute("domain/devices/disk/backingStore/source/seclabel", "relabel"), "no");
    for socket in ["channel", "console", "serial"] {
        assert_eq!(tree.text(&format!("domain/devices/{socket}/source/seclabel/label")), "dayfly-vm-3:+990");
    }
    assert!(!write(&spec, None).unwrap().contains("seclabel"));
}

/// T9: a machine's memory, CPU time and disk have bounds, as far as libvirt can hold it to them.
#[test]
fn t9_a_machine_is_held_to_limits_where_libvirt_can() {
    let limits = Limits { network_bytes_a_second: Some(2048), ..Limits::default() };
    let attachment = Attachment::Bridge { network: "n".into(), tap: "t".into() };
    let spec = VmSpec { confine: Confinement { user: None, limits: Some(limits) }, attachment, ..spec() };
    let privileged = Ownership { qemu_uid: 64055, socket_gid: 990, limits: true };
    let tree = parse(&write(&spec, Some(privileged)).unwrap());
    assert_eq!(tree.text("domain/memtune/hard_limit"), "3072");
    assert_eq!(tree.text("domain/cputune/shares"), "100");
    assert_eq!(
        (tree.text("domain/cputune/global_period"), tree.text("domain/cputune/global_quota")),
        ("100000", "300000")
    );
    assert_eq!(tree.text("domain/devices/disk/iotune/total_bytes_sec"), "500000000");
    assert_eq!(tree.text("domain/devices/disk/iotune/total_iops_sec"), "20000");
    assert_eq!(tree.attribute("domain/devices/interface/bandwidth/outbound", "average"), "2");
    for weaker in [None, Some(Ownership { limits: false, ..privileged })] {
        let xml = write(&spec, weaker).unwrap();
        assert!(!xml.contains("<memtune") && !xml.contains("<cputune") && xml.contains("<iotune"), "{xml}");
    }
}
