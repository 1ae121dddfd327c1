//! The directory of a new image, beside the images.
//!
//! Root may build in a directory of the daemon's user, who could put another directory, or links, in the place of what
//! root has made there. So files go into the directory that was opened, and are new in it; the name is only used where
//! nothing is written.

use super::{BuildError, file_error};
use crate::files::plain;
use crate::image::manifest::ImageFile;
use crate::image::store::digest_of;
use rustix::fs::{AtFlags, Mode, OFlags};
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, Read, Seek as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

/// Held while a build runs in an image directory.
pub(super) const LOCK_FILE: &str = ".build.lock";

/// Beginning of the names of staged images.
const STAGING_PREFIX: &str = ".staging-";

/// A directory that is being filled. Dropped, it is removed.
#[derive(Debug)]
pub(super) struct Staging {
    directory: tempfile::TempDir,
    open: Arc<File>,
    /// Keeps other builds (and their clean-up) away.
    _lock: File,
}

impl Staging {
    /// Makes a directory for the new image and removes those of builds that were killed.
    pub(super) fn new(image_directory: &Path) -> Result<Self, BuildError> {
        fs::create_dir_all(image_directory).map_err(file_error("make image directory", image_directory))?;
        let lock_path = image_directory.join(LOCK_FILE);
        let lock = plain::open_lock(&lock_path).map_err(file_error("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BuildError::Busy(image_directory.to_owned())),
            Err(TryLockError::Error(source)) => return Err(file_error("lock", &lock_path)(source)),
        }
        let user = rustix::process::geteuid().as_raw();
        let owner = fs::metadata(image_directory).map_err(file_error("read", image_directory))?.uid();
        for entry in fs::read_dir(image_directory).map_err(file_error("read", image_directory))?.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            // A stranger's is no build of ours, and what is no directory none at all.
            let is_build =
                || path.symlink_metadata().is_ok_and(|found| found.is_dir() && [user, owner].contains(&found.uid()));
            if name.to_str().is_some_and(|name| name.starts_with(STAGING_PREFIX)) && is_build() {
                fs::remove_dir_all(&path).map_err(file_error("remove", &path))?;
            }
        }
        let directory = tempfile::Builder::new().prefix(STAGING_PREFIX).tempdir_in(image_directory);
        let directory = directory.map_err(file_error("make a directory in", image_directory))?;
        let opened = plain::open_directory(directory.path()).and_then(|open| {
            if open.metadata()?.uid() != user {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, "somebody else's is in its place"));
            }
            // In system mode QEMU is another user.
            open.set_permissions(Permissions::from_mode(0o755))?;
            Ok(open)
        });
        let open = opened.map_err(file_error("open up", directory.path()))?;
        Ok(Self { directory, open: Arc::new(open), _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Writes `content` as `name`, readable by all, in place of one of this name that was written before.
    pub(super) fn write(&self, name: &str, content: impl Read) -> io::Result<ImageFile> {
        write(&self.open, name, content)
    }

    /// A copy of the file at `from`, written on a blocking thread: a disk has hundreds of MiB.
    pub(super) async fn copy(&self, name: &'static str, from: &Path) -> Result<ImageFile, BuildError> {
        let (open, path) = (Arc::clone(&self.open), from.to_owned());
        let copied = tokio::task::spawn_blocking(move || write(&open, name, plain::open(&path)?));
        let copied = copied.await.map_err(io::Error::other).and_then(|copied| copied);
        copied.map_err(file_error("write", &self.path().join(name)))
    }
}

fn write(directory: &File, name: &str, mut content: impl Read) -> io::Result<ImageFile> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
    // Whatever our umask says.
    file.set_permissions(Permissions::from_mode(0o644))?;
    let bytes = io::copy(&mut content, &mut file)?;
    file.rewind()?;
    Ok(ImageFile { file: name.into(), bytes, sha256: digest_of(&mut file)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::plain::tests::{fifo, in_time};
    use std::os::unix::fs::{chown, symlink};

    #[test]
    fn one_build_at_a_time_and_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        let Staging { directory, _lock: lock, .. } = Staging::new(&images).unwrap();
        assert!(matches!(Staging::new(&images), Err(BuildError::Busy(_))));
        drop(lock);
        let killed = directory.keep(); // as if the process had been killed here
        fs::write(killed.join("disk.qcow2"), "half").unwrap();
        let staging = Staging::new(&images).unwrap();
        assert!(!killed.exists() && staging.path().exists());
    }

    #[test]
    fn a_file_is_described_as_it_was_written_last() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(dir.path()).unwrap();
        staging.write("initrd", &b"first and longer"[..]).unwrap();
        let written = staging.write("initrd", &b"abc"[..]).unwrap();
        let path = staging.path().join("initrd");
        assert_eq!((written.bytes, written.sha256), (3, crate::image::store::digest(&path).unwrap()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    }

    /// U29: the daemon's user, in whose directory root builds, puts links there: root writes into its own directory,
    /// and neither through a link in it nor into what has taken its name.
    #[test]
    fn what_takes_the_place_of_a_new_image_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "kept").unwrap();
        let staging = Staging::new(&dir.path().join("images")).unwrap();
        symlink(&precious, staging.path().join("initrd")).unwrap();
        staging.write("initrd", &b"new"[..]).unwrap();
        let moved = dir.path().join("moved");
        fs::rename(staging.path(), &moved).unwrap();
        fs::create_dir(staging.path()).unwrap();
        symlink(&precious, staging.path().join("vmlinuz")).unwrap();
        staging.write("vmlinuz", &b"new"[..]).unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"kept");
        assert_eq!(fs::read(moved.join("initrd")).unwrap(), b"new");
        assert_eq!(fs::read(moved.join("vmlinuz")).unwrap(), b"new");
    }

    /// U29: a lock that is a link is refused, and what it leads to not emptied; at a FIFO nobody waits. What only looks
    /// like a killed build's leftover stays, and hinders no build.
    #[test]
    fn what_others_have_put_into_an_image_directory_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("precious"), "kept").unwrap();
        symlink(path("precious"), path(LOCK_FILE)).unwrap();
        let images = dir.path().to_owned();
        let build = move || {
            let images = images.clone();
            in_time(move || Staging::new(&images).map(drop).map_err(|error| crate::telemetry::chain(&error)))
        };
        assert!(build().unwrap_err().ends_with("is a link, and none is followed here"));
        assert_eq!(fs::read(path("precious")).unwrap(), b"kept");
        fs::remove_file(path(LOCK_FILE)).unwrap();
        fifo(&path(LOCK_FILE));
        assert!(build().unwrap_err().ends_with("is no plain file"));
        fs::remove_file(path(LOCK_FILE)).unwrap();

        fifo(&path(".staging-fifo"));
        fs::create_dir_all(path("theirs/data")).unwrap();
        symlink(path("theirs"), path(".staging-link")).unwrap();
        fs::create_dir(path(".staging-foreign")).unwrap();
        // Only root can make a directory somebody else's.
        let foreign = chown(path(".staging-foreign"), Some(65534), None).is_ok();
        build().unwrap();
        assert!(path("theirs/data").exists() && path(".staging-link").is_symlink() && path(".staging-fifo").exists());
        assert_eq!(path(".staging-foreign").exists(), foreign);
    }
}
