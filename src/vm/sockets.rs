//! The wires between a VM and us: unix sockets of guest channel, door and serial console. The same for every back end.

use super::paths::Paths;
use super::{Stream, VmId, VmName, VmSpec};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `sun_path` has 108 bytes, the last of them NUL.
const PATH_BYTES_MAX: usize = 107;

/// The sockets of VMs. Clones are the same.
#[derive(Clone)]
pub struct Sockets {
    paths: Arc<dyn Paths>,
    /// Where a log per VM is left behind, if it is ours to remove.
    logs: Option<PathBuf>,
}

impl Sockets {
    /// Sockets that are reached and removed like this. `logs`: a directory in which the hypervisor leaves a file
    /// `df-<id>.log` for each VM, which goes with its sockets.
    #[must_use]
    pub fn new(paths: Arc<dyn Paths>, logs: Option<PathBuf>) -> Self {
        Self { paths, logs }
    }

    /// The same, reached and removed like this.
    #[must_use]
    pub fn by(&self, paths: Arc<dyn Paths>) -> Self {
        Self { paths, logs: self.logs.clone() }
    }

    /// Makes the directory of sockets, which nobody else may pass.
    ///
    /// # Errors
    /// The system's.
    pub async fn prepare(&self, dir: &Path) -> io::Result<()> {
        self.paths.make_private(dir).await
    }

    /// Connects to the guest channel of a VM. End of stream means that the VM is gone.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for a path that Linux cannot hold.
    pub async fn channel(&self, dir: &Path, id: &VmId) -> io::Result<Box<dyn Stream>> {
        self.connect(&VmSpec::channel_socket(dir, id)).await
    }

    /// Connects to the door's port of a VM. One connection is served at a time: another one connects as well, and
    /// nothing is read of it before the first one has gone.
    ///
    /// # Errors
    /// As [`Sockets::channel`].
    pub async fn door(&self, dir: &Path, id: &VmId) -> io::Result<Box<dyn Stream>> {
        self.connect(&VmSpec::door_socket(dir, id)).await
    }

    /// Connects to the port by which a VM's guest is asked for a shell; likewise.
    ///
    /// # Errors
    /// As [`Sockets::channel`].
    pub async fn shell(&self, dir: &Path, id: &VmId) -> io::Result<Box<dyn Stream>> {
        self.connect(&VmSpec::shell_socket(dir, id)).await
    }

    /// Connects to the serial console of a VM. Must be drained, or the guest stands still.
    ///
    /// # Errors
    /// As [`Sockets::channel`].
    pub async fn console(&self, dir: &Path, id: &VmId) -> io::Result<Box<dyn Stream>> {
        self.connect(&VmSpec::console_socket(dir, id)).await
    }

    /// Removes what a VM leaves in `dir`; none is fine.
    ///
    /// # Errors
    /// The system's.
    pub async fn remove(&self, dir: &Path, id: &VmId) -> io::Result<()> {
        let name = VmName::from(id.clone());
        self.paths.unlink_all_of(dir, &name).await?;
        if let Some(logs) = &self.logs {
            // The name is ours alone: it has the VM's random id. A log that stays does no harm.
            let _ = self.paths.unlink(&logs.join(format!("{name}.log"))).await;
        }
        Ok(())
    }

    async fn connect(&self, path: &Path) -> io::Result<Box<dyn Stream>> {
        check_path(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.paths.open_socket(path).await
    }
}

/// The door's port of one VM, from before there is one: what connects to it, again and again.
#[derive(Clone)]
pub struct DoorSocket {
    sockets: Sockets,
    dir: PathBuf,
    id: VmId,
}

impl DoorSocket {
    /// That of a VM whose sockets lie in `dir`.
    #[must_use]
    pub fn new(sockets: Sockets, dir: PathBuf, id: VmId) -> Self {
        Self { sockets, dir, id }
    }

    /// See [`Sockets::door`].
    ///
    /// # Errors
    /// As [`Sockets::channel`].
    pub async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.sockets.door(&self.dir, &self.id).await
    }
}

/// The socket path is too long for the kernel.
#[derive(Debug, thiserror::Error)]
#[error(
    "socket path `{path}` has {bytes} bytes, of {PATH_BYTES_MAX} that Linux allows: choose a shorter runtime directory"
)]
pub(super) struct PathTooLong {
    path: String,
    bytes: usize,
}

/// Whether a socket can be bound at this path.
pub(super) fn check_path(path: &Path) -> Result<(), PathTooLong> {
    let bytes = path.as_os_str().len();
    if bytes <= PATH_BYTES_MAX { Ok(()) } else { Err(PathTooLong { path: path.display().to_string(), bytes }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_end_at_107_bytes() {
        let path = |bytes: usize| PathBuf::from(format!("/{}", "x".repeat(bytes - 1)));
        check_path(&path(107)).unwrap();
        let error = check_path(&path(108)).unwrap_err().to_string();
        assert!(error.contains("has 108 bytes, of 107"), "{error}");
    }
}
