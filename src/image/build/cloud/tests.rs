//! Tests of what is done with a cloud image before and after its boot, which the ring `images` has.

use super::*;
use crate::image::manifest::RunnerOrigin;
use std::fs;

/// With files in `directory`.
pub(super) fn request(directory: &Path) -> CloudRequest {
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    CloudRequest {
        disk: directory.join("cloud.qcow2"),
        format: DiskFormat::Qcow2,
        name: "cloud".into(),
        store: ImageStore::new(directory.join("images")),
        runner: RunnerSource { path: file("runner", "the runner"), origin: RunnerOrigin::Path },
        guest_program: file("guest", "the guest program"),
        ca: None,
        packages: Vec::new(),
        is_kvm: false,
        within: DEADLINE,
    }
}

#[test]
fn an_image_is_called_as_its_file() {
    let name = |file: &str| name_of(Path::new(file));
    assert_eq!(name("/d/debian-13-genericcloud-amd64.qcow2").as_deref(), Some("debian-13-genericcloud-amd64"));
    assert_eq!(name("Fedora-Cloud-Base-43.x86_64.qcow2").as_deref(), Some("fedora-cloud-base-43.x86_64"));
    for none in ["", "/", "a b.img", "-x.qcow2", "ü.img"] {
        assert_eq!(name(none), None, "{none}");
    }
}

#[tokio::test]
async fn what_is_no_word_of_a_package_manager_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    for bad in ["-y", "a b", "$(reboot)", "", "a\nb"] {
        let request = CloudRequest { packages: vec!["git".into(), bad.into()], ..request(dir.path()) };
        let error = take_in(&request, &mut |_| {}).await.unwrap_err().to_string();
        assert!(error.ends_with("that is no name of a package"), "{error}");
    }
    let error = take_in(&request(dir.path()), &mut |_| {}).await.unwrap_err().to_string();
    assert!(error.starts_with("find a statically linked dayfly-guest in "), "{error}");
    assert!(!request(dir.path()).store.directory().exists(), "nothing was made");
}

/// T16: the whole chain is named, with its formats.
#[test]
fn no_header_decides_what_is_flattened() {
    let chain = chain(Path::new("/c"), DiskFormat::Raw, Path::new("/o"));
    assert_eq!((&chain["driver"], &chain["backing"]["driver"]), (&json!("qcow2"), &json!("raw")));
    assert_eq!(chain["backing"]["file"]["filename"], "/c");
}

#[test]
fn the_root_file_system_is_the_largest_ext4_of_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let mut bytes = gpt::tests::head(0, true);
    bytes.resize(4 << 20, 0);
    fs::write(&disk, &bytes).unwrap();
    assert_eq!(root_of(&disk).unwrap(), None);
    bytes[(2 << 20) + 1080..][..2].copy_from_slice(&[0x53, 0xef]);
    fs::write(&disk, &bytes).unwrap();
    assert_eq!(root_of(&disk).unwrap(), Some(2 << 20));
    fs::write(&disk, "short").unwrap();
    assert_eq!(root_of(&disk).unwrap(), None);
}
