//! A fake hypervisor whose doors are TCP sockets: for tools that bring the real relay, or guests in
//! another process. Everything else is the fake's.

use dayfly::BoxFuture;
use dayfly::vm::fake::FakeHypervisor;
use dayfly::vm::{
    DoorListener, HostInfo, Hypervisor, InstallationId, Stream, VmError, VmId, VmName, VmSpec, VmState, VmSummary,
};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;

/// The fake hypervisor with doors that anybody on the loopback reaches, and directories that exist.
#[derive(Clone, Debug)]
pub struct TcpDoors(pub FakeHypervisor);

struct TcpDoor(TcpListener);

impl DoorListener for TcpDoor {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

impl Hypervisor for TcpDoors {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn DoorListener>>> {
        Box::pin(async move { Ok(Box::new(TcpDoor(TcpListener::bind(address).await?)) as Box<dyn DoorListener>) })
    }

    // The daemon looks for free disk in these directories, and its files here may be real ones.
    fn prepare<'a>(&'a self, overlay_dir: &'a Path, socket_dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            tokio::fs::create_dir_all(overlay_dir).await?;
            tokio::fs::create_dir_all(socket_dir).await
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        self.0.probe()
    }

    fn create_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.create_overlay(overlay, base, disk_gib)
    }

    fn remove_overlay<'a>(&'a self, overlay: &'a Path) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.remove_overlay(overlay)
    }

    fn list_overlays<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, Result<Vec<PathBuf>, VmError>> {
        self.0.list_overlays(dir)
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.start(spec)
    }

    fn state<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<VmState, VmError>> {
        self.0.state(name)
    }

    fn destroy<'a>(&'a self, name: &'a VmName) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.destroy(name)
    }

    fn list<'a>(&'a self, installation: &'a InstallationId) -> BoxFuture<'a, Result<Vec<VmSummary>, VmError>> {
        self.0.list(installation)
    }

    fn open_channel<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.0.open_channel(socket_dir, id)
    }

    fn open_console<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.0.open_console(socket_dir, id)
    }

    fn remove_sockets<'a>(&'a self, socket_dir: &'a Path, id: &'a VmId) -> BoxFuture<'a, io::Result<()>> {
        self.0.remove_sockets(socket_dir, id)
    }
}
