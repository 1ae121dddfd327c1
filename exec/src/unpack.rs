//! Artifacts of a job onto the developer's disk, so that nothing leaves the folder (threats.md T38).
//!
//! A guest made the archive and may be hostile. Everything is judged before anything is written:
//! absolute paths, `..`, devices, odd packings and names that stand twice refuse the archive as a
//! whole, each by name, for no honest runner writes them. Links are left out, and named. All that would be made is
//! counted first, directories that a path only implies too (3,000 paths of 126 components are 378,000 of them, from
//! an archive of a mebibyte). Then it is
//! unpacked into a fresh directory of ours, where no path component can be anybody's link, with
//! limits on what really comes out; at the end that directory takes the place of the job's last one.
//!
//! Only a folder that `exec` made (it holds `.dayfly-artifacts`) is written to: what lies there is ours.
//! All of it blocks; `run` calls it on a blocking thread.

use super::archive::{Archive, ArchiveError, Entry, Kind, Method};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

/// Says that the folder is one of `exec`'s.
const MARKER: &str = ".dayfly-artifacts";
/// Entries of one archive at most.
const ENTRIES_MAX: u64 = 100_000;
/// Directories that one archive makes at most, each a block of 4 KiB. A `node_modules` of 100,000 files has 12,000.
const DIRECTORIES_MAX: u64 = 50_000;
/// Unpacked bytes of one archive at most.
const BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Unpacked bytes per packed byte at most. Deflate can do 1032; text does 3 to 20.
const RATIO_MAX: u64 = 200;
/// Bytes that come out before the ratio counts: an empty disk image or log may be as regular as it
/// likes while it is small.
const RATIO_FREE_BYTES: u64 = 16 * 1024 * 1024;
/// Components of one path at most; paths end at 4096 bytes anyway.
const DEPTH_MAX: usize = 128;

/// The limits, so that tests can use small ones.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries of one archive.
    pub entries: u64,
    /// Directories of one archive, those that its paths imply too.
    pub directories: u64,
    /// Unpacked bytes of one archive.
    pub bytes: u64,
    /// Unpacked bytes per packed byte.
    pub ratio: u64,
    /// Bytes before the ratio counts.
    pub ratio_free_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: ENTRIES_MAX,
            directories: DIRECTORIES_MAX,
            bytes: BYTES_MAX,
            ratio: RATIO_MAX,
            ratio_free_bytes: RATIO_FREE_BYTES,
        }
    }
}

/// Why artifacts were not put down. Nothing of the archive is left then.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The folder cannot be used.
    #[error("use `{}` for artifacts", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The folder has other things in it.
    #[error("`{}` is not empty and was not made by dayfly exec; name another folder with --artifacts", .0.display())]
    Foreign(PathBuf),
    /// The archive as such.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// One entry, by name.
    #[error("the archive is refused: `{}` {what}", clean(name))]
    Refused {
        /// The entry's name.
        name: Vec<u8>,
        /// What is wrong with it.
        what: &'static str,
    },
    /// More comes out of the archive than may.
    #[error("the archive is refused: `{}` and those before it make {what}", clean(name))]
    TooLarge {
        /// The entry's name.
        name: Vec<u8>,
        /// Which limit.
        what: String,
    },
    /// Writing failed.
    #[error("write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A name of the guest's for a message: no control characters, not endless.
pub(super) fn clean(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let mut shown: String = name.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if name.chars().nth(200).is_some() {
        shown.push('…');
    }
    shown
}

/// The folder for artifacts, one directory below it per job.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    pub(super) limits: Limits,
}

/// What was put down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files written.
    pub files: u64,
    /// Names of links, which were left out.
    pub links: Vec<String>,
}

impl Folder {
    /// Makes the folder, or takes one of `exec`'s again.
    ///
    /// # Errors
    /// [`UnpackError::Foreign`], [`UnpackError::Folder`].
    pub fn open(path: &Path, limits: Limits) -> Result<Self, UnpackError> {
        let unusable = |source| UnpackError::Folder { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(unusable)?;
        // The folder itself may be a link of the developer's; from here on it is the real one.
        let real = path.canonicalize().map_err(unusable)?;
        let marker = real.join(MARKER);
        let is_ours = marker.symlink_metadata().is_ok_and(|m| m.is_file());
        if !is_ours {
            if fs::read_dir(&real).map_err(unusable)?.next().is_some() {
                return Err(UnpackError::Foreign(path.to_owned()));
            }
            let write = |path: &Path, text: &str| create(path, false)?.write_all(text.as_bytes());
            write(&marker, "Made by dayfly exec, which replaces what is in this folder.\n").map_err(unusable)?;
            // Artifacts are nobody's change to the repository.
            write(&real.join(".gitignore"), "*\n").map_err(unusable)?;
        }
        Ok(Self { path: real, limits })
    }

    /// Where the files of `job` are, or will be.
    #[must_use]
    pub fn job_directory(&self, job: &str) -> PathBuf {
        self.path.join(file_name(job))
    }

    /// Where the reports of `job` are, or will be.
    #[must_use]
    pub fn reports_directory(&self, job: &str) -> PathBuf {
        self.path.join(format!("{}.reports", file_name(job)))
    }

    /// Removes what an earlier run of `job` left.
    ///
    /// # Errors
    /// [`UnpackError::Write`].
    pub fn clear(&self, job: &str) -> Result<(), UnpackError> {
        remove(&self.job_directory(job))?;
        remove(&self.reports_directory(job))
    }

    /// Unpacks the job's archive into its directory, which must have been cleared.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing of the archive is on disk then.
    pub fn unpack(&self, job: &str, archive: fs::File) -> Result<Unpacked, UnpackError> {
        let archive = Archive::open(archive, self.limits.entries)?;
        let judged = judge(&archive, self.limits)?;
        let target = self.job_directory(job);
        let staging = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.path)
            .map_err(|source| UnpackError::Folder { path: self.path.clone(), source })?;
        let root = staging.path().join("files");
        let mut unpacked = Unpacked { files: 0, links: judged.links };
        make_directory(&root)?;
        let mut budget = Budget { limits: self.limits, packed: 0, bytes: 0 };
        for (entry, path) in judged.entries {
            let path = root.join(path);
            match entry.kind {
                Kind::Directory => make_directories(&path)?,
                Kind::File { executable } => {
                    path.parent().map_or(Ok(()), make_directories)?;
                    write_entry(&archive, entry, &path, executable, &mut budget)?;
                    unpacked.files += 1;
                }
                Kind::Link | Kind::Special => {}
            }
        }
        fs::rename(&root, &target).map_err(|source| UnpackError::Write { path: target, source })?;
        Ok(unpacked)
    }
}

/// One harmless path component that resembles `name`.
pub(super) fn file_name(name: &str) -> String {
    let mut safe: String = name
        .chars()
        .take(100)
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
        .collect();
    if safe.starts_with('.') {
        safe.insert(0, '_');
    }
    if safe.is_empty() { "_".into() } else { safe }
}

/// An archive that may be unpacked.
struct Judged<'a> {
    /// Files and directories, and where they go.
    entries: Vec<(&'a Entry, PathBuf)>,
    /// Names of links, which are left out.
    links: Vec<String>,
}

/// Judges each entry, before anything is written.
fn judge(archive: &Archive, limits: Limits) -> Result<Judged<'_>, UnpackError> {
    let mut plan = Vec::new();
    let mut links = Vec::new();
    let mut tree = Tree::new(limits.directories);
    let mut announced: u64 = 0;
    for entry in &archive.entries {
        let refuse = |what| Err(UnpackError::Refused { name: entry.name.clone(), what });
        let too_large = |what| Err(UnpackError::TooLarge { name: entry.name.clone(), what });
        let path = match relative_path(&entry.name) {
            Ok(path) => path,
            Err(what) => return refuse(what),
        };
        let is_file = match entry.kind {
            Kind::Special => return refuse("is a device, pipe or socket"),
            Kind::Link => {
                links.push(clean(&entry.name));
                continue;
            }
            Kind::File { .. } if path.as_os_str().is_empty() => return refuse("is no name for a file"),
            Kind::File { .. } if entry.encrypted => return refuse("is encrypted"),
            Kind::File { .. } if matches!(entry.method, Method::Other(_)) => {
                return refuse("is packed in an unknown way");
            }
            Kind::File { .. } => true,
            Kind::Directory => false,
        };
        match tree.add(&path, is_file) {
            Ok(()) => {}
            Err(Clash::Refused(what)) => return refuse(what),
            Err(Clash::TooMany) => return too_large(format!("more than {} directories", limits.directories)),
        }
        // What comes out is counted again while it is written: this is what the archive says itself.
        announced = announced.saturating_add(if is_file { entry.bytes } else { 0 });
        if announced > limits.bytes {
            return too_large(format!("more than {} bytes", limits.bytes));
        }
        plan.push((entry, path));
    }
    Ok(Judged { entries: plan, links })
}

/// The path below the job's directory.
fn relative_path(name: &[u8]) -> Result<PathBuf, &'static str> {
    if name.contains(&0) {
        return Err("has a zero byte in its name");
    }
    // Not for Unix, but nobody's honest file either, and the folder may be shared.
    if name.starts_with(b"\\") || name.get(1..3) == Some(b":\\") {
        return Err("is an absolute path");
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("leads out of the folder"),
            Component::RootDir | Component::Prefix(_) => return Err("is an absolute path"),
        }
        depth += 1;
        if depth > DEPTH_MAX {
            return Err("is too deep");
        }
    }
    Ok(path)
}

/// What the archive's paths make together: each component is looked at once for each path, however they resemble
/// each other.
struct Tree {
    nodes: Vec<Made>,
    directories: u64,
    directories_max: u64,
}

/// A file or directory that will be made.
#[derive(Default)]
struct Made {
    is_file: bool,
    children: BTreeMap<OsString, usize>,
}

/// Why a path does not fit to those before it.
enum Clash {
    Refused(&'static str),
    TooMany,
}

impl Tree {
    fn new(directories_max: u64) -> Self {
        Self { nodes: vec![Made::default()], directories: 0, directories_max }
    }

    fn add(&mut self, path: &Path, is_file: bool) -> Result<(), Clash> {
        let mut at = 0;
        let mut parts = path.iter().peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            let Some(node) = self.nodes.get(at) else { return Ok(()) };
            match node.children.get(part).map(|child| (*child, self.nodes.get(*child).is_some_and(|n| n.is_file))) {
                Some((_, true)) if last && is_file => return Err(Clash::Refused("stands in it twice")),
                Some((_, true)) => return Err(Clash::Refused("is in a directory that is a file")),
                Some((_, false)) if last && is_file => return Err(Clash::Refused("is a file and a directory")),
                Some((child, false)) => at = child,
                None => {
                    let made = Made { is_file: last && is_file, children: BTreeMap::new() };
                    self.directories += u64::from(!made.is_file);
                    if self.directories > self.directories_max {
                        return Err(Clash::TooMany);
                    }
                    let child = self.nodes.len();
                    self.nodes.push(made);
                    if let Some(node) = self.nodes.get_mut(at) {
                        node.children.insert(part.to_owned(), child);
                    }
                    at = child;
                }
            }
        }
        Ok(())
    }
}

/// What has come out so far.
pub(super) struct Budget {
    pub(super) limits: Limits,
    pub(super) packed: u64,
    pub(super) bytes: u64,
}

impl Budget {
    /// `None` if `bytes` more, out of an archive of which `packed` bytes have been used, may come.
    pub(super) fn exceeded(&self, packed: u64, bytes: u64) -> Option<String> {
        let (packed, bytes) = (self.packed.saturating_add(packed), self.bytes.saturating_add(bytes));
        if bytes > self.limits.bytes {
            return Some(format!("more than {} bytes", self.limits.bytes));
        }
        let is_bomb = bytes > self.limits.ratio_free_bytes && bytes > packed.saturating_mul(self.limits.ratio);
        is_bomb.then(|| format!("more than {} bytes of each byte packed", self.limits.ratio))
    }
}

fn write_entry(
    archive: &Archive,
    entry: &Entry,
    path: &Path,
    executable: bool,
    budget: &mut Budget,
) -> Result<(), UnpackError> {
    let unwritable = |source| UnpackError::Write { path: path.to_owned(), source };
    let refuse = |what| UnpackError::Refused { name: entry.name.clone(), what };
    let mut content = archive.content(entry)?;
    let mut file = create(path, executable).map_err(unwritable)?;
    let mut checksum = crc32fast::Hasher::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut bytes: u64 = 0;
    loop {
        let count = content.read(&mut buffer).map_err(|_| refuse("cannot be unpacked: its data is broken"))?;
        let chunk = buffer.get(..count).unwrap_or_default();
        if chunk.is_empty() {
            break;
        }
        bytes += chunk.len() as u64;
        if let Some(what) = budget.exceeded(entry.packed_bytes, bytes) {
            return Err(UnpackError::TooLarge { name: entry.name.clone(), what });
        }
        checksum.update(chunk);
        file.write_all(chunk).map_err(unwritable)?;
    }
    if bytes != entry.bytes || checksum.finalize() != entry.crc32 {
        return Err(refuse("is broken: length or checksum differ"));
    }
    budget.packed = budget.packed.saturating_add(entry.packed_bytes);
    budget.bytes = budget.bytes.saturating_add(bytes);
    Ok(())
}

/// A new file, never an existing one and never through a link.
pub(super) fn create(path: &Path, executable: bool) -> io::Result<fs::File> {
    let mode = if executable { 0o755 } else { 0o644 };
    fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)
}

fn make_directory(path: &Path) -> Result<(), UnpackError> {
    fs::create_dir(path).map_err(|source| UnpackError::Write { path: path.to_owned(), source })
}

pub(super) fn make_directories(path: &Path) -> Result<(), UnpackError> {
    fs::create_dir_all(path).map_err(|source| UnpackError::Write { path: path.to_owned(), source })
}

/// Removes a file, a link (not what it points to) or a directory; none is fine.
pub(super) fn remove(path: &Path) -> Result<(), UnpackError> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(UnpackError::Write { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
