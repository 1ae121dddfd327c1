//! What [`Disks`](super::disks::Disks) and [`Sockets`](super::sockets::Sockets) do outside of this process: a few steps
//! on paths, beside the [`Hypervisor`](super::Hypervisor) seam, so that a whole daemon runs on paused time.
//!
//! It is not [`Files`](crate::files::Files): nothing here is ours to read or to make durable. An overlay is unlinked and
//! never opened, no fsync is waited for, and directories may have to be passable for QEMU's user.

use super::{Boot, Stream, VmError, VmName, disks};
use crate::BoxFuture;
use rustix::process::geteuid;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// QEMU accepts from its event loop; a guest under TCG can delay that.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// The steps. None blocks the runtime, and each may be taken twice.
pub trait Paths: Send + Sync + 'static {
    /// Makes a directory that other users can pass, and those above it that are missing, likewise.
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Makes a directory that nobody else can pass, and those above it.
    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// See [`Disks::create`](super::disks::Disks::create).
    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>>;
    /// See [`Disks::lend`](super::disks::Disks::lend). A host without files has none to lend.
    fn lend<'a>(&'a self, boot: &'a Boot, _overlay: &'a Path) -> BoxFuture<'a, io::Result<Boot>> {
        Box::pin(std::future::ready(Ok(boot.clone())))
    }
    /// Unlinks what was lent beside an overlay; none is fine.
    fn unlink_lent<'a>(&'a self, _overlay: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
    /// Unlinks a file; none is fine.
    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>>;
    /// Unlinks all files of a VM in a directory: `df-<id>.` and anything. None is fine.
    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>>;
    /// Names in a directory; empty if there is no such directory. Names that are no UTF-8 are left out.
    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>>;
    /// Connects to a unix socket. Deadline 5 s.
    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>>;
}

/// The host's own.
#[derive(Clone, Debug)]
pub struct RealPaths {
    /// What makes overlays.
    pub(super) qemu_img: PathBuf,
}

impl Default for RealPaths {
    fn default() -> Self {
        Self { qemu_img: "qemu-img".into() }
    }
}

impl Paths for RealPaths {
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let dir = dir.to_owned();
        Box::pin(
            async move { tokio::task::spawn_blocking(move || make_passable(&dir)).await.map_err(io::Error::other)? },
        )
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let dir = dir.to_owned();
        let make = move || std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        Box::pin(async move { tokio::task::spawn_blocking(make).await.map_err(io::Error::other)? })
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(disks::make(&self.qemu_img, overlay, base, disk_gib))
    }

    fn lend<'a>(&'a self, boot: &'a Boot, overlay: &'a Path) -> BoxFuture<'a, io::Result<Boot>> {
        Box::pin(disks::lend(boot, overlay))
    }

    fn unlink_lent<'a>(&'a self, overlay: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            for path in disks::lent(overlay) {
                unlink(&path).await?;
            }
            Ok(())
        })
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(unlink(path))
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let ours = format!("{vm}.");
            for name in self.names(dir).await?.into_iter().filter(|name| name.starts_with(&ours)) {
                unlink(&dir.join(name)).await?;
            }
            Ok(())
        })
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        Box::pin(async move {
            let mut entries = match tokio::fs::read_dir(dir).await {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut names = Vec::new();
            while let Some(entry) = entries.next_entry().await? {
                names.extend(entry.file_name().into_string().ok());
            }
            Ok(names)
        })
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let connected = timeout(CONNECT_DEADLINE, UnixStream::connect(socket)).await;
            Ok(Box::new(connected.map_err(|_| io::ErrorKind::TimedOut)??) as Box<dyn Stream>)
        })
    }
}

/// Unlinks a file; none is fine.
pub(super) async fn unlink(path: &Path) -> io::Result<()> {
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes a directory and those above it that are missing, so that other users can pass them, and
/// lets them pass this one if it was there and is ours. Whatever our umask: a service's is 0077.
fn make_passable(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.exists()) {
        make_passable(parent)?;
    }
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::metadata(dir)?;
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o011 == 0o011 || found.uid() != geteuid().as_raw() {
        return Ok(());
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711 | mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlays_directory_is_passable_however_it_came_about() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let (above, overlays) = (dir.path().join("above"), dir.path().join("above/overlays"));
        make_passable(&overlays).unwrap();
        assert_eq!((mode(&above) & 0o711, mode(&overlays) & 0o711), (0o711, 0o711));
        // As under a service's umask.
        std::fs::set_permissions(&overlays, std::fs::Permissions::from_mode(0o700)).unwrap();
        make_passable(&overlays).unwrap();
        assert_eq!(mode(&overlays), 0o711);
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(make_passable(&dir.path().join("file/overlays")).is_err());
    }

    #[tokio::test]
    async fn what_a_vm_has_left_goes_and_what_is_anothers_stays() {
        let dir = tempfile::tempdir().unwrap();
        let [ours, theirs] = ["df-abcdefghijklmnop", "df-ponmlkjihgfedcba"];
        for name in [ours, theirs] {
            for suffix in ["guest", "con"] {
                std::fs::write(dir.path().join(format!("{name}.{suffix}")), "").unwrap();
            }
        }
        for _ in 0..2 {
            RealPaths::default().unlink_all_of(dir.path(), &VmName::parse(ours).unwrap()).await.unwrap();
        }
        let mut left = RealPaths::default().names(dir.path()).await.unwrap();
        left.sort();
        assert_eq!(left, ["con", "guest"].map(|suffix| format!("{theirs}.{suffix}")));
    }
}
