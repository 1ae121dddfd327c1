//! The real hypervisor: QEMU by libvirt. Only this directory says `virt::`, and no type of it leaves.
//!
//! ## Who owns what
//!
//! At a **session** libvirtd (`qemu:///session`) QEMU runs as ourselves, and there is nothing to
//! arrange. At the **system** one (`qemu:///system`) libvirtd is root, QEMU runs as another user
//! (Debian: `libvirt-qemu`, 64055), and we are an unprivileged member of group `libvirt`, which
//! may call it. Tried on Debian 12, libvirt 9.0, with a `dayfly` user in no other group:
//!
//! | Thing | Needs | Why |
//! | --- | --- | --- |
//! | overlay | directory `0711`, and every one above it passable to others | we make it `0600`; libvirtd gives it to QEMU's user for the VM's life (`dynamic_ownership`) and back at its end; QEMU opens it by path. We unlink it, as the directory is ours |
//! | base image, kernel, initrd | readable to others (`0644` in `0755`) | the base stays ours: its label says `relabel='no'`, or else QEMU's user could rewrite it for all VMs to come. libvirtd does give kernel and initrd to QEMU's user while a VM runs, and has no switch for it; AppArmor or SELinux, where it is on, lets QEMU read them only |
//! | sockets | directory ours, `0700` will do | libvirtd binds them as root and passes them to QEMU, mode `0775`, owner QEMU's user, group **our own**: the label in the XML asks for it. Without it the group would be QEMU's and we could not connect. libvirtd unlinks them with the VM |
//!
//! A file that QEMU cannot open makes [`Hypervisor::start`] fail with QEMU's own "Permission denied".
//! The domain's description (paths, installation, runner, job) can be read by every user of the
//! host at libvirtd's read-only socket; it holds no secret.

mod calls;
mod disk;
mod endings;
mod log;
mod workers;

use super::{
    DoorListener, HostInfo, Hypervisor, InstallationId, Stream, VmError, VmId, VmName, VmSpec, VmState, VmSummary,
};
use crate::BoxFuture;
use disk::Disks;
use endings::Endings;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpListener, UnixStream};
use tokio::time::timeout;
use workers::Workers;

/// A libvirtd that has just been started asks each QEMU what it can: seconds, once.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// Takes 0.35 s on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Takes 0.2 s; libvirt itself gives QEMU 15 s from SIGTERM over SIGKILL to giving up.
const DESTROY_DEADLINE: Duration = Duration::from_secs(30);

/// Takes milliseconds.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// QEMU accepts from its event loop; a guest under TCG can delay that.
const SOCKET_DEADLINE: Duration = Duration::from_secs(5);

/// `sun_path` has 108 bytes, the last of them NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Section `[hypervisor]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `qemu:///system`, `qemu:///session`, or another QEMU URI.
    pub uri: String,
    /// Which virtualisation runs guests.
    pub accel: AccelChoice,
}

impl Default for Config {
    fn default() -> Self {
        Self { uri: "qemu:///session".into(), accel: AccelChoice::Auto }
    }
}

/// Wish for [`Accel`](super::Accel).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM where a boot proves it, else refuse (decision D16).
    Auto,
    /// KVM, unproven.
    Kvm,
    /// QEMU's translator: slow, no isolation.
    Tcg,
}

/// libvirt at one URI. Connects when first asked, and again whenever the connection is lost.
pub struct Libvirt {
    workers: Workers,
    disks: Disks,
    endings: Endings,
    domain_type: Option<String>,
    /// See [`session_logs`].
    session_logs: Option<PathBuf>,
}

impl fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Libvirt")
    }
}

impl Libvirt {
    /// Nothing is connected to yet.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        // Else libvirt prints its errors itself, past our log.
        virt::error::clear_error_callback();
        Self {
            workers: Workers::new(&config.uri),
            disks: Disks { qemu_img: "qemu-img".into() },
            endings: Endings::new(&config.uri),
            domain_type: None,
            session_logs: session_logs(&config.uri, |name| std::env::var_os(name)),
        }
    }

    /// For `test:///default`, whose driver knows domains of type `test` only.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn with_domain_type(mut self, domain_type: &str) -> Self {
        self.domain_type = Some(domain_type.to_owned());
        self
    }
}

/// Where a libvirtd of our own session keeps one log per domain, for ever: as libvirt's
/// `virGetUserCacheDirectory` and `qemuStateInitialize` have it. The system's are root's, and rotated.
fn session_logs(uri: &str, variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let of = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = of("XDG_CACHE_HOME").or_else(|| of("HOME").map(|home| home.join(".cache")))?;
    uri.starts_with("qemu:///session").then(|| cache.join("libvirt/qemu/log"))
}

/// Where the system's libvirtd keeps such logs. They are root's.
const SYSTEM_LOGS: &str = "/var/log/libvirt/qemu";

/// The socket path is too long for the kernel.
#[derive(Debug, thiserror::Error)]
#[error(
    "socket path `{path}` has {bytes} bytes, of {SOCKET_PATH_BYTES_MAX} that Linux allows: choose a shorter runtime directory"
)]
struct SocketPathTooLong {
    path: String,
    bytes: usize,
}

fn check_socket_path(path: &Path) -> Result<(), SocketPathTooLong> {
    let bytes = path.as_os_str().len();
    if bytes <= SOCKET_PATH_BYTES_MAX {
        Ok(())
    } else {
        Err(SocketPathTooLong { path: path.display().to_string(), bytes })
    }
}

async fn connect(path: PathBuf) -> io::Result<Box<dyn Stream>> {
    check_socket_path(&path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let stream = timeout(SOCKET_DEADLINE, UnixStream::connect(path)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    Ok(Box::new(stream))
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

async fn unlink(path: &Path) -> io::Result<()> {
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Hypervisor for Libvirt {
    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        Box::pin(self.workers.call("probe", "host".into(), PROBE_DEADLINE, |link| link.probe()))
    }

    fn create_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(self.disks.create(overlay, base, disk_gib))
    }

    fn remove_overlay<'a>(&'a self, overlay: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(self.disks.remove(overlay))
    }

    fn list_overlays<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<Vec<PathBuf>, VmError>> {
        Box::pin(self.disks.list(dir))
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        Box::pin(async move {
            let name = VmName::from(spec.id.clone()).to_string();
            for path in
                [VmSpec::channel_socket(&spec.socket_dir, &spec.id), VmSpec::console_socket(&spec.socket_dir, &spec.id)]
            {
                check_socket_path(&path).map_err(|error| VmError::Refused {
                    what: "start VM",
                    name: name.clone(),
                    source: error.into(),
                })?;
            }
            self.endings.watch();
            let (spec, domain_type) = (spec.clone(), self.domain_type.clone());
            let start = move |link: &mut calls::Link| link.start(&spec, domain_type.as_deref());
            self.workers.call("start VM", name, START_DEADLINE, start).await
        })
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        let wanted = name.clone();
        let look = move |link: &mut calls::Link| link.state(&wanted);
        Box::pin(async move {
            self.endings.watch();
            let state = self.workers.call("read state of VM", name.to_string(), LOOK_DEADLINE, look).await?;
            Ok(match state {
                VmState::Gone => self.endings.of(name).await.map_or(VmState::Gone, VmState::Ended),
                state => state,
            })
        })
    }

    fn last_words<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Option<String>> {
        let logs = self.session_logs.clone().unwrap_or_else(|| SYSTEM_LOGS.into());
        let path = logs.join(format!("{name}.log"));
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || log::head(&path));
            timeout(LOOK_DEADLINE, read).await.ok()?.ok()?
        })
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        let wanted = name.clone();
        Box::pin(self.workers.call("destroy VM", name.to_string(), DESTROY_DEADLINE, move |link| link.destroy(&wanted)))
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        let wanted = installation.clone();
        self.endings.watch();
        Box::pin(
            self.workers.call("list VMs of", installation.to_string(), LOOK_DEADLINE, move |link| link.list(&wanted)),
        )
    }

    fn open_channel<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(connect(VmSpec::channel_socket(socket_dir, id)))
    }

    fn open_console<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(connect(VmSpec::console_socket(socket_dir, id)))
    }

    fn remove_sockets<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            unlink(&VmSpec::channel_socket(socket_dir, id)).await?;
            unlink(&VmSpec::console_socket(socket_dir, id)).await?;
            if let Some(logs) = &self.session_logs {
                // The name is ours alone: it has the VM's random id. A log that stays does no harm.
                let _ = unlink(&logs.join(format!("{}.log", VmName::from(id.clone())))).await;
            }
            Ok(())
        })
    }

    fn prepare<'a>(&'a self, overlay_dir: &'a Path, socket_dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        let (overlay_dir, socket_dir) = (overlay_dir.to_owned(), socket_dir.to_owned());
        Box::pin(async move {
            let made = tokio::task::spawn_blocking(move || {
                make_passable(&overlay_dir)?;
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&socket_dir)
            });
            made.await.map_err(io::Error::other)?
        })
    }

    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move { Ok(Box::new(TcpDoor(TcpListener::bind(address).await?)) as Box<dyn DoorListener>) })
    }
}

/// A door on a TCP address.
struct TcpDoor(TcpListener);

impl DoorListener for TcpDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            // Small answers are on the way to a runner that waits for them.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
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

    #[test]
    fn logs_of_domains_are_ours_to_remove_in_our_own_session_only() {
        let of = |uri: &str, set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(k, v)| ((*k).to_owned(), v.into())).collect();
            session_logs(uri, |name| set.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        let home = [("HOME", "/home/ci")];
        assert_eq!(of("qemu:///session", &home), Some("/home/ci/.cache/libvirt/qemu/log".into()));
        let both = [("HOME", "/home/ci"), ("XDG_CACHE_HOME", "/cache")];
        assert_eq!(of("qemu:///session", &both), Some("/cache/libvirt/qemu/log".into()));
        assert_eq!(of("qemu:///session", &[("HOME", "relative")]), None);
        assert_eq!(of("qemu:///system", &home), None);
    }

    #[test]
    fn socket_paths_end_at_107_bytes() {
        let path = |bytes: usize| PathBuf::from(format!("/{}", "x".repeat(bytes - 1)));
        check_socket_path(&path(107)).unwrap();
        let error = check_socket_path(&path(108)).unwrap_err().to_string();
        assert!(error.contains("has 108 bytes, of 107"), "{error}");
    }
}
