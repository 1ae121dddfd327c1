//! The users of the image, read from its files: a static program has no name service.

use std::io;
use std::path::{Path, PathBuf};

/// A user of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, without the primary one.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
}

/// Why a user is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// One of the files cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No such user, or its line is broken.
    #[error("the image has no user `{0}`")]
    Unknown(String),
}

/// Looks a user up in `etc` (`/etc`).
///
/// # Errors
/// [`UserError`].
pub fn find(etc: &Path, name: &str) -> Result<User, UserError> {
    let read = |file: &str| {
        let path = etc.join(file);
        std::fs::read_to_string(&path).map_err(|source| UserError::Read { path, source })
    };
    parse(&read("passwd")?, &read("group")?, name).ok_or_else(|| UserError::Unknown(name.to_owned()))
}

/// passwd(5): `name:x:uid:gid:gecos:home:shell`; group(5): `name:x:gid:member,member`.
fn parse(passwd: &str, group: &str, name: &str) -> Option<User> {
    let fields: Vec<&str> =
        passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)?;
    let (uid, gid) = (fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
    let home = PathBuf::from(*fields.get(5)?);
    let groups = group
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            fields.get(3)?.split(',').any(|member| member == name).then(|| fields[2].parse().ok())?
        })
        .filter(|group| *group != gid)
        .collect();
    Some(User { name: name.to_owned(), uid, gid, groups, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbad:x:y\nci:x:990:980::/home/ci:/bin/bash\n";
    const GROUP: &str = "root:x:0:\ndocker:x:101:other,ci\ncici:x:102:cici\nci:x:980:ci\n";

    #[test]
    fn a_user_comes_with_its_groups() {
        let ci = parse(PASSWD, GROUP, "ci").unwrap();
        assert_eq!((ci.uid, ci.gid, ci.groups, ci.home), (990, 980, vec![101], "/home/ci".into()));
        assert!(parse(PASSWD, GROUP, "root").unwrap().groups.is_empty());
    }

    #[test]
    fn unknown_and_broken_users_are_none() {
        for name in ["nobody", "bad", "", "c"] {
            assert_eq!(parse(PASSWD, GROUP, name), None, "{name}");
        }
    }
}
