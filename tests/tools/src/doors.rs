//! A fake hypervisor whose doors are TCP sockets: for tools that bring the real relay, or guests in
//! another process. Everything else is the fake's.

use dayfly::BoxFuture;
use dayfly::vm::paths::Paths;
use dayfly::vm::{
    DoorListener, Host, HostInfo, Hypervisor, InstallationId, Stream, VmError, VmName, VmSpec, VmState, VmSummary,
};
use dayfly_doubles::fake::FakeHypervisor;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;

/// The fake hypervisor with doors that anybody on the loopback reaches, and directories that exist.
#[derive(Clone, Debug)]
pub struct TcpDoors(pub FakeHypervisor);

impl TcpDoors {
    /// The host of this world.
    #[must_use]
    pub fn host(self) -> Host {
        Host::new(Arc::new(self.clone()), Arc::new(self))
    }
}

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

    fn probe(&self) -> BoxFuture<'_, Result<HostInfo, VmError>> {
        self.0.probe()
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
}

impl Paths for TcpDoors {
    // The daemon looks for free disk in these directories, and its files here may be real ones.
    fn make_passable<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(tokio::fs::create_dir_all(dir))
    }

    fn make_private<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(tokio::fs::create_dir_all(dir))
    }

    fn make_overlay<'a>(
        &'a self,
        overlay: &'a Path,
        base: &'a Path,
        disk_gib: u64,
    ) -> BoxFuture<'a, Result<(), VmError>> {
        self.0.make_overlay(overlay, base, disk_gib)
    }

    fn unlink<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink(path)
    }

    fn unlink_all_of<'a>(&'a self, dir: &'a Path, vm: &'a VmName) -> BoxFuture<'a, io::Result<()>> {
        self.0.unlink_all_of(dir, vm)
    }

    fn names<'a>(&'a self, dir: &'a Path) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.0.names(dir)
    }

    fn open_socket<'a>(&'a self, socket: &'a Path) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        self.0.open_socket(socket)
    }
}
