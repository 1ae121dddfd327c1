//! Directories for test VMs, gone when they are dropped.

use anyhow::Context as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use tempfile::TempDir;

/// A directory below the first of `places` that QEMU can pass and where one can be made. QEMU may be another user: it can
/// pass the directory, and nobody else can list it.
pub(super) fn passable(places: &[&Path]) -> anyhow::Result<TempDir> {
    let make = |below: &Path| tempfile::Builder::new().prefix(".test-").tempdir_in(below).ok();
    let dir = places.iter().filter(|place| lets_pass(place)).find_map(|place| make(place));
    let dir = dir.with_context(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        format!("make a directory for a test VM in {}", places.join(" or "))
    })?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))
        .context("open a directory for a test VM")?;
    Ok(dir)
}

/// Whether everybody can pass a directory on the way to one below it.
fn lets_pass(directory: &Path) -> bool {
    let Ok(directory) = directory.canonicalize() else { return false };
    directory
        .ancestors()
        .all(|above| std::fs::metadata(above).is_ok_and(|found| found.permissions().mode() & 0o001 != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U17: the service's runtime directory, mode 0700, is no place for a test VM's disk: the next one is taken.
    #[test]
    fn a_place_that_qemu_cannot_pass_is_passed_over() {
        let (run, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(run.path(), 0o700);
        mode(state.path(), 0o711);
        let below = run.path().join("open");
        std::fs::create_dir(&below).unwrap();
        mode(&below, 0o755);
        let dir = passable(&[run.path(), &below, state.path()]).unwrap();
        assert!(dir.path().starts_with(state.path()), "{}", dir.path().display());
        assert!(passable(&[run.path(), &below]).is_err());
    }

    #[test]
    fn others_may_pass_but_not_list() {
        let below = tempfile::tempdir().unwrap();
        std::fs::set_permissions(below.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let dir = passable(&[Path::new("/nonexistent"), below.path()]).unwrap();
        assert!(dir.path().starts_with(below.path()));
        assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o711);
        assert!(passable(&[Path::new("/nonexistent")]).is_err());
    }
}
