//! How bytes get to disk for good: journal, spool and runtime files go through this seam.
//!
//! Stateless and by path, so that a fake can fail the N-th call and a simulation can keep all of
//! it in memory. Each call is whole: a future that is dropped may still take effect.
//! Real calls run on blocking threads; the async runtime never waits for a disk.

use crate::BoxFuture;
use std::io;
use std::path::{Path, PathBuf};

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its last path component. Names that are no UTF-8 are left out of listings.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// The file layer. All files are made with mode 0600, all directories with 0700.
pub trait Files: Send + Sync + 'static {
    /// Reads a whole file of at most `bytes_max` bytes; a longer one is `InvalidData`.
    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>>;
    /// Reads up to `bytes` bytes from `offset`; fewer at the end of the file.
    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>>;
    /// Replaces a file atomically and durably: write beside it, fsync, rename, fsync the directory.
    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>>;
    /// Writes `bytes` at `offset`, where the file must end (it is made if missing and `offset` is
    /// 0); anything beyond `offset` is cut off first. Not durable before [`Files::sync`].
    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: bytes::Bytes) -> BoxFuture<'a, io::Result<()>>;
    /// fsync of one file.
    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Length in bytes; `None` if there is no such file.
    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>>;
    /// Makes a directory and its parents, and fsyncs the parent; one that exists is fine.
    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// [`Files::create_dir`] and [`Files::replace`] of a file in it, durable like both, with fewer waits for the disk
    /// where the order of the fsyncs is ours to choose.
    fn replace_in_new_dir<'a>(&'a self, dir: &'a Path, name: &'a str, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.create_dir(dir).await?;
            self.replace(&child(dir, name), bytes).await
        })
    }
    /// Removes a file, or a directory with all in it, and fsyncs the parent; none is fine.
    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Renames, and fsyncs both parents.
    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Entries of a directory, sorted by name; empty if there is no such directory.
    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>>;
    /// Bytes that an unprivileged user may still write on the file system that holds `path`;
    /// `ReadOnlyFilesystem` if nobody may.
    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>>;
}

/// The host's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealFiles;

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn sync_dir(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))
}

fn make_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn write_replacing(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    let dir = parent(path)?;
    // A temporary file of mode 0600 in the same directory, removed if we fail.
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_dir(dir)
}

impl Files for RealFiles {
    fn replace_in_new_dir<'a>(&'a self, dir: &'a Path, name: &'a str, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        let (dir, path) = (dir.to_owned(), child(dir, name));
        Box::pin(blocking(move || {
            make_dir(&dir)?;
            write_replacing(&path, &bytes)?;
            // Last: a journalling file system has committed this with the above, and waits no third time.
            sync_dir(parent(&dir)?)
        }))
    }

    fn read<'a>(&'a self, path: &'a Path, bytes_max: u64) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            plain::open(&path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > bytes_max {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {bytes_max} bytes")));
            }
            Ok(bytes)
        }))
    }

    fn read_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            use std::io::{Read as _, Seek as _};
            let mut file = plain::open(&path)?;
            file.seek(io::SeekFrom::Start(offset))?;
            let mut read = Vec::with_capacity(bytes);
            file.take(bytes as u64).read_to_end(&mut read)?;
            Ok(read)
        }))
    }

    fn replace<'a>(&'a self, path: &'a Path, bytes: Vec<u8>) -> BoxFuture<'a, io::Result<()>> {
        let path = path.to_owned();
        Box::pin(blocking(move || write_replacing(&path, &bytes)))
    }

    fn write_at<'a>(&'a self, path: &'a Path, offset: u64, bytes: bytes::Bytes) -> BoxFuture<'a, io::Result<()>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
            let mut options = std::fs::OpenOptions::new();
            options.write(true).create(offset == 0).truncate(false).mode(0o600);
            let file = plain::open_with(&mut options, &path)?;
            let length = file.metadata()?.len();
            if length < offset {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("file ends at {length}, before {offset}"),
                ));
            }
            if length > offset {
                file.set_len(offset)?;
            }
            file.write_all_at(&bytes, offset)
        }))
    }

    fn sync<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let path = path.to_owned();
        Box::pin(blocking(move || plain::open(&path)?.sync_all()))
    }

    fn length<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Option<u64>>> {
        let path = path.to_owned();
        Box::pin(blocking(move || match std::fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }))
    }

    fn create_dir<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            make_dir(&path)?;
            sync_dir(parent(&path)?)
        }))
    }

    fn remove<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            let removed = match std::fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(&path),
                Ok(_) => std::fs::remove_file(&path),
                Err(error) => Err(error),
            };
            match removed {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
                Ok(()) => sync_dir(parent(&path)?),
            }
        }))
    }

    fn rename<'a>(&'a self, from: &'a Path, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let (from, to) = (from.to_owned(), to.to_owned());
        Box::pin(blocking(move || {
            std::fs::rename(&from, &to)?;
            sync_dir(parent(&from)?)?;
            sync_dir(parent(&to)?)
        }))
    }

    fn list<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<Vec<Entry>>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            let mut entries = Vec::new();
            let dir = match std::fs::read_dir(path) {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
                Err(error) => return Err(error),
            };
            for entry in dir {
                let entry = entry?;
                if let Ok(name) = entry.file_name().into_string() {
                    entries.push(Entry { name, is_dir: entry.file_type()?.is_dir() });
                }
            }
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(entries)
        }))
    }

    fn free_bytes<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<u64>> {
        let path = path.to_owned();
        Box::pin(blocking(move || {
            let stat = rustix::fs::statvfs(&path)?;
            // A disk with errors is remounted so by the kernel.
            if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
                return Err(io::ErrorKind::ReadOnlyFilesystem.into());
            }
            Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
        }))
    }
}

/// Joins and checks that `name` is one plain component: the last guard against a name from
/// outside that would leave its directory.
///
/// # Panics
/// If `name` is empty, `.`, `..` or holds a slash: callers only pass names of our own making.
#[must_use]
pub fn child(dir: &Path, name: &str) -> PathBuf {
    assert!(!name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']), "name of our own making");
    dir.join(name)
}

mod dated;
pub mod plain;
pub mod private;

pub use dated::{dated_name, is_too_old};
