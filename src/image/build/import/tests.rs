//! An image goes out and comes in; what comes in otherwise is refused, and nothing of it stays.

use super::*;
use crate::image::store::tests::{promote, write_image};
use std::os::unix::fs::symlink;

struct Hosts {
    dir: tempfile::TempDir,
    here: ImageStore,
}

impl Hosts {
    /// A host with an image, and room for another host.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let here = ImageStore::new(dir.path().join("here"));
        fs::create_dir_all(here.directory()).unwrap();
        promote(&here, b"kernel");
        Self { dir, here }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn there(&self) -> PathBuf {
        self.path("there")
    }

    fn export(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        export(&self.here, &self.here.get("shell").unwrap(), &to).unwrap();
        to
    }

    fn import(&self, from: &Path, name: Option<&str>) -> Result<Image, BuildError> {
        import(from, &ImageStore::new(self.there()), name, &mut |_| ())?.promote()
    }

    /// Why it is refused; nothing of it stays.
    fn refused(&self, from: &Path, name: Option<&str>) -> String {
        let text = crate::telemetry::chain(&self.import(from, name).unwrap_err());
        let left =
            fs::read_dir(self.there()).map(|dir| dir.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>());
        let left = left.unwrap_or_default();
        assert!(left.iter().all(|name| name == super::super::staging::LOCK_FILE), "{text}: {left:?}");
        text
    }
}

#[test]
fn an_image_goes_out_and_comes_in_the_same() {
    let hosts = Hosts::new();
    let image = hosts.here.get("shell").unwrap();
    for (to, name) in [("out", None), ("out.tar", Some("other"))] {
        let from = hosts.export(to);
        let imported = hosts.import(&from, name).unwrap();
        assert_eq!(imported.name, name.unwrap_or("shell"));
        // It is believed in nothing that only a boot can tell.
        assert_eq!(imported.manifest.info, None);
        assert!(image.manifest.files().eq(imported.manifest.files()));
        ImageStore::new(hosts.there()).verify(&imported).unwrap();
        // Nothing is written over.
        assert!(export(&hosts.here, &image, &from).is_err());
    }
    assert_eq!(hosts.import(&hosts.path("out"), None).unwrap().digest(), image.digest());
    let left: Vec<_> = fs::read_dir(hosts.dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
}

#[test]
fn what_is_not_as_its_manifest_says_is_refused() {
    let hosts = Hosts::new();
    let spoilt = |spoil: &dyn Fn(&Path)| {
        let from = hosts.export("spoilt");
        spoil(&from);
        let text = hosts.refused(&from, None);
        fs::remove_dir_all(&from).unwrap();
        text
    };
    let write =
        |name: &'static str, content: &'static [u8]| move |dir: &Path| fs::write(dir.join(name), content).unwrap();
    assert!(spoilt(&write("vmlinuz", b"KERNEL")).contains("`vmlinuz` is not the file that was exported"));
    assert!(spoilt(&write("vmlinuz", b"kern")).contains("`vmlinuz` has 4 bytes instead of 6"));
    assert!(spoilt(&write("vmlinuz", b"kernel and more")).contains("`vmlinuz` is longer than its manifest says"));
    assert!(spoilt(&|dir| fs::remove_file(dir.join("initrd")).unwrap()).contains("initrd"));
    assert!(spoilt(&write("image.toml", b"format_version = 99\n")).contains("format version 99"));
    assert!(spoilt(&write("image.toml", b"= nonsense")).contains("parse image.toml"));
    let link = |dir: &Path| {
        fs::remove_file(dir.join("vmlinuz")).unwrap();
        symlink("/etc/passwd", dir.join("vmlinuz")).unwrap();
    };
    assert!(spoilt(&link).contains("vmlinuz"));
    let edited = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join("image.toml");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    assert!(spoilt(&edited("architecture = \"x86_64\"", "architecture = \"riscv\"")).contains("is for riscv"));
    assert!(spoilt(&edited("name = \"shell\"", "name = \"../shell\"")).contains("no image name"));
    assert!(spoilt(&edited("file = \"vmlinuz\"", "file = \"../vmlinuz\"")).contains("plain names"));
    assert!(spoilt(&edited("bytes = 6\n", "bytes = 9000000000000000000\n")).contains("are free in"));
    assert!(hosts.refused(&hosts.export("good"), Some("../evil")).contains("no image name"));
    assert!(hosts.refused(&hosts.path("nowhere"), None).contains("nowhere"));
}

/// A disk that names another file of the host is no disk, whatever its digest.
#[test]
fn a_disk_with_a_backing_file_is_refused() {
    let hosts = Hosts::new();
    let dir = write_image(&hosts.path("evil"), "evil", b"kernel");
    let mut disk = fs::read(dir.join("disk.qcow2")).unwrap();
    disk[15] = 104;
    fs::write(dir.join("disk.qcow2"), &disk).unwrap();
    let digest = crate::image::store::digest(&dir.join("disk.qcow2")).unwrap();
    let path = dir.join("image.toml");
    let mut manifest = Manifest::parse(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest.disk.sha256 = digest;
    fs::write(&path, manifest.to_text()).unwrap();
    assert!(hosts.refused(&dir, None).contains("it has a backing file"));
}

#[test]
fn a_file_of_files_is_cut_or_holds_more_at_its_peril() {
    let hosts = Hosts::new();
    let whole = fs::read(hosts.export("whole.tar")).unwrap();
    let from = hosts.path("cut.tar");
    for cut in (0..whole.len()).step_by(256) {
        fs::write(&from, &whole[..cut]).unwrap();
        // The blocks that end it need not both be there.
        if whole.len() - cut > 512 {
            hosts.refused(&from, None);
        }
    }
    let image = hosts.here.get("shell").unwrap();
    let manifest = image.manifest.to_text();
    let pack = |files: &[(&str, &[u8])]| {
        let mut out = Vec::new();
        for (name, content) in files {
            tar::write_file(&mut out, name, content.len() as u64, &mut &content[..]).unwrap();
        }
        tar::write_end(&mut out).unwrap();
        fs::write(&from, out).unwrap();
        hosts.refused(&from, None)
    };
    assert!(pack(&[("vmlinuz", b"kernel")]).contains("its first file is no image.toml"));
    assert!(pack(&[("image.toml", manifest.as_bytes())]).contains("is not in it"));
    let twice: &[(&str, &[u8])] =
        &[("image.toml", manifest.as_bytes()), ("vmlinuz", b"kernel"), ("vmlinuz", b"kernel")];
    assert!(pack(twice).contains("knows no file `vmlinuz`, or it is there twice"));
    assert!(pack(&[("image.toml", manifest.as_bytes()), ("other", b"")]).contains("knows no file `other`"));
}

/// Killed in the middle, half an image lies where the next build or import removes it; no name leads to it.
#[test]
fn a_killed_import_is_cleaned_up_by_the_next() {
    let hosts = Hosts::new();
    let from = hosts.export("out");
    let half = hosts.there().join(".staging-killed");
    fs::create_dir_all(&half).unwrap();
    fs::write(half.join("disk.qcow2"), "half").unwrap();
    assert!(ImageStore::new(hosts.there()).list().unwrap().is_empty());
    hosts.import(&from, None).unwrap();
    assert!(!half.exists());
    assert_eq!(ImageStore::new(hosts.there()).list().unwrap().len(), 1);
}
