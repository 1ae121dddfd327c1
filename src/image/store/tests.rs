//! Tests of `image::store`, in directories of their own.

use super::*;
use crate::files::plain::tests::{fifo, in_time};
use crate::image::manifest;
use crate::image::qcow2::tests::header;
use dayfly_guest_config::Can;

/// Writes an image whose kernel has this content, and returns its directory.
pub(crate) fn write_image(dir: &Path, name: &str, kernel: &[u8]) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let mut manifest = manifest::tests::example();
    manifest.name = name.into();
    let disk = header(4 << 30);
    let initrd = b"initrd".to_vec();
    let write = |file: &mut ImageFile, bytes: &[u8]| {
        fs::write(dir.join(&file.file), bytes).unwrap();
        *file = ImageFile { file: file.file.clone(), bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) };
    };
    write(&mut manifest.disk, &disk);
    write(manifest.kernel.as_mut().unwrap(), kernel);
    write(manifest.initrd.as_mut().unwrap(), &initrd);
    fs::write(dir.join(MANIFEST_FILE), manifest.to_text()).unwrap();
    dir.to_owned()
}

/// All names in the directory.
fn entries(store: &ImageStore) -> Vec<String> {
    store.entries().unwrap()
}

fn store() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::new(dir.path());
    (dir, store)
}

pub(crate) fn promote(store: &ImageStore, kernel: &[u8]) -> Image {
    let staged = write_image(&store.directory.join(".staging-1"), "shell", kernel);
    store.promote(&staged, "shell").unwrap()
}

#[test]
fn a_promoted_image_is_found_with_all_that_a_vm_needs() {
    let (_dir, store) = store();
    let image = promote(&store, b"kernel");
    assert_eq!(store.get("shell").unwrap(), image);
    assert!(!store.directory.join(".staging-1").exists());
    let real = fs::canonicalize(&store.directory).unwrap();
    assert!(image.dir.starts_with(&real) && image.dir.to_str().unwrap().contains("shell@"), "{:?}", image.dir);
    assert_eq!(image.disk, image.dir.join("disk.qcow2"));
    assert_eq!(image.disk_bytes, 4 << 30);
    let Boot::Direct { kernel, initrd, cmdline } = &image.boot else { panic!("{:?}", image.boot) };
    assert_eq!((fs::read(kernel).unwrap(), fs::read(initrd).unwrap()), (b"kernel".to_vec(), b"initrd".to_vec()));
    assert!(cmdline.starts_with("root="));
    store.verify(&image).unwrap();
}

#[test]
fn a_vm_that_starts_from_the_old_version_still_finds_it() {
    let (_dir, store) = store();
    let first = promote(&store, b"one");
    let second = promote(&store, b"two");
    assert_ne!(first.dir, second.dir);
    assert!(first.disk.exists(), "the version before stays");
    assert_eq!(store.get("shell").unwrap().dir, second.dir);
    let third = promote(&store, b"three");
    assert!(!first.dir.exists() && second.dir.exists() && third.dir.exists());
    // The same again is the same version.
    assert_eq!(promote(&store, b"three").dir, third.dir);
    assert_eq!(store.list().unwrap().len(), 1);
    store.remove("shell").unwrap();
    assert_eq!(entries(&store), [".store.lock"]);
    store.remove("shell").unwrap();
}

#[test]
fn the_version_before_comes_back_and_goes_again() {
    let (_dir, store) = store();
    let message = |store: &ImageStore| store.roll_back("shell").unwrap_err().to_string();
    assert_eq!(message(&store), "image `shell` has no version before the one in use");
    let first = promote(&store, b"one");
    assert_eq!(message(&store), "image `shell` has no version before the one in use");
    let second = promote(&store, b"two");
    let name = |image: &Image| image.dir.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(store.versions("shell").unwrap(), [name(&second), name(&first)]);
    for expected in [&first, &second, &first] {
        assert_eq!(store.roll_back("shell").unwrap().dir, expected.dir);
        assert_eq!(store.get("shell").unwrap().dir, expected.dir);
    }
    assert_eq!(store.versions("shell").unwrap(), [name(&first), name(&second)]);
    // The next one takes the place of the one in use; the one that was rolled back from is the oldest now.
    let third = promote(&store, b"three");
    assert_eq!(store.versions("shell").unwrap(), [name(&third), name(&first)]);
    assert!(!second.dir.exists());

    assert_eq!(store.named(&name(&first)).unwrap().dir, first.dir);
    assert_eq!(store.named("shell").unwrap().dir, third.dir);
    for wrong in ["shell@00000000", "shell@../x", "other@00000000"] {
        assert!(matches!(store.named(wrong), Err(ImageError::NoVersion { .. })), "{wrong}");
    }
    assert!(matches!(store.named("../x@1"), Err(ImageError::Name(_))));
}

#[test]
fn a_broken_version_is_not_rolled_back_to() {
    let (_dir, store) = store();
    let first = promote(&store, b"one");
    let second = promote(&store, b"two");
    fs::remove_file(first.dir.join("initrd")).unwrap();
    assert!(matches!(store.roll_back("shell"), Err(ImageError::File { .. })));
    assert_eq!(store.get("shell").unwrap().dir, second.dir);
}

/// U4: a job boots from the version that it was accepted for, also if another has taken its place; once that is gone
/// it boots from none.
#[test]
fn a_version_is_found_by_what_is_in_it() {
    let (_dir, store) = store();
    let reference = |image: &Image| crate::machine_spec::ImageRef { name: "shell".into(), digest: image.digest() };
    let first = promote(&store, b"one");
    store
        .learn(
            &first,
            Learnt {
                info: r#"{"name":"gitlab-runner"}"#.into(),
                contract: 1,
                can: Can { relay: true, ..Can::default() },
            },
        )
        .unwrap();
    let tested = store.get("shell").unwrap();
    assert_eq!(tested.digest(), first.digest(), "what a boot test learns makes no other image");
    let second = promote(&store, b"two");
    assert_eq!(store.get_version(&reference(&first)).unwrap().dir, first.dir);
    assert_eq!(store.get_version(&reference(&second)).unwrap().dir, second.dir);
    promote(&store, b"three");
    let error = store.get_version(&reference(&first)).unwrap_err();
    assert!(error.to_string().contains(&format!("the version {} of image `shell`", &first.digest()[..12])), "{error}");
    store.remove("shell").unwrap();
    assert!(matches!(store.get_version(&reference(&second)), Err(ImageError::Missing { .. })));
}

#[test]
fn a_directory_that_the_operator_made_is_an_image_too() {
    let (_dir, store) = store();
    write_image(&store.directory.join("own"), "own", b"kernel");
    assert_eq!(store.get("own").unwrap().name, "own");
    store.remove("own").unwrap();
    assert!(matches!(store.get("own"), Err(ImageError::Missing { .. })));
}

#[test]
fn a_missing_image_says_how_to_get_it() {
    let (_dir, store) = store();
    let error = store.get("debian-12-shell").unwrap_err().to_string();
    assert!(
        error.starts_with("no image `debian-12-shell` in /")
            && error.ends_with("build it with `dayfly image build debian-12-shell`"),
        "{error}"
    );
    assert!(ImageStore::new("/no/such/directory").list().unwrap().is_empty());
}

#[test]
fn names_that_are_paths_are_refused() {
    let (_dir, store) = store();
    for name in ["", ".", "..", "a/b", ".staging-1", "shell@12345678", "Shell", "a b", &"x".repeat(65)] {
        assert!(matches!(store.get(name), Err(ImageError::Name(_))), "{name}");
        assert!(matches!(store.remove(name), Err(ImageError::Name(_))), "{name}");
    }
}

/// What `get` says of a good image after `change`.
fn check(change: impl FnOnce(&Path), expected: &str) {
    let (_dir, store) = store();
    let dir = write_image(&store.directory.join("shell"), "shell", b"kernel");
    change(&dir);
    let (_, listed) = store.list().unwrap().pop().unwrap();
    let error = listed.unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    let text = format!("{error}: {source}");
    assert!(text.contains(expected) && text.contains("`shell`"), "{text}");
}

/// H12: an image with a broken part is refused when it is looked at, before any job.
#[test]
fn each_way_to_be_broken_has_its_own_sentence() {
    let edit = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join(MANIFEST_FILE);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    check(|dir| fs::remove_file(dir.join("vmlinuz")).unwrap(), "/vmlinuz of image");
    check(|dir| fs::remove_file(dir.join(MANIFEST_FILE)).unwrap(), "/image.toml of image");
    check(|dir| fs::write(dir.join("disk.qcow2"), b"short").unwrap(), "has 5 bytes instead of 104");
    check(|dir| fs::write(dir.join("disk.qcow2"), [0; 104]).unwrap(), "it is no qcow2 file");
    check(
        |dir| {
            let mut disk = header(1);
            disk[15] = 1;
            fs::write(dir.join("disk.qcow2"), disk).unwrap();
        },
        "it has a backing file",
    );
    check(edit("format_version = 1", "format_version = 7"), "format version 7");
    check(edit("executor = ", "executer = "), "parse image.toml");
    check(edit(std::env::consts::ARCH, "pdp11"), "is for pdp11");
}

#[test]
fn a_file_that_was_changed_in_place_is_found_by_its_digest() {
    let (_dir, store) = store();
    let image = promote(&store, b"kernel");
    let Boot::Direct { kernel, .. } = &image.boot else { panic!("direct") };
    fs::write(kernel, b"evil!!").unwrap();
    let error = store.verify(&image).unwrap_err().to_string();
    assert!(error.contains("SHA-256 differs"), "{error}");
}

#[test]
fn a_broken_staged_image_never_replaces_a_good_one() {
    let (_dir, store) = store();
    let good = promote(&store, b"good");
    let staged = write_image(&store.directory.join(".staging-2"), "shell", b"bad");
    fs::remove_file(staged.join("initrd")).unwrap();
    assert!(matches!(store.promote(&staged, "shell"), Err(ImageError::File { .. })));
    assert_eq!(store.get("shell").unwrap(), good);
}

/// H11: a disk that is written over in place, or exchanged, is told from the one before and refused, until it is put back.
#[test]
fn an_image_that_is_changed_in_place_is_refused() {
    let (_dir, store) = store();
    let image = promote(&store, b"kernel");
    let good = fs::read(&image.disk).unwrap();
    let mut evil = good.clone();
    *evil.last_mut().unwrap() ^= 1;
    let written_over = |bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).open(&image.disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
        // Whatever the file system's clock: the next look sees another time.
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        file.set_modified(later).unwrap();
    };
    let exchanged = |bytes: &[u8]| {
        let mode = fs::metadata(&image.disk).unwrap().modified().unwrap();
        fs::write(image.dir.join("new"), bytes).unwrap();
        fs::rename(image.dir.join("new"), &image.disk).unwrap();
        fs::OpenOptions::new().write(true).open(&image.disk).unwrap().set_modified(mode).unwrap();
    };
    type Change<'a> = &'a dyn Fn(&[u8]);
    for change in [&written_over as Change<'_>, &exchanged] {
        change(&evil);
        for _ in 0..2 {
            let error = store.get("shell").unwrap_err().to_string();
            assert!(error.contains("was changed in place") && error.contains("shell"), "{error}");
        }
        change(&good);
        let again = store.get("shell").unwrap();
        assert_ne!(again.stamp, image.stamp, "another file, with the same bytes");
    }
    // Another version is another matter.
    promote(&store, b"other kernel");
    store.get("shell").unwrap();
}

/// H11: an image that is exchanged while a machine is being made is told when QEMU has it open.
#[tokio::test]
async fn a_stamp_holds_until_a_file_is_another() {
    let (_dir, store) = store();
    let image = promote(&store, b"kernel");
    assert!(image.stamp.holds().await);
    fs::set_permissions(&image.disk, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert!(image.stamp.holds().await, "who may read it is no part of it");
    let bytes = fs::read(&image.disk).unwrap();
    fs::write(image.dir.join("new"), bytes).unwrap();
    fs::rename(image.dir.join("new"), &image.disk).unwrap();
    assert!(!image.stamp.holds().await);
    fs::remove_file(&image.disk).unwrap();
    assert!(!image.stamp.holds().await);
}

/// U29: an image whose manifest or disk is a FIFO is broken, and keeps nobody waiting; nor does a manifest lead elsewhere.
#[test]
fn an_image_of_fifos_and_links_is_broken_at_once() {
    let (_dir, store) = store();
    let dir = write_image(&store.directory.join("shell"), "shell", b"kernel");
    let get = |store: &ImageStore| {
        let store = store.clone();
        in_time(move || store.get("shell").map(drop).map_err(|error| crate::telemetry::chain(&error)))
    };
    let manifest = dir.join(MANIFEST_FILE);
    get(&store).unwrap();
    fs::rename(&manifest, dir.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(dir.join("elsewhere"), &manifest).unwrap();
    assert!(get(&store).unwrap_err().ends_with("is a link, and none is followed here"));
    fs::remove_file(&manifest).unwrap();
    fifo(&manifest);
    assert!(get(&store).unwrap_err().ends_with("is no plain file"));
    let disk = dir.join("fifo");
    fifo(&disk);
    let checked = in_time(move || (qcow2::check(&disk).is_err(), digest(&disk).is_err()));
    assert_eq!(checked, (true, true));
}

fn version(image: &Image) -> String {
    image.dir.file_name().unwrap().to_str().unwrap().to_owned()
}

/// An overlay's header that names this base, as `qemu-img create -b` writes it.
fn overlay(path: &Path, base: &Path) {
    let mut bytes = header(4 << 30);
    let name = base.to_str().unwrap().as_bytes();
    bytes[8..16].copy_from_slice(&104_u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A version that machines run from goes when they have ended and newer ones are kept, not before.
#[test]
fn an_old_version_goes_with_the_last_machine_on_it() {
    let (dir, store) = store();
    let overlays = dir.path().join("overlays");
    let store = store.keeping(3, &overlays);
    // Each a second younger than the one before, for a file system's clock has ticks.
    let promote = |kernel: &str, made: u64| {
        let staged = write_image(&dir.path().join(".staging-1"), "shell", kernel.as_bytes());
        let disk = File::options().write(true).open(staged.join("disk.qcow2")).unwrap();
        disk.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(made)).unwrap();
        store.promote(&staged, "shell").unwrap()
    };
    let (first, second) = (promote("one", 1), promote("two", 2));
    overlay(&overlays.join("df-a.qcow2"), &first.disk);
    fs::write(overlays.join("no-overlay"), "").unwrap();
    let third = promote("three", 3);
    assert!(first.dir.exists() && second.dir.exists(), "three are kept");
    let fourth = promote("four", 4);
    assert!(first.dir.exists() && second.dir.exists(), "one of them is run from: {:?}", store.versions("shell"));
    fs::remove_file(overlays.join("df-a.qcow2")).unwrap();
    let fifth = promote("five", 5);
    assert!(!first.dir.exists() && !second.dir.exists());
    assert_eq!(store.versions("shell").unwrap()[0], version(&fifth));
    assert!(third.dir.exists() && fourth.dir.exists());
}

/// A version comes into use by its own name, once it was seen to boot.
#[test]
fn a_version_is_put_into_use_only_when_it_has_booted() {
    let (dir, store) = store();
    let first = promote(&store, b"one");
    let mut untested = write_image(&dir.path().join(".staging-2"), "shell", b"two");
    let text = fs::read_to_string(untested.join(MANIFEST_FILE)).unwrap();
    let manifest = Manifest { info: None, ..Manifest::parse(&text).unwrap() };
    fs::write(untested.join(MANIFEST_FILE), manifest.to_text()).unwrap();
    let kept = store.keep(&untested, "shell").unwrap();
    untested = kept.dir.clone();
    assert_eq!(store.get("shell").unwrap().dir, first.dir, "it is kept aside");
    let refused = store.promote_version(&version(&kept)).unwrap_err().to_string();
    assert!(refused.contains("was never boot-tested; run `dayfly image test shell@"), "{refused}");
    let info = first.manifest.info.clone().unwrap();
    store.learn(&kept, Learnt { info, contract: 1, can: Can::default() }).unwrap();
    assert_eq!(store.promote_version(&version(&kept)).unwrap().dir, untested);
    assert_eq!(store.get("shell").unwrap().dir, untested);
    assert!(matches!(store.promote_version("shell@00000000"), Err(ImageError::NoVersion { .. })));
    assert_eq!(store.roll_back("shell").unwrap().dir, first.dir);
}

/// One version goes by its own name, unless jobs get it or machines run from it.
#[test]
fn a_version_that_is_used_is_not_removed() {
    let (dir, store) = store();
    let overlays = dir.path().join("overlays");
    let store = store.keeping(2, &overlays);
    let [first, second] = [b"one", b"two"].map(|kernel| promote(&store, kernel));
    overlay(&overlays.join("df-a.qcow2"), &first.disk);
    let refused = |store: &ImageStore, image: &Image| store.remove_version(&version(image)).unwrap_err().to_string();
    assert!(refused(&store, &second).contains("it is the one that jobs get"));
    assert!(refused(&store, &first).contains("machines run from it"));
    fs::remove_file(overlays.join("df-a.qcow2")).unwrap();
    store.remove_version(&version(&first)).unwrap();
    assert!(!first.dir.exists() && second.dir.exists());
    assert!(refused(&store, &first).contains("no version"));
}

/// What lies there after a kill, of a change to this version.
type Kill = fn(&ImageStore, &Image);

/// Killed at whatever step of a change: the name leads to a whole image, and the next change removes what is left.
#[test]
fn a_change_that_was_killed_leaves_nothing_half_installed() {
    // Where each kind of change may have been killed: what of it lies there then.
    let kills: [(&str, Kill); 5] = [
        ("promote: the version has its name, and is not in use", |store, second| {
            std::os::unix::fs::symlink(version(second), store.directory.join(".going-shell")).unwrap();
        }),
        ("promote: the link was made, and not renamed", |store, _| {
            std::os::unix::fs::symlink("shell@gone", store.directory.join(".going-shell")).unwrap();
        }),
        ("remove: the version has another name", |store, second| {
            fs::rename(&second.dir, store.directory.join(format!(".going-{}", version(second)))).unwrap();
        }),
        ("remove: half of its files are gone", |store, second| {
            let going = store.directory.join(format!(".going-{}", version(second)));
            fs::rename(&second.dir, &going).unwrap();
            fs::remove_file(going.join("disk.qcow2")).unwrap();
        }),
        ("remove: of a name that was there as a directory", |store, _| {
            fs::create_dir(store.directory.join(".going-other")).unwrap();
        }),
    ];
    for (what, kill) in kills {
        let (_dir, store) = store();
        let first = promote(&store, b"one");
        let second = store.keep(&write_image(&store.directory.join(".staging-2"), "shell", b"two"), "shell").unwrap();
        kill(&store, &second);
        let found = store.get("shell").unwrap_or_else(|error| panic!("{what}: {error}"));
        store.verify(&found).unwrap();
        assert_eq!(found.dir, first.dir, "{what}");
        assert_eq!(store.list().unwrap().len(), 1, "{what}");
        for version in store.versions("shell").unwrap() {
            store.verify(&store.named(&version).unwrap()).unwrap();
        }
        let third = promote(&store, b"three");
        assert_eq!(store.get("shell").unwrap().dir, third.dir, "{what}");
        assert!(entries(&store).iter().all(|entry| !entry.starts_with(".going")), "{what}: {:?}", entries(&store));
    }
    // The name is gone, and its versions are not: what is left of them goes as well.
    let (_dir, store) = store();
    promote(&store, b"one");
    fs::remove_file(store.directory.join("shell")).unwrap();
    store.remove("shell").unwrap();
    assert_eq!(entries(&store), [".store.lock"]);
}

/// Two changes at once: one after the other, and each as if it were alone.
#[test]
fn two_changes_at_once_come_one_after_the_other() {
    let (_dir, store) = store();
    let kernels: Vec<String> = (0..6).map(|n| format!("kernel {n}")).collect();
    std::thread::scope(|scope| {
        for (n, kernel) in kernels.iter().enumerate() {
            let store = &store;
            scope.spawn(move || {
                let staged = write_image(&store.directory.join(format!(".staging-{n}")), "shell", kernel.as_bytes());
                store.promote(&staged, "shell").unwrap();
            });
        }
    });
    store.verify(&store.get("shell").unwrap()).unwrap();
    assert_eq!(store.versions("shell").unwrap().len(), VERSIONS_KEPT);
}
