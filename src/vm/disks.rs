//! Overlays: made by `qemu-img` on a base image that is looked at first, and from then on only
//! ever unlinked, for a used one is the guest's work (threats.md T16). The same for every back end.

use super::paths::{Paths, unlink};
use super::{Boot, VmError, VmName};
use crate::files::plain;
use crate::process::{ProcessError, Program};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// `qemu-img create` takes 15 ms; a host whose disk is that busy is of no use.
const DEADLINE: Duration = Duration::from_secs(60);

/// Says nothing but errors.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

const GIB: u64 = 1 << 30;

/// The part of a qcow2 header that is looked at: version 2's 72 bytes, then version 3's
/// incompatible features. (QEMU's `docs/interop/qcow2.txt`.)
const HEADER_BYTES: usize = 80;

/// Version 3: data in another file. The other incompatible features are about this file alone.
const EXTERNAL_DATA: u64 = 1 << 2;

/// Why a base image is not to be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum BaseError {
    #[error("read base image `{}`", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("base image `{}` {fault}", .path.display())]
    Unfit { path: PathBuf, fault: &'static str },
}

fn refused(what: &'static str, path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
    VmError::refused(what, &path.display(), source)
}

/// The disks of VMs. Clones are the same.
#[derive(Clone)]
pub struct Disks(Arc<dyn Paths>);

impl Disks {
    /// Disks that are made and removed like this.
    #[must_use]
    pub fn new(paths: Arc<dyn Paths>) -> Self {
        Self(paths)
    }

    /// Makes the directory of overlays, and those above it that are missing. QEMU's user must be able to pass them.
    ///
    /// # Errors
    /// The system's.
    pub async fn prepare(&self, dir: &Path) -> io::Result<()> {
        self.0.make_passable(dir).await
    }

    /// Makes an overlay of `disk_gib` GiB, or of its base's size if that is more, readable by
    /// nobody but us and, once a VM has it, QEMU's user. Deadline 60 s. An existing file at this path is replaced.
    ///
    /// # Errors
    /// [`VmError`]; nothing half-made is left.
    pub async fn create(&self, overlay: &Path, base: &Path, disk_gib: u64) -> Result<(), VmError> {
        self.0.make_overlay(overlay, base, disk_gib).await
    }

    /// Makes copies of kernel and initrd beside an overlay, for a VM whose QEMU has a user of its own: libvirtd gives
    /// both to that user for the VM's life, and has no switch for it. So the image's own are nobody's but ours, and two
    /// VMs of one image want different owners for no file. They go with the overlay.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn lend(&self, boot: &Boot, overlay: &Path) -> Result<Boot, VmError> {
        self.0.lend(boot, overlay).await.map_err(|error| refused("copy kernel and initrd beside", overlay, error))
    }

    /// Unlinks an overlay, never opening it: it is the guest's work by now. None is fine. Before it what was lent.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn remove(&self, overlay: &Path) -> Result<(), VmError> {
        let lent = self.0.unlink_lent(overlay).await;
        lent.map_err(|error| refused("remove copies beside overlay", overlay, error))?;
        self.0.unlink(overlay).await.map_err(|error| refused("remove overlay", overlay, error))
    }

    /// Paths of overlays `df-<id>.qcow2` in `dir`, sorted.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn list(&self, dir: &Path) -> Result<Vec<PathBuf>, VmError> {
        let names = self.0.names(dir).await.map_err(|error| refused("list overlays in", dir, error))?;
        let ours = |name: &String| name.strip_suffix(".qcow2").is_some_and(|name| VmName::parse(name).is_some());
        let mut overlays: Vec<PathBuf> = names.iter().filter(|name| ours(name)).map(|name| dir.join(name)).collect();
        overlays.sort();
        Ok(overlays)
    }
}

/// Where copies of kernel and initrd lie.
pub(super) fn lent(overlay: &Path) -> [PathBuf; 2] {
    ["kernel", "initrd"].map(|what| overlay.with_extension(what))
}

/// [`Disks::lend`].
pub(super) async fn lend(boot: &Boot, overlay: &Path) -> io::Result<Boot> {
    let Boot::Direct { kernel, initrd, cmdline } = boot else { return Ok(boot.clone()) };
    let [own_kernel, own_initrd] = lent(overlay);
    for (from, to) in [(kernel, &own_kernel), (initrd, &own_initrd)] {
        // Of a daemon that died in the middle.
        unlink(to).await?;
        let (from, to) = (from.clone(), to.clone());
        let copied = tokio::task::spawn_blocking(move || {
            let mut from = plain::open_chosen(&from)?;
            let mut to = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
            io::copy(&mut from, &mut to)
        });
        copied.await.map_err(io::Error::other)??;
    }
    Ok(Boot::Direct { kernel: own_kernel, initrd: own_initrd, cmdline: cmdline.clone() })
}

/// [`Disks::create`], with this `qemu-img`.
pub(super) async fn make(qemu_img: &Path, overlay: &Path, base: &Path, disk_gib: u64) -> Result<(), VmError> {
    const WHAT: &str = "create overlay";
    for path in [overlay, base] {
        // qemu-img would look for a protocol or an option in anything else.
        if !path.is_absolute() {
            return Err(refused(WHAT, path, "the path is not absolute"));
        }
    }
    let bytes = virtual_bytes(base).await.map_err(|error| refused(WHAT, overlay, error))?;
    let bytes = bytes.max(disk_gib.saturating_mul(GIB));
    let remove = || async { unlink(overlay).await.map_err(|error| refused("remove overlay", overlay, error)) };
    remove().await?;
    claim(overlay).await.map_err(|error| refused(WHAT, overlay, error))?;
    let made = Program::new(qemu_img, DEADLINE)
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .arg(overlay)
        .arg(bytes.to_string())
        .output_bytes_max(OUTPUT_BYTES_MAX)
        .run()
        .await;
    let Err(error) = made else { return Ok(()) };
    remove().await?;
    Err(match error {
        ProcessError::Deadline { deadline, .. } => VmError::late(WHAT, &overlay.display(), deadline),
        error => refused(WHAT, overlay, error),
    })
}

/// Makes the empty file that qemu-img will fill: it would leave it readable to all, and a guest's
/// disk holds what the job was given.
async fn claim(overlay: &Path) -> io::Result<()> {
    let overlay = overlay.to_owned();
    let made = tokio::task::spawn_blocking(move || {
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(overlay).map(drop)
    });
    made.await.map_err(io::Error::other)?
}

/// Reads the size of the disk that a base image is, and makes sure that it leads to no other file.
async fn virtual_bytes(base: &Path) -> Result<u64, BaseError> {
    let unreadable = |source| BaseError::Read { path: base.to_owned(), source };
    let unfit = |fault| Err(BaseError::Unfit { path: base.to_owned(), fault });
    let path = base.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        plain::open_chosen(&path)?.take(HEADER_BYTES as u64).read_to_end(&mut header)?;
        Ok(header)
    });
    let header = match read.await.map_err(io::Error::other).and_then(|read| read) {
        Ok(header) => header,
        Err(error) if matches!(error.kind(), io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput) => {
            return unfit("is no file");
        }
        Err(error) => return Err(unreadable(error)),
    };
    let number = |at: usize, bytes: usize| header[at..at + bytes].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
    if header.len() < HEADER_BYTES || header[..4] != *b"QFI\xfb" {
        return unfit("is no qcow2 image");
    }
    let version = number(4, 4);
    match version {
        2 | 3 if number(8, 8) != 0 => unfit("has a backing file of its own"),
        2 | 3 if number(32, 4) != 0 => unfit("is encrypted"),
        3 if number(72, 8) & EXTERNAL_DATA != 0 => unfit("has its data in another file"),
        2 | 3 => Ok(number(24, 8)),
        _ => unfit("is of an unknown qcow2 version"),
    }
}

#[cfg(test)]
mod tests;
