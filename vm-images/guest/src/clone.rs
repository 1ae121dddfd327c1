//! What the host has of the job's repository, where git finds it: disks that are only read, and a repository on memory
//! whose packs are theirs.
//!
//! ```text
//! /run/dayfly/clone/objects/pack/pack-….pack → ../../disks/0/pack/pack-….pack
//!                   packed-refs                what git tells a server that it has
//!                   disks/0, 1, …, slot        the disks, mounted read-only
//! ```
//!
//! The refs of a disk need packs that may be on other disks. A repository that says that it has what is not there would
//! break a job's clone, so they are taken all or not at all: whatever is missing, late or of another size costs the job
//! time, for it fetches that by itself. A later list takes the place of an earlier one only when it is whole.

use crate::apply::wait_for;
use crate::console::say;
use dayfly_guest_config::{CLONE_DIR, CLONE_PACKS, CLONE_REFS, CLONE_SLOT_SERIAL, GuestClone, clone_serial};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The disks' driver is in the initrd, so they are there before us.
const DISK_DEADLINE: Duration = Duration::from_secs(2);

/// Between two looks at the disk that may be written yet: most come within seconds.
const SLOT_PERIOD: Duration = Duration::from_millis(100);
const SLOT_PERIOD_LATER: Duration = Duration::from_secs(2);
const SLOT_LATER: Duration = Duration::from_secs(30);

/// How long it is looked at: longer than a machine waits for its job.
const SLOT_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// Bytes of a list of packs, or of refs, at most. Ours are far smaller.
const LIST_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Where the magic number of an ext file system stands, and what it is: until that is there nothing else matters.
const MAGIC_AT: usize = 1080;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// Makes the repository, and puts into it what there is. The disk that is written later is waited for on a thread of its
/// own. Nothing of this fails a job: what goes wrong is said on the console.
pub fn prepare(clone: &GuestClone) {
    let root = Path::new(CLONE_DIR);
    if let Err(error) = make(root) {
        return say(&format!("make {CLONE_DIR}: {error}"));
    }
    let mut mounted = Vec::new();
    for n in 0..clone.disks {
        let serial = clone_serial(n);
        match wait_for(DISK_DEADLINE, || find(Path::new("/sys/block"), &serial))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
            .and_then(|device| mount_at(&device, root, &n.to_string()))
        {
            Ok(directory) => mounted.push(directory),
            Err(error) => say(&format!("mount disk {serial}: {error}")),
        }
    }
    // The first of them lists what all together hold.
    if let Some(first) = mounted.first()
        && let Err(error) = take(root, first, &mounted)
    {
        say(&format!("use the clone on disk 0: {error}"));
    }
    if clone.slot {
        let started = thread::Builder::new().name("clone".into()).spawn(move || wait_for_slot(root, mounted));
        if let Err(error) = started {
            say(&format!("start a thread: {error}"));
        }
    }
}

/// The repository, empty.
fn make(root: &Path) -> io::Result<()> {
    for directory in ["objects/pack", "objects/info", "refs", "disks"] {
        fs::create_dir_all(root.join(directory))?;
    }
    // Of a branch that nobody has: git reads refs only of what has a HEAD.
    fs::write(root.join("HEAD"), "ref: refs/heads/none\n")
}

#[expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "no async runtime in the guest")]
fn wait_for_slot(root: &Path, mut mounted: Vec<PathBuf>) {
    let begun = std::time::Instant::now();
    let Some(device) = wait_for(DISK_DEADLINE, || find(Path::new("/sys/block"), CLONE_SLOT_SERIAL)) else {
        return say(&format!("find disk {CLONE_SLOT_SERIAL}"));
    };
    while begun.elapsed() < SLOT_DEADLINE {
        if is_written(&device) {
            let taken = mount_at(&device, root, "slot").and_then(|directory| {
                mounted.push(directory.clone());
                take(root, &directory, &mounted)
            });
            if let Err(error) = taken {
                say(&format!("use the clone that has just come: {error}"));
            }
            return;
        }
        thread::sleep(if begun.elapsed() < SLOT_LATER { SLOT_PERIOD } else { SLOT_PERIOD_LATER });
    }
}

/// The device of the disk with this serial number; `sys` is `/sys/block`.
fn find(sys: &Path, serial: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(sys).ok()?.filter_map(|entry| Some(entry.ok()?.file_name()));
    let is_it = |name: &std::ffi::OsString| {
        fs::read_to_string(sys.join(name).join("serial")).is_ok_and(|text| text.trim_end() == serial)
    };
    entries.into_iter().find(is_it).map(|name| Path::new("/dev").join(name))
}

/// Whether there is a file system. The kernel forgets what it has read of a device when the last who had it open has gone,
/// so this reads it anew each time.
fn is_written(device: &Path) -> bool {
    let mut head = Vec::new();
    let read = fs::File::open(device).and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && head.get(MAGIC_AT..MAGIC_AT + 2) == Some(&MAGIC)
}

fn mount_at(device: &Path, root: &Path, name: &str) -> io::Result<PathBuf> {
    let directory = root.join("disks").join(name);
    fs::create_dir_all(&directory)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(device, &directory, "ext4", flags, None)?;
    Ok(directory)
}

/// Puts the packs into the repository that `listing` needs, if all of them are on these disks, and then its refs.
fn take(root: &Path, listing: &Path, disks: &[PathBuf]) -> io::Result<()> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let text = read(&listing.join(CLONE_PACKS))?;
    let refs = read(&listing.join(CLONE_REFS))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let pack = line.split_once(' ').and_then(|(name, bytes)| Some((name, bytes.parse::<u64>().ok()?)));
        let (name, bytes) = pack.ok_or_else(|| invalid(format!("`{line}` is no pack")))?;
        let is_there = |disk: &&PathBuf| {
            let file = |suffix: &str| fs::metadata(disk.join("pack").join(format!("{name}.{suffix}")));
            file("pack").is_ok_and(|meta| meta.len() == bytes) && file("idx").is_ok_and(|meta| meta.len() > 0)
        };
        let disk = disks.iter().find(is_there).ok_or_else(|| invalid(format!("{name} is on no disk")))?;
        found.push((name, disk));
    }
    let packs = root.join("objects/pack");
    for (name, disk) in found {
        for suffix in ["pack", "idx"] {
            let file = format!("{name}.{suffix}");
            match symlink(disk.join("pack").join(&file), packs.join(&file)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
    }
    // Git says that it has these from now on, so they come last, and at once.
    let new = root.join("packed-refs.new");
    fs::write(&new, refs)?;
    fs::rename(new, root.join("packed-refs"))
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(LIST_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(dir: &Path, name: &str, packs: &[(&str, usize)], list: &str, refs: &str) -> PathBuf {
        let disk = dir.join(name);
        fs::create_dir_all(disk.join("pack")).unwrap();
        for (pack, bytes) in packs {
            fs::write(disk.join(format!("pack/{pack}.pack")), vec![1; *bytes]).unwrap();
            fs::write(disk.join(format!("pack/{pack}.idx")), "idx").unwrap();
        }
        fs::write(disk.join(CLONE_PACKS), list).unwrap();
        fs::write(disk.join(CLONE_REFS), refs).unwrap();
        disk
    }

    fn look(root: &Path) -> (Vec<String>, Option<String>) {
        let mut names: Vec<String> = fs::read_dir(root.join("objects/pack"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        (names, fs::read_to_string(root.join("packed-refs")).ok())
    }

    #[test]
    fn packs_of_all_disks_are_one_repository() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("clone");
        make(&root).unwrap();
        let first = disk(dir.path(), "0", &[("pack-a", 3)], "pack-a 3\npack-b 5\n", "refs of 0\n");
        let second = disk(dir.path(), "1", &[("pack-b", 5)], "", "");
        take(&root, &first, &[first.clone(), second.clone()]).unwrap();
        let names = ["pack-a.idx", "pack-a.pack", "pack-b.idx", "pack-b.pack"].map(str::to_owned).to_vec();
        assert_eq!(look(&root), (names, Some("refs of 0\n".into())));
        assert_eq!(fs::read(root.join("objects/pack/pack-b.pack")).unwrap().len(), 5);
        // What comes later needs some of what is there.
        let slot = disk(dir.path(), "slot", &[("pack-c", 7)], "pack-c 7\npack-b 5\n", "refs of slot\n");
        take(&root, &slot, &[first, second, slot.clone()]).unwrap();
        let (names, refs) = look(&root);
        assert_eq!((names.len(), refs.as_deref()), (6, Some("refs of slot\n")));
    }

    /// Git would tell the server that it has what is not there.
    #[test]
    fn a_list_that_is_not_whole_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("clone");
        make(&root).unwrap();
        for (n, list) in ["pack-a 3\npack-b 5\n", "pack-a 4\n", "pack-a\n", "pack-a x\n"].iter().enumerate() {
            let disk = disk(dir.path(), &n.to_string(), &[("pack-a", 3)], list, "refs\n");
            assert!(take(&root, &disk, std::slice::from_ref(&disk)).is_err(), "{list}");
            assert_eq!(look(&root), (Vec::new(), None), "{list}");
        }
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(take(&root, &dir.path().join("empty"), &[]).is_err());
    }

    #[test]
    fn a_disk_is_found_by_its_number_and_is_written_once_it_has_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", ""), ("vdb", "dayfly-clone-1\n"), ("vdc", "dayfly-clone-0")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
        }
        assert_eq!(find(dir.path(), &clone_serial(0)), Some("/dev/vdc".into()));
        assert_eq!(find(dir.path(), &clone_serial(1)), Some("/dev/vdb".into()));
        assert_eq!(find(dir.path(), CLONE_SLOT_SERIAL), None);
        assert!(CLONE_SLOT_SERIAL.len() <= 20 && clone_serial(99).len() <= 20, "as much as a disk has");
        let device = dir.path().join("device");
        let mut bytes = vec![0; 8192];
        fs::write(&device, &bytes).unwrap();
        assert!(!is_written(&device) && !is_written(&dir.path().join("none")));
        bytes[1080..1082].copy_from_slice(&MAGIC);
        fs::write(&device, &bytes).unwrap();
        assert!(is_written(&device));
    }
}
