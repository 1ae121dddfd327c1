//! Are the daemon's directories its own? Looked at before anything in them is read or changed.
//!
//! Tokens, traces and passes are in them, so nobody else may read or write there; and a daemon that
//! runs as another user than the one before would leave files behind that one of them cannot read.
//! What is wrong is named with its remedy, and never mended in silence: it may be somebody's.

use super::DaemonError;
use crate::config::Config;
use crate::control::OPEN_TO_GROUP;
use std::fs::{DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Permission bits that the state directory must not have. QEMU's own user must pass (not list) it
/// on the way to its overlay, so 0711 is right there.
const STATE_FORBIDDEN: u32 = 0o066;

/// Those that nothing else of ours may have.
const FORBIDDEN: u32 = 0o077;

/// Makes the directories that are missing, and checks those that are there.
///
/// # Errors
/// [`DaemonError::Unusable`], [`DaemonError::Files`]. Nothing has been changed but for new, empty
/// directories.
pub(super) fn check(config: &Config) -> Result<(), DaemonError> {
    let (state, runtime) = (&config.state_directory, &config.runtime_directory);
    // A group of operators passes it, and lists nothing; which mode it has then is settled with the control socket.
    for (path, forbidden) in [(state, STATE_FORBIDDEN), (runtime, FORBIDDEN & !OPEN_TO_GROUP)] {
        let failed = |what| move |source| DaemonError::Files { what, path: path.clone(), source };
        if !ours(path, forbidden, Kind::Directory)? {
            let mode = if path == state { 0o777 & !forbidden } else { 0o700 };
            DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed("make directory"))?;
            // Whatever our umask says.
            std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
        }
        let found = rustix::fs::statvfs(path).map_err(|error| failed("look at")(error.into()))?;
        if found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
            return Err(failed("write to")(io::ErrorKind::ReadOnlyFilesystem.into()));
        }
    }
    ours(&state.join("installation.json"), FORBIDDEN, Kind::File)?;
    for jobs in [state.join("jobs"), runtime.join("jobs")] {
        if !ours(&jobs, FORBIDDEN, Kind::Directory)? {
            continue;
        }
        let failed = |source| DaemonError::Files { what: "list", path: jobs.clone(), source };
        for entry in std::fs::read_dir(&jobs).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // What is no directory is set aside by the journal.
            if path.is_dir() {
                ours(&path, FORBIDDEN, Kind::Directory)?;
                ours(&path.join("record.json"), FORBIDDEN, Kind::File)?;
            }
        }
    }
    Ok(())
}

/// Where the sockets of machines are, and all else that a back end of our own keeps of them.
#[must_use]
pub fn socket_directory(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("vm")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// `false`: there is none.
fn ours(path: &Path, forbidden: u32, kind: Kind) -> Result<bool, DaemonError> {
    let unusable = |problem: String, remedy: String| DaemonError::Unusable { path: path.to_owned(), problem, remedy };
    let found: Metadata = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(DaemonError::Files { what: "look at", path: path.to_owned(), source }),
    };
    match kind {
        Kind::Directory if !found.is_dir() => {
            return Err(unusable("is no directory".into(), "move it away".into()));
        }
        Kind::File if !found.is_file() => return Err(unusable("is no plain file".into(), "move it away".into())),
        Kind::Directory | Kind::File => {}
    }
    let user = rustix::process::geteuid().as_raw();
    if found.uid() != user {
        // What is root's no service can use: root is told who should run, never to take it.
        let remedy = if user == 0 {
            format!(
                "run dayfly as its owner: `systemctl start dayfly`, or `setpriv --reuid {} --init-groups dayfly run`",
                found.uid()
            )
        } else {
            format!("run dayfly as its owner, or `chown -R {user} {}` if it is this installation's", path.display())
        };
        return Err(unusable(format!("belongs to user {}, and dayfly runs as user {user}", found.uid()), remedy));
    }
    let mode = found.mode() & 0o7777;
    if mode & forbidden != 0 {
        let right = match (kind, forbidden) {
            (_, STATE_FORBIDDEN) => "0711",
            (Kind::Directory, _) => "0700",
            (Kind::File, _) => "0600",
        };
        return Err(unusable(
            format!("has mode {mode:04o}, which lets other users in"),
            format!("look whether somebody was, then `chmod {right} {}`", path.display()),
        ));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn config(dir: &Path) -> Config {
        Config { state_directory: dir.join("state"), runtime_directory: dir.join("run"), ..Config::default() }
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A state directory with one job in it, and what is said once `spoil` has been at it.
    fn refused(spoil: impl FnOnce(&Config) -> PathBuf) -> String {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        check(&config).unwrap();
        let job = config.state_directory.join("jobs/abc-1");
        DirBuilder::new().recursive(true).mode(0o700).create(&job).unwrap();
        for file in [job.join("record.json"), config.state_directory.join("installation.json")] {
            std::fs::write(&file, "{}").unwrap();
            set_mode(&file, 0o600);
        }
        check(&config).unwrap();
        let path = spoil(&config);
        let error = check(&config).unwrap_err();
        assert_eq!(error.exit_code(), 78, "{error}");
        let text = crate::telemetry::chain(&error);
        assert!(text.contains(&path.display().to_string()), "{text}");
        text
    }

    #[test]
    fn directories_that_are_missing_are_made_for_us_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        check(&config).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        // QEMU's user passes the first.
        assert_eq!((mode(&config.state_directory), mode(&config.runtime_directory)), (0o711, 0o700));
        set_mode(&config.state_directory, 0o700);
        check(&config).unwrap();
    }

    /// Bad input of the journal: path, and what to do.
    #[test]
    fn a_mode_that_lets_others_in_is_refused_with_its_remedy() {
        let text = refused(|config| {
            set_mode(&config.state_directory, 0o755);
            config.state_directory.clone()
        });
        assert!(text.contains("has mode 0755") && text.contains("`chmod 0711 "), "{text}");
        for (below, mode, right) in [
            ("jobs", 0o750, "chmod 0700"),
            ("jobs/abc-1", 0o701, "chmod 0700"),
            ("jobs/abc-1/record.json", 0o644, "chmod 0600"),
            ("installation.json", 0o640, "chmod 0600"),
        ] {
            let text = refused(|config| {
                let path = config.state_directory.join(below);
                set_mode(&path, mode);
                path
            });
            assert!(text.contains(right), "{text}");
        }
        let text = refused(|config| {
            set_mode(&config.runtime_directory, 0o711);
            config.runtime_directory.clone()
        });
        assert!(text.contains("chmod 0700"), "{text}");
        // A group of operators, or that of a configuration before.
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        check(&config).unwrap();
        set_mode(&config.runtime_directory, 0o710);
        check(&config).unwrap();
    }

    #[test]
    fn what_is_no_directory_is_refused() {
        let text = refused(|config| {
            std::fs::remove_dir_all(&config.state_directory).unwrap();
            std::fs::write(&config.state_directory, "").unwrap();
            config.state_directory.clone()
        });
        assert!(text.contains("move"), "{text}");
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let text = refused(|config| {
            std::os::unix::fs::chown(config.state_directory.join("jobs"), Some(65534), None).unwrap();
            config.state_directory.join("jobs")
        });
        assert!(text.contains("belongs to user 65534") && text.contains("systemctl start dayfly"), "{text}");
        assert!(!text.contains("chown"), "{text}");
    }
}
