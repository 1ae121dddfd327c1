//! Opens files that somebody else may have made.
//!
//! Where others may write, a name can be a FIFO, at which an open waits for ever, a device, or a link to a file of ours
//! that would then be read, emptied or given away. What comes out of here is a regular file, and no open waits: what
//! was opened is looked at, not the name.

use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// A file to read. A link is not followed.
pub fn open(path: &Path) -> io::Result<File> {
    open_with(File::options().read(true), path)
}

/// A file to read at a path that the operator has chosen: it may be a link, for they may have made it one.
pub fn open_chosen(path: &Path) -> io::Result<File> {
    regular(File::options().read(true), path, OFlags::empty())
}

/// A file with these options. A link is not followed.
pub fn open_with(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    regular(options, path, OFlags::NOFOLLOW)
}

/// A file that is only there to be locked: made if there is none, mode 0600, and never emptied. One that is neither
/// ours nor root's nor of the directory's owner is refused: a stranger could hold it for ever.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let file = open_with(File::options().read(true).write(true).create(true).mode(0o600), path)?;
    let owner = file.metadata()?.uid();
    let directory = super::parent(path)?.metadata()?.uid();
    if [rustix::process::geteuid().as_raw(), 0, directory].contains(&owner) {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("belongs to user {owner}; remove it")))
    }
}

/// A directory, to be given away or looked at: a link is not followed.
pub fn open_directory(path: &Path) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::DIRECTORY).bits()).map_err(io::Error::other)?;
    File::options().read(true).custom_flags(flags).open(path)
}

fn regular(options: &mut OpenOptions, path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = i32::try_from((flags | OFlags::NONBLOCK | OFlags::NOCTTY).bits()).map_err(io::Error::other)?;
    let unfit = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    let file = options.custom_flags(flags).open(path).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => unfit("is a link, and none is followed here"),
        // A FIFO that nobody reads, or a socket.
        Some(Errno::NXIO) => unfit("is no plain file"),
        _ => error,
    })?;
    let found = file.metadata()?;
    match (found.is_file(), found.is_dir()) {
        (true, _) => Ok(file),
        (false, true) => Err(io::ErrorKind::IsADirectory.into()),
        (false, false) => Err(unfit("is no plain file")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode};
    use std::fs;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Makes a FIFO that nobody writes to.
    pub(crate) fn fifo(path: &Path) {
        rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    }

    /// What `work` comes to; a work that waits at a FIFO fails the test instead of holding it.
    pub(crate) fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, outcome) = mpsc::channel();
        std::thread::spawn(move || done.send(work()));
        outcome.recv_timeout(Duration::from_secs(20)).expect("it waits for ever")
    }

    /// U29: where another user may make a path, a FIFO, a device and a link are refused by name, at once; and a link's
    /// target is neither opened, emptied nor made.
    #[test]
    fn only_a_regular_file_is_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fifo(&path("fifo"));
        fs::write(path("file"), "kept").unwrap();
        let links = [("to-file", path("file")), ("to-nothing", path("nothing")), ("to-fifo", path("fifo"))];
        for (name, target) in links {
            std::os::unix::fs::symlink(target, path(name)).unwrap();
        }
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (open, chosen) in [(open as fn(&Path) -> _, false), (open_lock, false), (open_chosen, true)] {
            for name in ["fifo", "socket", "to-fifo", "to-file", "to-nothing", "/dev/null", "."] {
                let path = path(name);
                let opened: io::Result<File> = in_time(move || open(&path));
                assert_eq!(opened.is_ok(), chosen && name == "to-file", "{name}: {opened:?}");
            }
            assert!(open(&path("file")).is_ok());
        }
        assert_eq!(open(&path("to-file")).unwrap_err().to_string(), "is a link, and none is followed here");
        assert_eq!(open(&path("fifo")).unwrap_err().to_string(), "is no plain file");
        assert!(open_lock(&path("new")).is_ok() && !path("nothing").exists());
        assert_eq!(fs::read(path("file")).unwrap(), b"kept");
    }

    /// U29: journal and spool neither wait at a FIFO nor write through a link.
    #[test]
    fn the_file_layer_refuses_what_is_no_file() {
        use crate::files::{Files as _, RealFiles};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fifo(&path("fifo"));
        fs::write(path("file"), "kept").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        for name in ["fifo", "link"] {
            let path = path(name);
            let refused = in_time(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    [
                        RealFiles.read(&path, 100).await.is_err(),
                        RealFiles.read_at(&path, 0, 100).await.is_err(),
                        RealFiles.write_at(&path, 0, bytes::Bytes::from_static(b"x")).await.is_err(),
                        RealFiles.sync(&path).await.is_err(),
                    ]
                })
            });
            assert_eq!(refused, [true; 4], "{name}");
        }
        assert_eq!(fs::read(path("file")).unwrap(), b"kept");
    }

    /// U29: a lock of a stranger's could be held for ever.
    #[test]
    fn a_lock_of_somebody_elses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "").unwrap();
        // Only root can make a file somebody else's.
        if std::os::unix::fs::chown(&path, Some(65534), None).is_ok() {
            assert_eq!(open_lock(&path).unwrap_err().to_string(), "belongs to user 65534; remove it");
        }
        std::os::unix::fs::chown(dir.path(), Some(65534), None).ok();
        assert!(open_lock(&path).is_ok(), "in a directory of its owner's");
    }
}
