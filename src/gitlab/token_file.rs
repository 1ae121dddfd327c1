//! A token in place of another: for a runner whose token GitLab has made anew.
//!
//! GitLab forgets the old token with its answer, so the place for the new one is made before it is asked, as large as it
//! will be: a directory that may not be written, or a full disk, costs no runner its token.

use super::runner_token::{RunnerToken, TokenFileError};
use std::fs::{File, Metadata};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// More than a token has.
const ROOM_BYTES: usize = 4096;

/// A file beside a token file, to be put in its place. Blocking, as all of it.
#[derive(Debug)]
pub struct Replacement {
    file: NamedTempFile,
    path: PathBuf,
}

impl Replacement {
    /// Makes it: mode 0600, with the owner of the file that is there.
    ///
    /// # Errors
    /// [`TokenFileError::Replace`].
    pub fn prepare(path: &Path) -> Result<Self, TokenFileError> {
        let failed = |source| TokenFileError::Replace { path: path.to_owned(), source };
        // A link stays a link: what it points to is replaced.
        let path = path.canonicalize().map_err(failed)?;
        let made = || -> io::Result<NamedTempFile> {
            let found = std::fs::metadata(&path)?;
            let mut file = NamedTempFile::new_in(directory(&path)?)?;
            give(file.as_file(), &found)?;
            file.write_all(&[b'\n'; ROOM_BYTES])?;
            file.as_file().sync_all()?;
            Ok(file)
        };
        let file = made().map_err(failed)?;
        Ok(Self { file, path })
    }

    /// Writes the token, and puts the file in place of the old one, for good.
    ///
    /// # Errors
    /// [`TokenFileError::Replace`]: the old file is still there.
    pub fn commit(self, token: &RunnerToken) -> Result<(), TokenFileError> {
        let Self { mut file, path } = self;
        let put = || -> io::Result<()> {
            file.rewind()?;
            file.write_all(&token.to_file())?;
            let end = file.stream_position()?;
            file.as_file().set_len(end)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(directory(&path)?)?.sync_all()
        };
        put().map_err(|source| TokenFileError::Replace { path: path.clone(), source })
    }
}

fn directory(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no parent"))
}

/// Only root can, and only root needs to.
fn give(file: &File, like: &Metadata) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(like.uid()), Some(like.gid()))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;
    use std::os::unix::fs::PermissionsExt as _;

    /// U18: at any moment there is a whole token in the file, and nobody but its owner reads it.
    #[test]
    fn the_new_token_takes_the_place_of_the_old_one_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "glrt-old\n").unwrap();
        std::os::unix::fs::symlink("token", dir.path().join("link")).unwrap();
        let replacement = Replacement::prepare(&dir.path().join("link")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "glrt-old\n");
        replacement.commit(&RunnerToken::new(Secret::new("glrt-new"))).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "glrt-new\n");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        drop(Replacement::prepare(&path).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "what is not needed is gone");
        assert!(matches!(Replacement::prepare(&dir.path().join("none")), Err(TokenFileError::Replace { .. })));
    }
}
