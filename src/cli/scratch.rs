//! Directories for test VMs, gone when they are dropped.

use anyhow::Context as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use tempfile::TempDir;

/// A directory below the first of `places` where one can be made. QEMU, which may be another user,
/// can pass it, and nobody else can list it.
pub(super) fn passable(places: &[&Path]) -> anyhow::Result<TempDir> {
    let make = |below: &&Path| tempfile::Builder::new().prefix(".test-").tempdir_in(below).ok();
    let dir = places.iter().find_map(make);
    let dir = dir.with_context(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        format!("make a directory for a test VM in {}", places.join(" or "))
    })?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))
        .context("open a directory for a test VM")?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_may_pass_but_not_list() {
        let below = tempfile::tempdir().unwrap();
        let dir = passable(&[Path::new("/nonexistent"), below.path()]).unwrap();
        assert!(dir.path().starts_with(below.path()));
        assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o711);
        assert!(passable(&[Path::new("/nonexistent")]).is_err());
    }
}
