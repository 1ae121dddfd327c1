//! Who besides root and the daemon's own user may command it: the group of operators of section `[control]`.

use serde::{Deserialize, Serialize};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

/// Section `[control]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Members of this group may use the control socket; none: only root and the daemon's own user.
    pub group: Option<String>,
    /// These users may open shells in jobs' machines, besides root and the daemon's own user; they reach the socket by
    /// the group.
    pub shell_users: Vec<String>,
}

/// The mode of the runtime directory where a group must pass it (and list nothing).
pub const OPEN_TO_GROUP: u32 = 0o710;

/// Bytes of the list of groups, or users, at most.
const GROUPS_BYTES_MAX: usize = 1024 * 1024;

/// The number of a group of this host, by its name or its number.
///
/// # Errors
/// The list cannot be read, or has no such group: one of a directory service goes by its number.
pub fn group_id(name: &str) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let groups = std::fs::read(Path::new("/etc/group"))?;
    let groups = String::from_utf8_lossy(&groups[..groups.len().min(GROUPS_BYTES_MAX)]).into_owned();
    find(&groups, name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no group `{name}` in /etc/group")))
}

/// The number of a user of this host, by its name or its number.
///
/// # Errors
/// As [`group_id`].
pub fn user_id(name: &str) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let users = std::fs::read(Path::new("/etc/passwd"))?;
    let users = String::from_utf8_lossy(&users[..users.len().min(GROUPS_BYTES_MAX)]).into_owned();
    find(&users, name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no user `{name}` in /etc/passwd")))
}

/// The number of this name in a list as /etc/group and /etc/passwd are.
fn find(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// Lets the group pass the runtime directory, or nobody any more.
///
/// # Errors
/// The file system's: above all, the daemon's user is no member of the group.
pub(super) fn admit(runtime_directory: &Path, group: Option<u32>) -> io::Result<()> {
    let mode = std::fs::metadata(runtime_directory)?.permissions().mode() & 0o7777;
    match group {
        Some(group) => {
            chown(runtime_directory, None, Some(group))?;
            std::fs::set_permissions(runtime_directory, Permissions::from_mode(OPEN_TO_GROUP))
        }
        // Of a configuration before.
        None if mode == OPEN_TO_GROUP => std::fs::set_permissions(runtime_directory, Permissions::from_mode(0o700)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_group_is_found_by_its_name_or_number() {
        let groups = "root:x:0:\nci-operators:x:991:anna,ben\nci:x:992:\nbroken:x\n";
        assert_eq!((find(groups, "ci-operators"), find(groups, "ci")), (Some(991), Some(992)));
        assert_eq!((find(groups, "broken"), find(groups, "anna"), find(groups, "")), (None, None, None));
        assert_eq!(group_id("991").unwrap(), 991);
        assert_eq!((group_id("root").unwrap(), user_id("root").unwrap(), user_id("17").unwrap()), (0, 0, 17));
        assert!(user_id("no-such-user").unwrap_err().to_string().contains("/etc/passwd"));
        assert!(group_id("no-such-group").unwrap_err().to_string().contains("`no-such-group`"));
    }

    /// U20: the group passes the directory and lists nothing; without the key that is taken back.
    #[test]
    fn the_runtime_directory_lets_the_group_pass_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let of = || {
            let found = std::fs::metadata(dir.path()).unwrap();
            (found.mode() & 0o7777, found.gid())
        };
        let own = rustix::process::getegid().as_raw();
        admit(dir.path(), Some(own)).unwrap();
        assert_eq!(of(), (0o710, own));
        admit(dir.path(), None).unwrap();
        assert_eq!(of().0, 0o700);
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        admit(dir.path(), None).unwrap();
        assert_eq!(of().0, 0o755, "what is not ours to judge stays for whoever does");
    }
}
