//! The initial RAM disk: a static `/init`, the modules that the root disk needs, and nothing else.
//!
//! Written by ourselves as a cpio archive in the "newc" form (kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`): 1.5 MB instead of Debian's 15 MB is
//! 3 to 8 s of a boot under TCG, and device nodes need no root this way.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const TEXT: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive in the making.
struct Cpio {
    bytes: Vec<u8>,
    files: u32,
}

impl Cpio {
    fn new() -> Self {
        Self { bytes: Vec::new(), files: 0 }
    }

    /// One entry: 13 fields of 8 hex digits after the magic, the name with a NUL, the content, each
    /// padded to 4 bytes.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        self.files += 1;
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other("longer than cpio allows"))?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| io::Error::other("longer than cpio allows"))?;
        // inode, mode, uid, gid, links, mtime, size, device of the file system, device, name size, checksum
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> io::Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

/// The whole archive: `init` becomes `/init`, `modules` (files, in load order) go below `/modules.d`.
pub(super) fn make(init: &Path, modules: &[PathBuf]) -> io::Result<Vec<u8>> {
    let mut cpio = Cpio::new();
    for directory in ["dev", "proc", "root", "modules.d"] {
        cpio.add(directory, DIRECTORY, (0, 0), &[])?;
    }
    // The kernel opens /dev/console as the descriptors of /init, before anything is mounted.
    cpio.add("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
    cpio.add("dev/null", CHARACTER_DEVICE, (1, 3), &[])?;
    let mut list = String::new();
    for module in modules {
        let name = module
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| io::Error::other("module without a name"))?;
        let path = format!("modules.d/{name}");
        cpio.add(&path, TEXT, (0, 0), &fs::read(module)?)?;
        list.push_str(&format!("/{path}\n"));
    }
    cpio.add("modules", TEXT, (0, 0), list.as_bytes())?;
    cpio.add("init", PROGRAM, (0, 0), &fs::read(init)?)?;
    cpio.finish()
}

/// Finds each module (by its name, as `.ko` or compressed) below `tree`; those that this kernel has inside are left out.
///
/// The name of one that is missing comes back as the error.
pub(super) fn find_modules(tree: &Path, names: &[String]) -> io::Result<Result<Vec<PathBuf>, String>> {
    let mut files = Vec::new();
    walk(tree, &mut files)?;
    files.sort();
    // The kernel's own list of what is no module in it: `kernel/drivers/virtio/virtio_ring.ko`, a line each.
    let mut inside = BTreeSet::new();
    for list in files.iter().filter(|file| file.ends_with("modules.builtin")) {
        let text = fs::read_to_string(list)?;
        inside.extend(text.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko")).map(str::to_owned));
    }
    let find = |name: &String| {
        let is_it = |file: &&PathBuf| {
            let file = file.file_name().and_then(|file| file.to_str()).unwrap_or_default();
            file.strip_prefix(name.as_str()).is_some_and(|rest| [".ko", ".ko.xz", ".ko.zst"].contains(&rest))
        };
        files.iter().find(is_it).cloned().ok_or_else(|| name.clone())
    };
    Ok(names.iter().filter(|name| !inside.contains(*name)).map(find).collect())
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // Links (`build`, `source`) lead out of the package.
        match entry.file_type()? {
            kind if kind.is_dir() => walk(&entry.path(), files)?,
            kind if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_the_kernel_documents() {
        let mut cpio = Cpio::new();
        cpio.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]).unwrap();
        cpio.add("a", TEXT, (0, 0), b"hello").unwrap();
        let bytes = cpio.finish().unwrap();
        let first = "07070100000001000021800000000000000000000000010000000000000000000000000000000000000005000000010000000c00000000dev/console\0";
        let second = "07070100000002000081a400000000000000000000000100000000000000050000000000000000000000000000000000000002\
                      00000000a\0hello\0\0\0";
        assert_eq!(&bytes[..first.len()], first.as_bytes());
        assert_eq!(first.len() % 4, 2);
        assert_eq!(&bytes[first.len() + 2..first.len() + 2 + second.len()], second.as_bytes());
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0") && bytes.len().is_multiple_of(4));
    }

    #[test]
    fn modules_are_found_in_load_order_whatever_their_packing() {
        let tree = tempfile::tempdir().unwrap();
        let dir = tree.path().join("6.1/kernel/drivers");
        fs::create_dir_all(&dir).unwrap();
        for file in ["virtio.ko", "virtio_ring.ko.xz", "virtio_net.ko", "virtio.ko.sig"] {
            fs::write(dir.join(file), file).unwrap();
        }
        std::os::unix::fs::symlink("/", tree.path().join("6.1/source")).unwrap();
        let names = ["virtio_ring".to_owned(), "virtio".to_owned()];
        let found = find_modules(tree.path(), &names).unwrap().unwrap();
        assert_eq!(found, [dir.join("virtio_ring.ko.xz"), dir.join("virtio.ko")]);
        assert_eq!(find_modules(tree.path(), &["virtio_blk".to_owned()]).unwrap(), Err("virtio_blk".to_owned()));

        fs::write(tree.path().join("6.1/modules.builtin"), "kernel/block/virtio_blk.ko\nkernel/virtio.ko\n").unwrap();
        let names = ["virtio_ring".to_owned(), "virtio_blk".to_owned()];
        let with_inside = find_modules(tree.path(), &names).unwrap().unwrap();
        assert_eq!(with_inside, [dir.join("virtio_ring.ko.xz")], "a newer kernel has it inside");

        let init = tree.path().join("init");
        fs::write(&init, "#!").unwrap();
        let archive = make(&init, &found).unwrap();
        let list = b"/modules.d/virtio_ring.ko.xz\n/modules.d/virtio.ko\n";
        assert!(archive.windows(list.len()).any(|window| window == list));
    }
}
