//! Does the new image hold what would be the same in all its machines? Looked for in the finished file system itself,
//! whatever recipes and packages have done: a secret of one machine is none in an image that many start from.

use super::{BuildError, file_error};
use crate::process::Program;
use std::path::Path;
use std::time::Duration;

/// It reads one inode.
const DEADLINE: Duration = Duration::from_secs(30);

/// What no image has: secrets, and what tells machines apart. systemd's random seed and key of credentials, Docker's key and
/// id, keys and logins of users, a runner's token.
const NEVER: [&str; 14] = [
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/dbus/machine-id",
    "/etc/docker/key.json",
    "/var/lib/docker/engine-id",
    "/etc/gitlab-runner/config.toml",
    "/root/.docker/config.json",
    "/root/.git-credentials",
    "/root/.netrc",
    "/root/.ssh/id_rsa",
    "/root/.ssh/id_ed25519",
    "/home/gitlab-runner/.docker/config.json",
    "/home/gitlab-runner/.git-credentials",
    "/home/gitlab-runner/.netrc",
];

/// Looks into the ext4 that begins at this byte of `disk`, without mounting it.
///
/// # Errors
/// [`BuildError::Secret`] names what is there.
pub(super) async fn check(disk: &Path, offset: u64) -> Result<(), BuildError> {
    // So libext2fs takes a file system that does not begin with its file: behind the first `?` come options.
    let mut at = disk.as_os_str().to_owned();
    at.push(format!("?offset={offset}"));
    let disk = Path::new(&at);
    let shadow = ask(disk, "cat /etc/shadow").await?;
    let users = with_password(&shadow);
    if shadow.is_empty() || !users.is_empty() {
        let what =
            if users.is_empty() { "no /etc/shadow".into() } else { format!("a password for {}", users.join(", ")) };
        return Err(BuildError::Secret(what));
    }
    // Empty, and not missing: systemd takes a machine without one for new, and sets it up.
    if !ask(disk, "cat /etc/machine-id").await?.trim().is_empty() || !exists(disk, "/etc/machine-id").await? {
        return Err(BuildError::Secret("another /etc/machine-id than an empty one".into()));
    }
    if ask(disk, "ls -p /etc/ssh").await?.contains("/ssh_host_") {
        return Err(BuildError::Secret("a host key in /etc/ssh".into()));
    }
    for path in NEVER {
        if exists(disk, path).await? {
            return Err(BuildError::Secret(path.into()));
        }
    }
    Ok(())
}

/// shadow(5): `!` and `*` begin what no password hashes to.
fn with_password(shadow: &str) -> Vec<&str> {
    let users = shadow.lines().filter_map(|line| {
        let (user, rest) = line.split_once(':')?;
        (!rest.starts_with(['!', '*'])).then_some(user)
    });
    users.collect()
}

async fn exists(disk: &Path, path: &str) -> Result<bool, BuildError> {
    Ok(ask(disk, &format!("stat {path}")).await?.contains("Inode:"))
}

/// One question to debugfs(8), which tells what is not there on standard error, and always ends with 0.
async fn ask(disk: &Path, question: &str) -> Result<String, BuildError> {
    let answer = Program::new("debugfs", DEADLINE).args(["-R", question]).arg(disk).run().await?;
    if answer.stderr.contains("Filesystem not open") || answer.stderr.contains("while opening filesystem") {
        return Err(file_error("read the file system of", disk)(std::io::Error::other(answer.stderr)));
    }
    Ok(answer.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    async fn found(files: &[(&str, &str)]) -> Result<(), String> {
        let whole = found_at(0, files).await;
        assert_eq!(whole, found_at(2 << 20, files).await, "in a partition the same");
        whole
    }

    async fn found_at(offset: u64, files: &[(&str, &str)]) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let (tree, disk) = (dir.path().join("tree"), dir.path().join("disk"));
        for (path, text) in
            [("etc/shadow", "root:*:1::::::\nrunner:!:1::::::\n"), ("etc/machine-id", "")].iter().chain(files)
        {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
        }
        fs::File::create(&disk).unwrap().set_len(10 << 20).unwrap();
        let mke2fs =
            Program::new("mke2fs", DEADLINE).args(["-q", "-t", "ext4", "-E", &format!("offset={offset}"), "-d"]);
        mke2fs.arg(&tree).arg(&disk).arg("8M").run().await.unwrap();
        check(&disk, offset).await.map_err(|error| crate::telemetry::chain(&error))
    }

    #[tokio::test]
    async fn what_an_image_may_not_hold_is_found_in_its_file_system() {
        assert_eq!(found(&[("etc/ssh/ssh_config", "Host *\n")]).await, Ok(()));
        for (path, text, what) in [
            ("etc/shadow", "root::1::::::\nrunner:$y$j9T$x:1::::::\n", "a password for root, runner"),
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n", "/etc/machine-id"),
            ("etc/ssh/ssh_host_ed25519_key", "PRIVATE", "a host key in /etc/ssh"),
            ("var/lib/systemd/random-seed", "x", "/var/lib/systemd/random-seed"),
            ("etc/docker/key.json", "{}", "/etc/docker/key.json"),
            ("root/.docker/config.json", "{}", "/root/.docker/config.json"),
        ] {
            let error = found(&[(path, text)]).await.unwrap_err();
            assert!(error.starts_with("keep the image: it holds ") && error.contains(what), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_no_file_system_is_not_taken_for_one_without_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, vec![0; 1 << 20]).unwrap();
        assert!(check(&disk, 0).await.is_err());
    }
}
