//! Honest and hostile archives, and what is on the disk afterwards.

use super::*;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A folder for artifacts beside a file that must never change.
struct Scene {
    dir: tempfile::TempDir,
    folder: Folder,
}

impl Scene {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "untouched").unwrap();
        let folder = Folder::open(&dir.path().join("out"), limits).unwrap();
        Self { dir, folder }
    }

    fn unpack(&self, archive: Vec<u8>) -> Result<Unpacked, UnpackError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&archive).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        self.folder.unpack("job", file)
    }

    /// All that is on disk, relative to the scene, files with their content.
    fn listing(&self) -> Vec<String> {
        fn walk(path: &Path, shown: &Path, list: &mut Vec<String>) {
            let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap()).collect();
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let shown = shown.join(entry.file_name());
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    walk(&entry.path(), &shown, list);
                } else if kind.is_symlink() {
                    list.push(format!("{} -> {}", shown.display(), fs::read_link(entry.path()).unwrap().display()));
                } else if !entry.file_name().as_bytes().starts_with(b".") {
                    list.push(format!("{}={}", shown.display(), fs::read_to_string(entry.path()).unwrap()));
                }
            }
        }
        let mut list = Vec::new();
        walk(self.dir.path(), Path::new(""), &mut list);
        list
    }

    /// The archive is refused with these words, and nothing of it is anywhere.
    fn refuses(&self, archive: Vec<u8>, words: &str) {
        let error = self.unpack(archive).expect_err(words);
        assert_eq!(error.to_string(), words);
        assert_eq!(self.listing(), ["precious=untouched"], "{words}");
        assert!(
            fs::read_dir(self.dir.path().join("out")).unwrap().all(|e| !e
                .unwrap()
                .file_name()
                .as_bytes()
                .starts_with(b".new-")),
            "no leftovers: {words}"
        );
    }
}

fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated)
}

/// A zip of these files, by a writer that would also write hostile names.
fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
    for (name, content) in files {
        writer.start_file(*name, options()).unwrap();
        writer.write_all(content.as_bytes()).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// Sets the upper half of the external attributes (`st_mode`) of the `index`th entry.
fn with_mode(mut archive: Vec<u8>, index: usize, mode: u16) -> Vec<u8> {
    let at = entry_offsets(&archive)[index];
    archive[at + 40..at + 42].copy_from_slice(&mode.to_le_bytes());
    archive
}

fn entry_offsets(archive: &[u8]) -> Vec<usize> {
    (0..archive.len() - 4).filter(|at| archive[*at..*at + 4] == [0x50, 0x4b, 1, 2]).collect()
}

/// Position of the end record of an archive without a comment.
fn end(archive: &[u8]) -> usize {
    archive.len() - 22
}

#[test]
fn files_directories_and_modes_come_out() {
    let scene = Scene::new();
    let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
    writer.add_directory("out/", options()).unwrap();
    writer.start_file("out/run.sh", options().unix_permissions(0o4755)).unwrap();
    writer.write_all(b"#!/bin/sh\n").unwrap();
    writer.start_file("./stored.txt", options().compression_method(zip::CompressionMethod::Stored)).unwrap();
    writer.write_all(b"plain").unwrap();
    writer.start_file("deep/er/file", options().large_file(true)).unwrap();
    let unpacked = scene.unpack(writer.finish().unwrap().into_inner()).unwrap();
    assert_eq!(unpacked, Unpacked { files: 3, links: vec![] });
    assert_eq!(
        scene.listing(),
        ["out/job/deep/er/file=", "out/job/out/run.sh=#!/bin/sh\n", "out/job/stored.txt=plain", "precious=untouched"]
    );
    let mode = fs::metadata(scene.folder.job_directory("job").join("out/run.sh")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7111, 0o111, "executable, but never set-user-id");
}

/// T38: nothing leaves the folder by a path.
#[test]
fn paths_that_lead_out_are_refused_by_name() {
    let scene = Scene::new();
    for (name, what) in [
        ("../precious", "leads out of the folder"),
        ("a/../../../precious", "leads out of the folder"),
        ("a/..", "leads out of the folder"),
        ("/etc/passwd", "is an absolute path"),
        ("//server/share", "is an absolute path"),
        ("C:\\boot.ini", "is an absolute path"),
        ("\\boot.ini", "is an absolute path"),
        (".", "is no name for a file"),
        ("", "is no name for a file"),
    ] {
        scene.refuses(
            archive(&[("fine.txt", "x"), (name, "evil")]),
            &format!("the archive is refused: `{name}` {what}"),
        );
    }
    scene.refuses(archive(&[("a\0b", "x")]), "the archive is refused: `a\u{fffd}b` has a zero byte in its name");
    let deep = "d/".repeat(130) + "f";
    scene.refuses(archive(&[(&deep, "x")]), &format!("the archive is refused: `{}…` is too deep", &deep[..200]));
}

/// T38: nor by a device or a link.
#[test]
fn devices_are_refused_and_links_left_out() {
    let scene = Scene::new();
    let plain = || archive(&[("fine.txt", "x"), ("odd", "/etc/passwd")]);
    for mode in [0o020_666, 0o060_666, 0o010_666, 0o140_666] {
        scene.refuses(with_mode(plain(), 1, mode), "the archive is refused: `odd` is a device, pipe or socket");
    }
    let unpacked = scene.unpack(with_mode(plain(), 1, 0o120_777)).unwrap();
    assert_eq!(unpacked, Unpacked { files: 1, links: vec!["odd".into()] });
    assert_eq!(scene.listing(), ["out/job/fine.txt=x", "precious=untouched"]);
}

#[test]
fn a_link_does_not_help_a_later_entry_out() {
    let scene = Scene::new();
    let hostile = with_mode(archive(&[("out", ".."), ("out/precious", "evil")]), 0, 0o120_777);
    assert_eq!(scene.unpack(hostile).unwrap().links, ["out"]);
    assert_eq!(scene.listing(), ["out/job/out/precious=evil", "precious=untouched"]);
}

#[test]
fn names_that_collide_are_refused() {
    let scene = Scene::new();
    scene.refuses(archive(&[("a", "1"), ("./a", "2")]), "the archive is refused: `./a` stands in it twice");
    scene.refuses(
        archive(&[("a", "1"), ("a/b", "2")]),
        "the archive is refused: `a/b` is in a directory that is a file",
    );
    scene.refuses(archive(&[("a/b", "2"), ("a", "1")]), "the archive is refused: `a` is a file and a directory");
}

/// T38: sizes, entries and ratios are bounded.
#[test]
fn bombs_are_stopped_at_the_limits() {
    let small = Limits { entries: 3, directories: 3, bytes: 1000, ratio: 200, ratio_free_bytes: 100 };
    let text: String = (0..600).map(|n| char::from(b' ' + u8::try_from(n * 7 % 90).unwrap())).collect();
    let scene = Scene::with(small);
    scene.refuses(archive(&[("a", "1"), ("b", "1"), ("c", "1"), ("d", "1")]), "the archive has 4 entries, more than 3");
    scene.refuses(
        archive(&[("a", &text), ("b", &text)]),
        "the archive is refused: `b` and those before it make more than 1000 bytes",
    );
    let roomy = Scene::with(Limits { bytes: 1_000_000, ..small });
    roomy.refuses(
        archive(&[("a", "x"), ("zeros", &"0".repeat(500_000))]),
        "the archive is refused: `zeros` and those before it make more than 200 bytes of each byte packed",
    );
    assert_eq!(roomy.unpack(archive(&[("zeros", &"0".repeat(100))])).unwrap().files, 1, "small files may be regular");

    // A real one against the real limits: 64 MiB of zeroes in 64 KiB.
    let zeros = "\0".repeat(64 * 1024 * 1024);
    Scene::new().refuses(
        archive(&[("bomb", &zeros)]),
        "the archive is refused: `bomb` and those before it make more than 200 bytes of each byte packed",
    );
}

/// U30: directories that paths only imply are counted before one of them is made
#[test]
fn directories_that_paths_imply_are_counted_before_they_are_made() {
    let deep = |entry: usize| format!("{}f", format!("{entry}/").repeat(126));
    let paths: Vec<String> = (0..3000).map(deep).collect();
    let many: Vec<(&str, &str)> = paths.iter().map(|path| (path.as_str(), "")).collect();
    let bytes = archive(&many);
    assert!(bytes.len() < 4 << 20, "{} bytes", bytes.len());
    let scene = Scene::new();
    let error = scene.unpack(bytes).unwrap_err().to_string();
    assert!(error.ends_with("and those before it make more than 50000 directories"), "{error}");
    assert!(error.starts_with("the archive is refused: `396/396/"), "{error}");
    assert_eq!(fs::read_dir(scene.dir.path().join("out")).unwrap().count(), 2, "marker and .gitignore");

    // Directories that many files share are made once, and count once.
    let few = Scene::with(Limits { directories: 3, ..Limits::default() });
    let shared = archive(&[("a/b/1", "x"), ("a/b/2", "x"), ("a/c/3", "x"), ("a/", ""), ("4", "x")]);
    assert_eq!(few.unpack(shared).unwrap().files, 4);
    few.folder.clear("job").unwrap();
    few.refuses(
        archive(&[("a/b/1", "x"), ("c/d/2", "x")]),
        "the archive is refused: `c/d/2` and those before it make more than 3 directories",
    );
    few.refuses(
        archive(&[("a/", ""), ("b/", ""), ("c/", ""), ("d/", "")]),
        "the archive is refused: `d/` and those before it make more than 3 directories",
    );
}

/// U30: what an archive says that it unpacks to is refused before it is written
#[test]
fn an_archive_that_says_too_much_is_refused_before_it_is_unpacked() {
    let mut saying = archive(&[("a", "1"), ("b", "2")]);
    for at in entry_offsets(&saying) {
        saying[at + 24..at + 28].copy_from_slice(&(3_u32 << 30).to_le_bytes());
    }
    Scene::new().refuses(saying, "the archive is refused: `b` and those before it make more than 4294967296 bytes");
}

#[test]
fn sizes_are_counted_not_believed() {
    let scene = Scene::with(Limits { entries: 10, directories: 10, bytes: 1000, ratio: 200, ratio_free_bytes: 1000 });
    // The directory says 1 byte; 5000 come out.
    let mut lying = archive(&[("a", &"abc".repeat(2000))]);
    let at = entry_offsets(&lying)[0];
    lying[at + 24..at + 28].copy_from_slice(&1_u32.to_le_bytes());
    scene.refuses(lying, "the archive is refused: `a` and those before it make more than 1000 bytes");
    let mut longer = archive(&[("a", "abc")]);
    let at = entry_offsets(&longer)[0];
    longer[at + 24..at + 28].copy_from_slice(&4_u32.to_le_bytes());
    scene.refuses(longer, "the archive is refused: `a` is broken: length or checksum differ");
    let mut changed = archive(&[("a", "abc")]);
    let at = entry_offsets(&changed)[0];
    changed[at + 16] ^= 1;
    scene.refuses(changed, "the archive is refused: `a` is broken: length or checksum differ");
}

#[test]
fn packings_that_nobody_writes_are_refused() {
    let scene = Scene::new();
    let patched = |offset: usize, value: u16| {
        let mut archive = archive(&[("a", "abc")]);
        let at = entry_offsets(&archive)[0] + offset;
        archive[at..at + 2].copy_from_slice(&value.to_le_bytes());
        archive
    };
    scene.refuses(patched(8, 1), "the archive is refused: `a` is encrypted");
    scene.refuses(patched(10, 93), "the archive is refused: `a` is packed in an unknown way");
}

#[test]
fn what_is_no_zip_is_refused_without_trust_in_its_numbers() {
    let scene = Scene::new();
    let broken = |what: &str| format!("the archive is no sound zip: {what}");
    let good = || archive(&[("a", "abc")]);
    scene.refuses(Vec::new(), &broken("it is too short"));
    scene.refuses(vec![0; 100_000], &broken("it has no directory at its end"));
    scene.refuses([good(), vec![0]].concat(), &broken("it has no directory at its end"));
    let cut = good();
    scene.refuses(cut[..cut.len() - 1].to_vec(), &broken("it has no directory at its end"));

    let patch = |offset: usize, bytes: &[u8]| {
        let mut archive = good();
        let at = end(&archive) + offset;
        archive[at..at + bytes.len()].copy_from_slice(bytes);
        archive
    };
    scene.refuses(patch(8, &[2, 0, 2, 0]), &broken("its directory is cut short"));
    scene.refuses(patch(12, &[0xff, 0xff, 0xff, 0x7f]), &broken("its directory is not where it says"));
    scene.refuses(patch(16, &[1, 0, 0, 0]), &broken("its directory holds something else"));
    scene.refuses(patch(4, &[1, 0]), &broken("it is one of several"));
    scene.refuses(patch(8, &[0xfe, 0xff, 0xfe, 0xff]), &broken("its directory is cut short"));

    // A large end record that claims 2^60 entries: no memory is reserved for them.
    let mut huge = good();
    let at = end(&huge);
    let position = at as u64;
    let mut record = [END64.to_vec(), 44_u64.to_le_bytes().to_vec(), vec![45, 0, 45, 0], vec![0; 8]].concat();
    record.extend([1_u64 << 60, 1 << 60, 46, 0].iter().flat_map(|n| n.to_le_bytes()));
    record.extend([0x50, 0x4b, 6, 7, 0, 0, 0, 0]);
    record.extend(position.to_le_bytes());
    record.extend([1, 0, 0, 0]);
    huge.splice(at..at, record);
    let at = end(&huge);
    huge[at + 8..at + 20].fill(0xff);
    scene.refuses(huge, "the archive has 1152921504606846976 entries, more than 100000");
}

const END64: [u8; 4] = [0x50, 0x4b, 6, 6];

#[test]
fn any_damage_is_an_error_or_harmless() {
    let good = archive(&[("dir/a", "some text, some text, some text"), ("b", "other")]);
    for at in 0..good.len() {
        for value in [0, 0xff, good[at] ^ 0x2f] {
            let mut damaged = good.clone();
            damaged[at] = value;
            let scene = Scene::new();
            let _ = scene.unpack(damaged);
            let outside: Vec<String> =
                scene.listing().into_iter().filter(|line| !line.starts_with("out/job/")).collect();
            assert_eq!(outside, ["precious=untouched"], "byte {at} = {value:#x}");
        }
    }
}

#[test]
fn the_last_run_is_replaced_and_links_in_its_place_are_not_followed() {
    let scene = Scene::new();
    scene.unpack(archive(&[("old", "1")])).unwrap();
    scene.folder.clear("job").unwrap();
    scene.unpack(archive(&[("new", "2")])).unwrap();
    assert_eq!(scene.listing(), ["out/job/new=2", "precious=untouched"]);

    scene.folder.clear("job").unwrap();
    let elsewhere = scene.dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("theirs"), "kept").unwrap();
    symlink(&elsewhere, scene.folder.job_directory("job")).unwrap();
    scene.folder.clear("job").unwrap();
    scene.unpack(archive(&[("theirs", "3")])).unwrap();
    assert_eq!(scene.listing(), ["elsewhere/theirs=kept", "out/job/theirs=3", "precious=untouched"]);
}

#[test]
fn only_a_folder_of_our_own_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    let error = Folder::open(dir.path(), Limits::default()).unwrap_err();
    assert!(matches!(error, UnpackError::Foreign(_)), "{error}");
    let empty = dir.path().join("src");
    Folder::open(&empty, Limits::default()).unwrap();
    assert!(Folder::open(&empty, Limits::default()).is_ok(), "one of ours is taken again");
    symlink(&empty, dir.path().join("link")).unwrap();
    let linked = Folder::open(&dir.path().join("link"), Limits::default()).unwrap();
    assert_eq!(linked.job_directory("x"), empty.canonicalize().unwrap().join("x"));
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(Folder::open(&dir.path().join("file"), Limits::default()), Err(UnpackError::Folder { .. })));
}

#[test]
fn names_of_jobs_become_harmless() {
    assert_eq!(file_name(".."), "_..");
    assert_eq!(file_name(""), "_");
}
