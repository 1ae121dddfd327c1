//! May others read this file? For the tokens and keys that an operator gives us.
//!
//! The mode says it, but for one kind: systemd puts a service's credentials (systemd.exec(5), `LoadCredential=`) below a
//! directory of the service's own, as root's, and gives the service's user the right to read by an ACL. The mask of that
//! ACL shows as the group's bits, so that the mode reads 0440 although nobody but the service can.

use super::plain;
use crate::secret::Secret;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The variable by which systemd tells a service where its credentials are.
pub const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// Where systemd has the directories of all services.
pub const ALL_CREDENTIALS: &str = "/run/credentials";

/// The mode of the file that was found at `path`, if others than its owner may read or change it.
#[must_use]
pub fn too_open(path: &Path, found: &Metadata) -> Option<u32> {
    let own = std::env::var_os(CREDENTIALS_VARIABLE).map(PathBuf::from).filter(|path| path.is_absolute());
    let places: Vec<PathBuf> = own.into_iter().chain([ALL_CREDENTIALS.into()]).collect();
    judge(path, found, &places)
}

/// Bytes of a key's file at most.
const LINE_BYTES_MAX: u64 = 4096;

/// Reads a secret of one line.
///
/// # Errors
/// The file's; `PermissionDenied` if others may read it, `InvalidData` if it holds no such line.
pub fn read_line(path: &Path) -> io::Result<Secret> {
    use std::io::Read as _;
    // Mode and content are those of one open file, whatever happens to the name meanwhile.
    let file = plain::open_chosen(path)?;
    if let Some(mode) = too_open(path, &file.metadata()?) {
        let text = format!("mode {mode:o} lets others read it; chmod 0600 it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    let mut bytes = Vec::new();
    file.take(LINE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    if text.is_empty() || bytes.len() as u64 > LINE_BYTES_MAX || text.chars().any(|c| c.is_control() || c == ' ') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not hold one line with a key"));
    }
    Ok(Secret::new(text))
}

/// `places`: directories below which credentials are.
fn judge(path: &Path, found: &Metadata, places: &[PathBuf]) -> Option<u32> {
    let mode = found.mode() & 0o7777;
    (mode & 0o077 != 0 && !is_credential(path, found, mode, places)).then_some(mode)
}

fn is_credential(path: &Path, found: &Metadata, mode: u32, places: &[PathBuf]) -> bool {
    let us = rustix::process::geteuid().as_raw();
    let Ok(path) = path.canonicalize() else { return false };
    // A service of a user's own has its user's.
    mode & !0o440 == 0
        && [0, us].contains(&found.uid())
        && places.iter().any(|place| place.canonicalize().is_ok_and(|place| path.starts_with(place)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    /// U16: a systemd credential is taken for what it is, and nothing else of that mode.
    #[test]
    fn a_credential_is_private_for_all_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let places = [dir.path().join("credentials")];
        std::fs::create_dir_all(&places[0]).unwrap();
        let check = |path: &Path, mode: u32| {
            std::fs::write(path, "glrt-abc\n").ok();
            std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
            judge(path, &std::fs::metadata(path).unwrap(), &places)
        };
        let (credential, other) = (places[0].join("ci"), dir.path().join("ci"));
        assert_eq!(check(&credential, 0o440), None);
        for mode in [0o640, 0o444, 0o460, 0o4440] {
            assert_eq!(check(&credential, mode), Some(mode));
            std::fs::remove_file(&credential).unwrap();
        }
        assert_eq!((check(&other, 0o440), check(&other, 0o600)), (Some(0o440), None));
        // A link into it is followed, one that only seems to be in it is not taken.
        check(&credential, 0o440);
        std::fs::remove_file(&other).unwrap();
        std::os::unix::fs::symlink(&credential, &other).unwrap();
        assert_eq!(judge(&other, &std::fs::metadata(&other).unwrap(), &places), None);
        let outside = dir.path().join("outside");
        check(&outside, 0o440);
        let inside = places[0].join("link");
        std::os::unix::fs::symlink(&outside, &inside).unwrap();
        assert_eq!(judge(&inside, &std::fs::metadata(&inside).unwrap(), &places), Some(0o440));
    }

    /// U16: a credential that a stranger put there is none; only root can make a file somebody else's.
    #[test]
    fn a_credential_is_of_root_or_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ci");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
        if std::os::unix::fs::chown(&path, Some(65534), None).is_ok() {
            let found = std::fs::metadata(&path).unwrap();
            assert_eq!(judge(&path, &found, &[dir.path().to_owned()]), Some(0o440));
        }
    }
}
